"""transformers as the reference for SmolVLM: small random models of the family, and what they compute, layer by layer.

Needs torch and transformers. `record.py` writes down what this file computes; the live tests compare with it directly.
"""

import json
from typing import NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3Processor,
    PreTrainedTokenizerFast,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil
from transformers.models.smolvlm.processing_smolvlm import DEFAULT_CHAT_TEMPLATE

from tests.reference import CORPUS, randomise, write_json

from .conversation import conversation_messages

CLASSES = {
    "idefics3": (Idefics3Config, Idefics3ForConditionalGeneration, Idefics3ImageProcessorPil),
    "smolvlm": (SmolVLMConfig, SmolVLMForConditionalGeneration, SmolVLMImageProcessorPil),
}
TILE_TOKENS = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
LATER_SPECIAL = ["<global-img>", *TILE_TOKENS, "<fake_token_around_image>", "<image>", "<end_of_utterance>"]


class Variant(NamedTuple):
    """One random SmolVLM: its configs, its image processor's settings, and how its files are written."""

    name: str
    model_type: str
    vision: dict
    text: dict
    scale_factor: int
    pixels: dict
    dtype: str = "float32"
    tied: bool = False
    seed: int = 0


def tower(**changes):
    """A small SigLIP's config."""
    sizes = dict(
        image_size=32, patch_size=8, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=3
    )
    return {**sizes, **changes}


def llama(**changes):
    """A small Llama decoder's config."""
    sizes = dict(
        hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2
    )
    return {
        "model_type": "llama",
        **sizes,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e5,
        "max_position_embeddings": 1024,
        **changes,
    }


def tiles(side, longest_edge, **changes):
    return {"max_image_size": {"longest_edge": side}, "size": {"longest_edge": longest_edge}, **changes}


RECORDED = (
    Variant("idefics3-tiles", "idefics3", tower(), llama(), 2, tiles(32, 128), seed=11),
    Variant(
        "idefics3-whole", "idefics3", tower(), llama(), 4, tiles(32, 128, do_image_splitting=False), "float16", True, 12
    ),
    # A tile of 6 x 6 patches on a table of 4 x 4 positions; and a longest edge that is no multiple of the tile.
    Variant(
        "smolvlm-tiles", "smolvlm", tower(image_size=28, patch_size=7), llama(), 3, tiles(42, 100), "bfloat16", seed=13
    ),
)


def byte_tokenizer():
    """Like SmolVLM's: byte-level, the marks of a chat first, those of the tiles last."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([CORPUS, "User: Assistant: user assistant Question: Answer:\n\n"], trainer)
    return tokenizer


def build(variant, folder):
    """Write a variant's Hugging Face folder: config, weights, tokenizer, image processor."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens(LATER_SPECIAL)
    tokenizer.save(str(folder / "tokenizer.json"))
    config_class, model_class, pixels_class = CLASSES[variant.model_type]
    config = config_class(
        vision_config=variant.vision,
        text_config={"vocab_size": tokenizer.get_vocab_size() + 3, **variant.text, "tie_word_embeddings": variant.tied},
        scale_factor=variant.scale_factor,
        image_token_id=tokenizer.token_to_id("<image>"),
        tie_word_embeddings=variant.tied,
    )
    model = model_class(config)
    randomise(model, variant.seed)
    model.to(getattr(torch, variant.dtype)).save_pretrained(folder)
    write_json(folder / "generation_config.json", {"eos_token_id": tokenizer.token_to_id("<end_of_utterance>")})
    # SmolVLM's own files have preprocessor_config.json; transformers 5 saves the same inside processor_config.json.
    settings = pixels_class(**variant.pixels).to_dict()
    if variant.seed % 2:
        write_json(folder / "preprocessor_config.json", settings)
    else:
        write_json(folder / "processor_config.json", {"image_processor": settings})


