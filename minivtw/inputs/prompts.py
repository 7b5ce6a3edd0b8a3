"""Text to token ids and back: the tokenizer, and where the visual tokens of each image stand in the prompt."""

from collections.abc import Iterable, Set
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

from ..errors import tokenizing

MARK = "<image>"  # where an image goes in a prompt


class Tiled(NamedTuple):
    """Images, cut to what a vision tower takes."""

    tiles: np.ndarray | None  # (tiles, channels, height, width) float32
    expansions: list[str]  # the text that stands for each image
    sizes: tuple[tuple[int, int], ...]  # (height, width) of each image


class Prompt(NamedTuple):
    """What goes into the decoder: tokens, and the tiles of the images that stand at the visual ones."""

    token_ids: np.ndarray  # (tokens,)
    is_visual: np.ndarray  # (tokens,) booleans
    tiles: np.ndarray | None  # (tiles, channels, height, width) float32
    sizes: tuple[tuple[int, int], ...] = ()  # (height, width) of each image


def expand_marks(text: str, expansions: list[str]) -> str:
    """Each mark replaced by the text that stands for its image, one visual token's name for each visual token."""
    pieces = text.split(MARK)
    return pieces[0] + "".join(expansion + piece for expansion, piece in zip(expansions, pieces[1:], strict=True))


def encode(tokenizer: Tokenizer, text: str, opens: bool = True) -> np.ndarray:
    """Token ids of a text, (tokens,) int64; `opens` adds what a text begins with, such as `<s>`.

    Llama's tokenizer puts a space before every text. Where a text goes on with one (`opens` False), that is the one.
    """
    with tokenizing("the tokenizer cannot read the prompt"):
        goes_on = not opens and text.startswith(" ")
        if goes_on and tokenizer.encode("a", add_special_tokens=False).tokens[0].startswith("▁"):
            text = text[1:]
        return np.array(tokenizer.encode(text, add_special_tokens=opens).ids, np.int64)


def spoken(tokenizer: Tokenizer, token_ids: Iterable[int], stop_ids: Set[int]) -> str:
    """The text of an answer's tokens, with the white space at its ends, and without special tokens.

    Docling's models answer in tags, which are special tokens: there only what ends an answer is left out.
    """
    tags = tokenizer.token_to_id("<loc_0>") is not None
    with tokenizing("the tokenizer cannot write the answer"):
        shown = [token for token in token_ids if not tags or token not in stop_ids]
        return tokenizer.decode(shown, skip_special_tokens=not tags)
