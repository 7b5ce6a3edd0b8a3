"""What every family hands over: the parts of a model, and the few things that only the family knows how to do."""

from collections.abc import Callable
from dataclasses import dataclass

from ..model.decoder import Decoder
from ..model.vision import Vision
from .layouts import Layout


@dataclass(frozen=True)
class VisionParts:
    """How a model sees: the picture cut to tiles, the encoder, the connector."""

    encoder: Vision
    connect: Callable  # features of a tile (features, vision width) -> its visual tokens (visual tokens, decoder width)
    tile: Callable  # (Pillow RGB images, most tiles an image or None)
    # -> (tiles (tiles, 3, height, width) float32, for each image the text that stands for it)
    image_token: str = "<image>"  # the token that marks the place of a visual token …
    image_token_id: int | None = None  # … and its id, if the config tells it; the tokenizer must agree
    # (visual tokens of each tile, (height, width) of each image, most tiles) -> visual tokens; None: as they come
    pack: Callable | None = None


@dataclass(frozen=True)
class Parts:
    """A decoder, the parts that see if there are any, and how a conversation is written down."""

    decoder: Decoder
    layout: Layout
    vision: VisionParts | None = None
    extra_tokens: tuple[str, ...] = ()  # special tokens that follow those of the tokenizer's file
    tokenizer: str | None = None  # the model whose tokenizer this one uses, where its own folder has none