class Reference:
    """A model folder in transformers, float32, with attention that shows its probabilities."""

    def __init__(self, folder, attention="eager"):
        model_type = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]
        _, model_class, pixels_class = CLASSES[model_type]
        self.tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
        self.model = model_class.from_pretrained(folder, dtype=torch.float32, attn_implementation=attention).eval()
        # SmolVLM's own processor adds videos, for which it wants more packages; the two are otherwise the same.
        config, named = self.model.config, folder / "preprocessor_config.json"
        settings = (
            json.loads(named.read_text(encoding="utf-8"))
            if named.exists()
            else json.loads((folder / "processor_config.json").read_text(encoding="utf-8"))
        )
        settings = settings.get("image_processor", settings)
        side = settings["max_image_size"]["longest_edge"] // config.vision_config.patch_size
        pixels = pixels_class(**{key: value for key, value in settings.items() if key != "image_processor_type"})
        self.processor = Idefics3Processor(pixels, self.tokenizer, image_seq_len=(side // config.scale_factor) ** 2)
        self.image_token_id = config.image_token_id
        self.end_token_id = self.tokenizer.convert_tokens_to_ids("<end_of_utterance>")

    def inputs(self, images, *turns):
        """What the processor makes of Pillow images and a conversation: (token_ids, tiles or None)."""
        text = self.tokenizer.apply_chat_template(
            conversation_messages(len(images), turns),
            chat_template=DEFAULT_CHAT_TEMPLATE,
            tokenize=False,
            add_generation_prompt=True,
        )
        made = self.processor(images=images or None, text=text, return_tensors="pt")
        return made["input_ids"][0].numpy(), made["pixel_values"][0] if images else None

    @torch.no_grad()
    def prefill(self, token_ids, tiles):
        """Every array between the pixels and the last token's logits; the attention only if the model shows it."""
        inner = self.model.model
        arrays, handles = {"vision.pixels": tiles}, []

        def record(name, module, part=0):
            seen = lambda _, given, output: arrays.update({name: output[part] if isinstance(output, tuple) else output})
            handles.append(module.register_forward_hook(seen))

        record("vision.embeddings", inner.vision_model.embeddings)
        record("vision.features", inner.vision_model.post_layernorm)
        record("connector.output", inner.connector)
        for part, layers in (("vision", inner.vision_model.encoder.layers), ("decoder", inner.text_model.layers)):
            for index, layer in enumerate(layers):
                record(f"{part}.layers.{index}.attention", layer.self_attn, 1)
                record(f"{part}.layers.{index}.hidden", layer)
        first = inner.text_model.layers[0]
        seen = lambda _, given, named: arrays.update(
            {"decoder.embeddings": given[0] if given else named["hidden_states"]}
        )
        handles.append(first.register_forward_pre_hook(seen, with_kwargs=True))
        logits = self.model(input_ids=torch.tensor(token_ids)[None], pixel_values=tiles[None]).logits
        for handle in handles:
            handle.remove()
        arrays["connector.output"] = arrays["connector.output"].flatten(0, 1)[None]  # tiles follow each other
        arrays["decoder.logits"] = logits[:, -1]
        shown = {name: array for name, array in arrays.items() if array is not None}
        return {name: (array if name.startswith("vision.") else array[0]).numpy() for name, array in shown.items()}

    @torch.no_grad()
    def embeddings(self, token_ids, tiles):
        """The decoder's input, (tokens, width)."""
        hidden = self.model.get_input_embeddings()(torch.tensor(token_ids)).clone()
        if tiles is not None:
            features = self.model.model.get_image_features(tiles[None]).pooler_output
            hidden[torch.tensor(token_ids) == self.image_token_id] = torch.cat(features)
        return hidden

    @torch.no_grad()
    def last_logits(self, hidden, stays, withdraw_layer, last=1):
        """The last tokens' logits (last, vocabulary) when those that do not stay leave before a layer."""
        text = self.model.model.text_model
        hidden, positions = hidden[None], torch.arange(len(hidden))[None]
        for index, layer in enumerate(text.layers):
            if index == withdraw_layer:
                hidden, positions = hidden[:, stays], positions[:, stays]
            tokens = hidden.shape[1]
            mask = torch.full((1, 1, tokens, tokens), -torch.inf).triu(1)
            hidden = layer(hidden, attention_mask=mask, position_embeddings=text.rotary_emb(hidden, positions))
        return self.model.lm_head(text.norm(hidden[0, -last:])).numpy()

    def embed(self, token_ids):
        return self.model.get_input_embeddings().weight.detach()[torch.tensor(token_ids)]

    def levels(self, tiles):
        """Pixel values back to levels from 0 to 255, which is what there is to know of them."""
        return np.round((np.asarray(tiles) * 0.5 + 0.5) * 255).astype(np.uint8)


def greedy(reference, token_ids, tiles, tokens, withdraw_layer=None):
    """Greedy token ids and the logits each was chosen from (ids, vocabulary), each recomputed from the start."""
    hidden = reference.embeddings(token_ids, tiles)
    stays = torch.tensor(token_ids != reference.image_token_id)
    said, steps = [], []
    while len(said) < tokens and (not said or said[-1] != reference.end_token_id):
        steps.append(reference.last_logits(hidden, stays, withdraw_layer)[0])
        said.append(int(steps[-1].argmax()))
        hidden = torch.cat([hidden, reference.embed(said[-1:])])
        stays = torch.cat([stays, torch.ones(1, dtype=torch.bool)])
    return said, np.stack(steps)


def fractional_places(patches, places):
    """The place of each of a tile's rows of patches in transformers' own table look-up."""
    from transformers.models.idefics3.configuration_idefics3 import Idefics3VisionConfig
    from transformers.models.idefics3.modeling_idefics3 import Idefics3VisionEmbeddings

    embeddings = Idefics3VisionEmbeddings(Idefics3VisionConfig(hidden_size=1, image_size=places, patch_size=1))
    with torch.no_grad():
        embeddings.patch_embedding.weight.zero_(), embeddings.patch_embedding.bias.zero_()
        embeddings.position_embedding.weight.copy_(torch.arange(places**2)[:, None])
        found = embeddings(torch.zeros(1, 3, patches, patches), torch.ones(1, patches, patches, dtype=torch.bool))
    return found[0, :patches, 0].int().tolist()  # the first row of patches: its columns
