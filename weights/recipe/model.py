"""The model in plain PyTorch: CLIP's vision tower, LLaVA's connector, a Llama decoder; and how it is read from disk.

Modules are nested so that `Llava().state_dict()` already has the tensor names of a LLaVA checkpoint, and the numbers
equal those of `transformers.LlavaForConditionalGeneration`.
"""

import pathlib

import torch
import torch.nn.functional as F
from clip import VisionModel, VisionSizes
from llama import Decoder, TextSizes
from safetensors.torch import load_file
from torch import Tensor, nn

TOWER = "vision_tower.vision_model."


class Connector(nn.Module):
    """LLaVA's projector: features (batch, patches, vision width) -> visual tokens (batch, patches, text width)."""

    def __init__(self, vision: VisionSizes, text: TextSizes):
        super().__init__()
        self.linear_1 = nn.Linear(vision.hidden_size, text.hidden_size)
        self.linear_2 = nn.Linear(text.hidden_size, text.hidden_size)

    def forward(self, features: Tensor) -> Tensor:
        return self.linear_2(F.gelu(self.linear_1(features)))


class Llava(nn.Module):
    """Tower, connector and decoder under the tensor names of a LLaVA checkpoint; the head is tied to the embedding."""

    def __init__(self, vision: VisionSizes = VisionSizes(), text: TextSizes = TextSizes()):
        super().__init__()
        self.vision, self.text = vision, text
        self.vision_tower = nn.ModuleDict({"vision_model": VisionModel(vision)})
        self.multi_modal_projector = Connector(vision, text)
        self.language_model = nn.ModuleDict({"model": Decoder(text)})
        self.apply(initialise)
        initialise_residual(self.decoder)

    @property
    def tower(self) -> VisionModel:
        return self.vision_tower["vision_model"]

    @property
    def decoder(self) -> Decoder:
        return self.language_model["model"]

    def embed(self, token_ids: Tensor, features: Tensor, visual: slice) -> Tensor:
        """Token embeddings (batch, tokens, width), with the visual tokens of `features` at the run `visual`."""
        words, image = self.decoder.embed_tokens(token_ids), self.multi_modal_projector(features)
        return torch.cat([words[:, : visual.start], image, words[:, visual.stop :]], dim=1)

    def logits(self, hidden: Tensor) -> Tensor:
        """Of the last layer's output (batch, tokens, width): (batch, tokens, vocabulary)."""
        return self.decoder.norm(hidden) @ self.decoder.embed_tokens.weight.T


def initialise(module: nn.Module) -> None:
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        fan_in = module.weight[0].numel()
        nn.init.normal_(module.weight, std=fan_in**-0.5 * 0.7)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)


def initialise_residual(decoder: Decoder) -> None:
    """Let words be loud and layers silent at first, so that what a token is stays readable in the residual stream.

    Embeddings have the size 1 that every norm restores; what layers add starts at zero. The head is tied to these
    embeddings, so the last norm brings the logits back to a moderate size.
    """
    nn.init.normal_(decoder.embed_tokens.weight)
    nn.init.constant_(decoder.norm.weight, 0.05)
    for layer in decoder.layers:
        nn.init.zeros_(layer.self_attn.o_proj.weight)
        nn.init.zeros_(layer.mlp.down_proj.weight)


def load_checkpoint(path: pathlib.Path) -> Llava:
    """The model of a checkpoint of a stage, without the layer by which it pointed."""
    saved = torch.load(path, weights_only=True)["model"]
    model = Llava()
    model.load_state_dict({name: tensor for name, tensor in saved.items() if not name.startswith("pointer.")})
    return model


def load_exported(folder: pathlib.Path) -> Llava:
    """The model of a folder that export.py wrote."""
    model = Llava()
    model.load_state_dict({name: half.float() for name, half in load_file(folder / "model.safetensors").items()})
    return model


def exported_tower(folder: pathlib.Path) -> dict[str, Tensor]:
    """The tower's tensors of such a folder, under their own names."""
    weights = load_file(folder / "model.safetensors")
    return {name.removeprefix(TOWER): half.float() for name, half in weights.items() if name.startswith(TOWER)}
