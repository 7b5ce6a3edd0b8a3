"""transformers as the reference for LLaVA-OneVision: random models of the family, and what they compute.

Its processor wants more packages, for videos; here its image processor and its count of tokens are put together.
"""

import numpy as np
import torch
from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

from tests.reference import qwen2_tokenizer, randomise, write_json


def build(folder, vision, text, most_a_side, ratio=9, seed=0, dtype="float32"):
    """Write a random model's folder; pictures of 1 to `most_a_side` tiles a side."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer, side = qwen2_tokenizer(), vision["image_size"]
    tokenizer.save(str(folder / "tokenizer.json"))
    pinpoints = [
        [side * rows, side * columns] for rows in range(1, most_a_side + 1) for columns in range(1, most_a_side + 1)
    ]
    config = LlavaOnevisionConfig(
        vision_config=vision,
        text_config={**text, "vocab_size": tokenizer.get_vocab_size() + 3},
        image_token_index=tokenizer.token_to_id("<image>"),
        image_grid_pinpoints=pinpoints,
        vision_aspect_ratio=f"anyres_max_{ratio}",
    )
    model = LlavaOnevisionForConditionalGeneration(config)
    randomise(model, seed)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    pixels = {"size": {"height": side, "width": side}, "image_grid_pinpoints": pinpoints}
    levels = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "do_center_crop": False}
    write_json(folder / "preprocessor_config.json", {**pixels, **levels})


class Reference:
    """A model folder in transformers, float32."""

    def __init__(self, folder):
        self.model = LlavaOnevisionForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
        self.tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
        self.pixels = LlavaOnevisionImageProcessorPil.from_pretrained(folder)
        config = self.model.config
        self.counts = LlavaOnevisionProcessor.__new__(LlavaOnevisionProcessor)
        self.counts.image_processor, self.counts.vision_aspect_ratio = self.pixels, config.vision_aspect_ratio
        self.counts.num_image_tokens = (config.vision_config.image_size // config.vision_config.patch_size) ** 2

    def inputs(self, images, question):
        """What the processor makes of Pillow images and a question, asked in ChatML."""
        side, texts = self.pixels.size["height"], []
        for image in images:
            texts.append("<image>" * self.counts._get_number_of_features(image.height, image.width, side, side) + "\n")
        text = f"<|im_start|>user\n{''.join(texts)}{question}<|im_end|>\n<|im_start|>assistant\n"
        seen = self.pixels(images=images, return_tensors="pt")
        return {
            "input_ids": self.tokenizer(text, return_tensors="pt")["input_ids"],
            "pixel_values": seen["pixel_values"],
            "image_sizes": torch.stack([torch.as_tensor(size) for size in seen["image_sizes"]]),
        }

    def tiles(self, inputs):
        """The tiles of all images, without those that fill a batch up."""
        from transformers.models.llava_onevision.modeling_llava_onevision import image_size_to_num_patches

        counts = [
            image_size_to_num_patches(size, self.model.config.image_grid_pinpoints, self.pixels.size["height"])
            for size in inputs["image_sizes"]
        ]
        return np.concatenate(
            [tiles[:count] for tiles, count in zip(inputs["pixel_values"].numpy(), counts, strict=True)]
        )

    @torch.no_grad()
    def greedy(self, inputs, tokens):
        """Greedy token ids, and the logits each was chosen from (ids, vocabulary)."""
        output = self.model.generate(
            **inputs, max_new_tokens=tokens, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        return output.sequences[0, inputs["input_ids"].shape[1] :].tolist(), torch.cat(output.logits).numpy()
