"""A checkpoint to a Hugging Face LLaVA folder, in float16.

    python weights/recipe/export.py withdrawal --output weights/minivtw-tiny
    python weights/recipe/export.py plain --output RUNS/plain
    python weights/recipe/export.py graft --output weights/minivtw-smol

Tensors have the names of LLaVA-1.5 checkpoints; `transformers.LlavaForConditionalGeneration.from_pretrained` and
`AutoProcessor.from_pretrained` load the folder unchanged. Files that other tools keep there are left alone.
"""

import argparse
import json
import pathlib
import tempfile
from typing import NamedTuple

import torch
from graft import ALPHA, RANK, Grafted
from model import Llava, load_checkpoint
from safetensors.torch import save_file
from tokenizer import tokenizer_config, tokenizer_of
from tokenizers import Tokenizer
from torch import Tensor
from tower import MEAN, STD

from minivtw.checkpoints.hub import model_folder


class Marks(NamedTuple):
    """Token ids of the special tokens."""

    begin: int
    end: int
    pad: int
    image: int


def marks_of(tokenizer: Tokenizer) -> Marks:
    return Marks(*map(tokenizer.token_to_id, ("<s>", "</s>", "<pad>", "<image>")))


def config(model: Llava, marks: Marks, dtype: str) -> dict:
    """config.json."""
    vision, text = model.vision._asdict(), model.text._asdict()
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "image_token_index": marks.image,
        "image_seq_length": model.vision.patches,
        "pad_token_id": marks.pad,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": True,
        "torch_dtype": dtype,
        "text_config": {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            **text,
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": True,
            "bos_token_id": marks.begin,
            "eos_token_id": marks.end,
            "pad_token_id": marks.pad,
            "torch_dtype": dtype,
        },
        "vision_config": {
            "model_type": "clip_vision_model",
            **vision,
            "num_channels": 3,
            "hidden_act": "quick_gelu",
            "projection_dim": model.text.hidden_size,
            "torch_dtype": dtype,
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


def generation_config(marks: Marks) -> dict:
    return {
        "bos_token_id": marks.begin,
        "eos_token_id": marks.end,
        "pad_token_id": marks.pad,
        "do_sample": False,
    }


def documents(model: Llava, marks: Marks, dtype: str) -> dict[str, dict]:
    """The JSON files of a folder, but for the tokenizer's."""
    return {
        "config.json": config(model, marks, dtype),
        "preprocessor_config.json": image_processor_config(model.vision.image_size),
        "processor_config.json": processor_config(model),
        "generation_config.json": generation_config(marks),
    }


def write_folder(
    output: pathlib.Path, documents: dict[str, dict], tokenizer: Tokenizer | None, name: str, tensors: dict[str, Tensor]
) -> None:
    """Write every file beside, then move each over its older self; the tensors as float16 into the file `name`."""
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".export-") as scratch:
        beside = pathlib.Path(scratch)
        for file_name, document in documents.items():
            (beside / file_name).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
        if tokenizer:
            tokenizer.save(str(beside / "tokenizer.json"))
        halves = {name: tensor.detach().half().contiguous() for name, tensor in tensors.items()}
        save_file(halves, beside / name, metadata={"format": "pt"})
        for path in beside.iterdir():
            path.chmod(0o644)
            path.replace(output / path.name)


def export_embedded(runs: pathlib.Path, stage: str, output: pathlib.Path) -> None:
    """A whole LLaVA folder."""
    model, tokenizer = load_checkpoint(runs / f"{stage}.pt"), tokenizer_of(runs)
    files = documents(model, marks_of(tokenizer), "float16") | {"tokenizer_config.json": tokenizer_config()}
    write_folder(output, files, tokenizer, "model.safetensors", model.state_dict())


def export_graft(runs: pathlib.Path, stage: str, output: pathlib.Path) -> None:
    """What was trained; `python -m minivtw.fetch smol` merges it with SmolLM2's weights."""
    base = model_folder("smollm2")
    model = Grafted(base)
    model.load_state_dict(torch.load(runs / f"{stage}.pt", weights_only=True)["model"])
    said = json.loads((base / "config.json").read_text(encoding="utf-8"))
    marks = Marks(said["bos_token_id"], said["eos_token_id"], said["pad_token_id"], model.text.vocab_size - 1)
    tensors = model.state_dict()
    for tensor_name in tensors:
        if tensor_name.endswith("lora_B.weight"):
            tensors[tensor_name] = tensors[tensor_name] * (ALPHA / RANK)  # so that W + B A is all there is to do
    files = documents(model, marks, "float32") | {"tokenizer_config.json": chat_tokenizer_config(base)}
    write_folder(output, files, None, "graft.safetensors", tensors)


def chat_tokenizer_config(base: pathlib.Path) -> dict:
    """tokenizer_config.json for ChatML without a system message, the layout of graft.py."""
    said = json.loads((base / "tokenizer_config.json").read_text(encoding="utf-8"))
    return said | {
        "image_token": "<image>",
        "extra_special_tokens": {"image_token": "<image>"},
        "padding_side": "left",
        "chat_template": CHAT_TEMPLATE,
    }


# Content is a text, or a list of parts as transformers has them; an image goes on a line of its own before the text.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>\n{% endif %}{% endfor %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", help="the name of a checkpoint: plain, withdrawal or graft")
    parser.add_argument("--runs", type=pathlib.Path, default=pathlib.Path(__file__).parent / "runs")
    parser.add_argument("--output", type=pathlib.Path, required=True, help="the folder to write")
    arguments = parser.parse_args()
    export = export_graft if arguments.stage.startswith("graft") else export_embedded
    export(arguments.runs, arguments.stage, arguments.output)
    print(arguments.output)


if __name__ == "__main__":
    main()
