"""transformers as the reference: small random LLaVA models, and what they compute, layer by layer.

Needs torch and transformers. `record.py` writes down what this file computes; the live tests compare with it directly.
Arrays are float32 and have the names under which minivtw shows them to `observe`.
"""

import json
import pathlib
from typing import NamedTuple

import numpy as np
import torch
import transformers
from PIL import Image, ImageOps
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoProcessor, LlavaConfig, LlavaForConditionalGeneration
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

transformers.logging.set_verbosity_error()
torch.set_num_threads(1)

CORPUS = """What color is the star? How many rings are left of the white square? Is the green circle above the
purple cross? Which shape is the smallest one? There are three triangles. The figure is a seven. USER: ASSISTANT:"""


class Variant(NamedTuple):
    """One random LLaVA model: its configs, and how its files are written."""

    name: str
    vision: dict
    text: dict
    llava: dict
    style: str = "saved"  # how its tensors are named, a key of STYLES
    dtype: str = "float32"
    shards: bool = False
    seed: int = 0


# transformers 5.23 writes a new model's tensors as `saved`. Published LLaVA files have the tower's `vision_model.`
# (`published`); versions between wrote the names of the modules, with it (`between`) or without (`modules`).
STYLES = {
    "saved": {},
    "published": {"vision_tower.": "vision_tower.vision_model."},
    "between": {
        "vision_tower.": "model.vision_tower.vision_model.",
        "multi_modal_projector.": "model.multi_modal_projector.",
        "language_model.model.": "model.language_model.",
        "language_model.lm_head.": "lm_head.",
    },
    "modules": {
        "vision_tower.": "model.vision_tower.",
        "multi_modal_projector.": "model.multi_modal_projector.",
        "language_model.model.": "model.language_model.",
        "language_model.lm_head.": "lm_head.",
    },
}


def clip(**changes):
    """A small CLIP tower's config."""
    sizes = dict(image_size=24, patch_size=8, hidden_size=24, intermediate_size=40)
    layers = dict(num_hidden_layers=3, num_attention_heads=3, hidden_act="quick_gelu")
    return {"model_type": "clip_vision_model", **sizes, **layers, **changes}


def siglip(**changes):
    """A small SigLIP tower's config."""
    own = {"model_type": "siglip_vision_model", "hidden_act": "gelu_pytorch_tanh", "vision_use_head": False}
    return clip(**{**own, **changes})


def llama(**changes):
    """A small Llama decoder's config."""
    sizes = dict(hidden_size=32, intermediate_size=48, rms_norm_eps=1e-5, max_position_embeddings=512)
    layers = dict(num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2)
    return {"model_type": "llama", **sizes, **layers, **changes}


