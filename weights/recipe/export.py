"""A checkpoint to a Hugging Face LLaVA folder, in float16.

    python weights/recipe/export.py withdrawal --output weights/minivtw-tiny
    python weights/recipe/export.py plain --output RUNS/plain

Tensors have the names of LLaVA-1.5 checkpoints; `transformers.LlavaForConditionalGeneration.from_pretrained` and
`AutoProcessor.from_pretrained` load the folder unchanged. Files that other tools keep there are left alone.
"""

import argparse
import json
import pathlib
import tempfile

from safetensors.torch import save_file
from tokenizers import Tokenizer

from decoder import load_model
from model import Llava
from tokenizer import save_tokenizer, tokenizer_of
from tower import MEAN, STD


def config(model: Llava, tokenizer: Tokenizer) -> dict:
    """config.json."""
    vision, text = model.vision._asdict(), model.text._asdict()
    token = tokenizer.token_to_id
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "image_token_index": token("<image>"),
        "image_seq_length": model.vision.patches,
        "pad_token_id": token("<pad>"),
        "projector_hidden_act": "gelu",
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": True,
        "torch_dtype": "float16",
        "text_config": {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            **text,
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": True,
            "bos_token_id": token("<s>"),
            "eos_token_id": token("</s>"),
            "pad_token_id": token("<pad>"),
            "torch_dtype": "float16",
        },
        "vision_config": {
            "model_type": "clip_vision_model",
            **vision,
            "num_channels": 3,
            "hidden_act": "quick_gelu",
            "projection_dim": model.text.hidden_size,
            "torch_dtype": "float16",
        },
    }


def image_processor_config(side: int) -> dict:
    """preprocessor_config.json: shortest side to `side`, centre crop, normalise as the training did."""
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": side},
        "resample": 3,  # bicubic
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [MEAN / 255] * 3,
        "image_std": [STD / 255] * 3,
    }


def processor_config(model: Llava) -> dict:
    """processor_config.json: how many visual tokens an image becomes (the class token is counted, then dropped)."""
    return {
        "processor_class": "LlavaProcessor",
        "image_token": "<image>",
        "patch_size": model.vision.patch_size,
        "num_additional_image_tokens": 1,
        "vision_feature_select_strategy": "default",
    }


def generation_config(tokenizer: Tokenizer) -> dict:
    begin, end, pad = map(tokenizer.token_to_id, ("<s>", "</s>", "<pad>"))
    return {"bos_token_id": begin, "eos_token_id": end, "pad_token_id": pad, "do_sample": False}


def write_folder(model: Llava, tokenizer: Tokenizer, output: pathlib.Path) -> None:
    """Write every file beside, then move each over its older self."""
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".export-") as name:
        beside = pathlib.Path(name)
        documents = {
            "config.json": config(model, tokenizer),
            "preprocessor_config.json": image_processor_config(model.vision.image_size),
            "processor_config.json": processor_config(model),
            "generation_config.json": generation_config(tokenizer),
        }
        for file_name, document in documents.items():
            (beside / file_name).write_text(json.dumps(document, indent=2) + "\n")
        save_tokenizer(tokenizer, beside)
        tensors = {name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}
        save_file(tensors, beside / "model.safetensors", metadata={"format": "pt"})
        for path in beside.iterdir():
            path.chmod(0o644)
            path.replace(output / path.name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("plain", "withdrawal"))
    parser.add_argument("--runs", type=pathlib.Path, default=pathlib.Path(__file__).parent / "runs")
    parser.add_argument("--output", type=pathlib.Path, required=True, help="the folder to write")
    arguments = parser.parse_args()
    write_folder(load_model(arguments.runs / f"{arguments.stage}.pt"), tokenizer_of(arguments.runs), arguments.output)
    print(arguments.output)


if __name__ == "__main__":
    main()