def qwen2(**changes):
    """A small Qwen2 decoder's config."""
    return llama(**{"model_type": "qwen2", "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, **changes})


def feature(layer, strategy, **changes):
    return {"vision_feature_layer": layer, "vision_feature_select_strategy": strategy, **changes}


RECORDED = (
    Variant("clip-plain", clip(), llama(num_key_value_heads=4), feature(-2, "default"), "published", seed=1),
    Variant(
        "clip-tied",
        clip(hidden_act="gelu"),
        llama(tie_word_embeddings=True),
        feature(-1, "full"),
        dtype="float16",
        seed=2,
    ),
    Variant(
        "clip-wide-heads",
        clip(patch_size=10, layer_norm_eps=1e-3),  # 24 is no multiple of 10: the border is left out
        llama(head_dim=12, num_key_value_heads=1, rms_norm_eps=1e-3),
        feature(1, "default", multimodal_projector_bias=False),
        "between",
        "bfloat16",
        seed=3,
    ),
    Variant("clip-qwen2", clip(), qwen2(), feature(-2, "default"), "modules", "float16", shards=True, seed=4),
    Variant("siglip-llama", siglip(), llama(), feature(-2, "full"), "between", shards=True, seed=5),
    Variant(
        "siglip-qwen2",
        siglip(vision_use_head=True),
        qwen2(num_key_value_heads=4, tie_word_embeddings=True),
        feature(-1, "full", projector_hidden_act="gelu_pytorch_tanh"),
        "published",
        "bfloat16",
        shards=True,
        seed=6,
    ),
)


def random_variant(seed):
    """A larger model of random sizes and choices."""
    random = np.random.default_rng(seed)
    pick = lambda *choices: choices[random.integers(len(choices))]
    heads, kv_heads = pick((4, 4), (6, 2), (8, 1), (9, 3))
    text = pick(llama, qwen2)(
        hidden_size=int(random.integers(3, 9)) * 2 * heads,
        intermediate_size=int(random.integers(30, 200)),
        num_hidden_layers=int(random.integers(2, 9)),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        tie_word_embeddings=pick(True, False),
        **pick({}, {"head_dim": int(random.integers(2, 12)) * 2}),
    )
    vision_heads, layers = int(random.integers(1, 7)), int(random.integers(1, 6))
    patch_size = int(random.integers(4, 17))
    vision = pick(clip, siglip)(
        image_size=patch_size * int(random.integers(2, 7)) + int(random.integers(0, patch_size)),
        patch_size=patch_size,
        hidden_size=int(random.integers(5, 20)) * vision_heads,
        intermediate_size=int(random.integers(30, 200)),
        num_hidden_layers=layers,
        num_attention_heads=vision_heads,
    )
    vision["hidden_act"] = pick("quick_gelu", "gelu_pytorch_tanh", "gelu")
    vision["layer_norm_eps"] = pick(1e-5, 1e-6, 1e-3)
    llava = feature(
        pick(*range(-layers - 1, 0), *range(1, layers + 1)),  # transformers 5.23 takes 0 for "no hidden states"
        pick("default", "full"),
        projector_hidden_act=pick("gelu", "gelu", "gelu_pytorch_tanh", "quick_gelu", "silu"),
        multimodal_projector_bias=pick(True, False),
    )
    style, dtype = pick(*STYLES), pick("float32", "float16", "bfloat16")
    return Variant(f"random-{seed}", vision, text, llava, style, dtype, bool(random.integers(2)), seed)


def build(variant, folder):
    """Write a variant's Hugging Face folder: config, weights, tokenizer, image processor."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = llama_tokenizer() if variant.text["model_type"] == "llama" else qwen2_tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    end = tokenizer.token_to_id("</s>" if variant.text["model_type"] == "llama" else "<|im_end|>")
    special = {"extra_special_tokens": {"image_token": "<image>"}}
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **special})

    config = LlavaConfig(
        vision_config=variant.vision,
        # More rows than the tokenizer has tokens, as published models have.
        text_config={**variant.text, "vocab_size": tokenizer.get_vocab_size() + 3},
        image_token_index=tokenizer.token_to_id("<image>"),
        **{"tie_word_embeddings": variant.text.get("tie_word_embeddings", False), **variant.llava},
    )
    model = LlavaForConditionalGeneration(config)
    randomise(model, variant.seed)
    model.to(getattr(torch, variant.dtype))
    model.save_pretrained(folder, **({"max_shard_size": "30KB"} if variant.shards else {}))
    rename(folder, STYLES[variant.style])
    write_json(folder / "generation_config.json", {"eos_token_id": end})
    write_processor(variant, folder)


def write_processor(variant, folder):
    """preprocessor_config.json beside processor_config.json or, as transformers 5 saves them, the one in the other."""
    side = variant.vision["image_size"]
    if variant.vision["model_type"] == "clip_vision_model":
        class_tokens = 1
        images = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    else:
        class_tokens = 0
        images = SiglipImageProcessorPil(size={"height": side, "width": side}, resample=2 + variant.seed % 2)
    processor = {
        "processor_class": "LlavaProcessor",
        "image_token": "<image>",
        "patch_size": variant.vision["patch_size"],
        "num_additional_image_tokens": class_tokens,
        "vision_feature_select_strategy": variant.llava["vision_feature_select_strategy"],
    }
    if variant.style == "saved":
        processor["image_processor"] = images.to_dict()
    else:
        write_json(folder / "preprocessor_config.json", images.to_dict())
    write_json(folder / "processor_config.json", processor)


def write_json(path, content):
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def llama_tokenizer():
    """Like Llama's: spaces are ▁, no pre-tokenizer, and a text begins with <s>."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    special = ["<unk>", "<s>", "</s>", "<pad>", "<image>"]
    trainer = trainers.BpeTrainer(vocab_size=100, special_tokens=special, show_progress=False, max_token_length=8)
    tokenizer.train_from_iterator([*CORPUS.split("\n"), "\n"], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def qwen2_tokenizer():
    """Like Qwen2's: byte-level, with the marks of a chat as special tokens, and nothing before a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=290,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([CORPUS, "user assistant"], trainer)
    return tokenizer


@torch.no_grad()
def randomise(model, seed):
    """Weights under which attention is far from uniform, and every norm and every bias matters."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        parameter.normal_(generator=generator)
        if name.endswith("bias"):
            parameter.mul_(0.3)
        elif "norm" in name:
            parameter.mul_(0.25).add_(1)
        elif "embed_tokens" in name:
            parameter.mul_(0.3)  # small beside what the layers add, so that a tied head does not repeat the last token
        elif parameter.ndim > 1 and "position_embedding" not in name:
            gain = 1.6 if "q_proj" in name or "k_proj" in name else 1.2
            parameter.mul_(gain * (len(parameter) / parameter.numel()) ** 0.5)  # 1 / sqrt(inputs)


def rename(folder, prefixes):
    """Give the tensors of a saved model other prefixes, in the files and in the index."""

    def renamed(name):
        return next((new + name[len(old) :] for old, new in prefixes.items() if name.startswith(old)), name)

    for path in folder.glob("*.safetensors"):
        save_file({renamed(name): tensor for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})
    for path in folder.glob("*.index.json"):
        index = json.loads(path.read_text(encoding="utf-8"))
        index["weight_map"] = {renamed(name): file for name, file in index["weight_map"].items()}
        write_json(path, index)


def chat(model_type, question, images):
    """The prompt of the published models on Llama and on Qwen2 (their model cards)."""
    marks = "<image>\n" * images
    if model_type == "llama":
        return f"USER: {marks}{question} ASSISTANT:"
    return f"<|im_start|>user {marks}{question}<|im_end|><|im_start|>assistant"


class Reference:
    """A model folder in transformers, float32, with attention that shows its probabilities."""

    def __init__(self, folder):
        self.processor = AutoProcessor.from_pretrained(folder, backend="pil")
        load = LlavaForConditionalGeneration.from_pretrained
        self.model = load(folder, dtype=torch.float32, attn_implementation="eager").eval()

    def inputs(self, images, question):
        """What the processor makes of Pillow images, or paths, and a question."""
        images = [ImageOps.exif_transpose(Image.open(image) if is_path(image) else image) for image in images]
        if self.processor.tokenizer.chat_template:  # the model says itself how it is talked to
            parts = [*({"type": "image"} for _ in images), {"type": "text", "text": question}]
            turn = [{"role": "user", "content": parts}]
            text = self.processor.tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
        else:
            text = chat(self.model.config.text_config.model_type, question, len(images))
        return self.processor(images=images or None, text=text, return_tensors="pt")

    @torch.no_grad()
    def prefill(self, inputs):
        """Every array between the pixels and the last token's logits."""
        inner, config = self.model.model, self.model.config
        tower, decoder = inner.vision_tower.encoder.layers, inner.language_model.layers
        selected = config.vision_feature_layer
        used = selected if selected >= 0 else len(tower) + 1 + selected  # nothing depends on the layers after these
        arrays = {"vision.pixels": inputs["pixel_values"]}
        handles = []

        def record_input(name, module):
            seen = lambda _, given, named: arrays.update({name: given[0] if given else named["hidden_states"]})
            handles.append(module.register_forward_pre_hook(seen, with_kwargs=True))

        def record_output(name, module, part=0):
            seen = lambda _, given, output: arrays.update({name: output[part] if isinstance(output, tuple) else output})
            handles.append(module.register_forward_hook(seen))

        record_input("vision.embeddings", tower[0])
        record_input("vision.features", inner.multi_modal_projector)
        record_output("connector.output", inner.multi_modal_projector)
        record_input("decoder.embeddings", decoder[0])
        for part, layers in (("vision", tower[:used]), ("decoder", decoder)):
            for index, layer in enumerate(layers):
                record_output(f"{part}.layers.{index}.attention", layer.self_attn, 1)
                record_output(f"{part}.layers.{index}.hidden", layer)
        logits = self.model(**inputs).logits
        for handle in handles:
            handle.remove()
        arrays["connector.output"] = arrays["connector.output"].flatten(0, 1)[None]  # tiles follow each other
        arrays["decoder.logits"] = logits[:, -1]
        # A batch of tiles stays; a batch of one prompt goes.
        return {name: (array if name.startswith("vision.") else array[0]).numpy() for name, array in arrays.items()}

    @torch.no_grad()
    def greedy(self, inputs, tokens):
        """Greedy token ids, the logits each was chosen from (ids, vocabulary), and the text."""
        output = self.model.generate(
            **inputs, max_new_tokens=tokens, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        token_ids = output.sequences[0, inputs["input_ids"].shape[1] :].tolist()
        text = self.processor.tokenizer.decode(token_ids, skip_special_tokens=True).strip()
        return token_ids, torch.cat(output.logits).numpy(), text

    @torch.no_grad()
    def withdrawn(self, embeddings, is_visual, layer):
        """The last token's logits when visual tokens leave before a layer, written with transformers' own layers.

        embeddings: (tokens, width); is_visual: (tokens,) booleans. Nothing is cached, so a longer prompt is asked anew.
        """
        decoder = self.model.model.language_model
        hidden, positions = torch.tensor(embeddings)[None], torch.arange(len(embeddings))[None]
        stays = torch.tensor(~is_visual)
        for index, block in enumerate(decoder.layers):
            if index == layer:
                hidden, positions = hidden[:, stays], positions[:, stays]
            tokens = hidden.shape[1]
            mask = torch.full((1, 1, tokens, tokens), -torch.inf).triu(1)
            hidden = block(hidden, attention_mask=mask, position_embeddings=decoder.rotary_emb(hidden, positions))
        return self.model.lm_head(decoder.norm(hidden[:, -1]))[0].numpy()

    def embed(self, token_ids):
        """Embedded text, (tokens, width)."""
        return self.model.get_input_embeddings().weight.detach()[token_ids].numpy()


def is_path(image):
    return isinstance(image, str | pathlib.Path)
