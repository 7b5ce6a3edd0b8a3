"""Text to token ids and back: the tokenizer, and where the visual tokens of each image stand in the prompt."""

import re
from collections.abc import Iterable, Set
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

from ..errors import tokenizing

MARK = "<image>"  # where an image goes in a prompt
BYTE = re.compile(r"<0x[0-9A-F]{2}>")  # Llama's tokens for what its vocabulary has no other token for


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


class TextStream:
    """Token ids to text, piece by piece: a character that takes several tokens appears when it is whole.

    All pieces together are what `spoken` makes of all tokens. It is decoded anew for each: what a run of Llama's bytes
    means, for example, is open until it ends.
    """

    def __init__(self, tokenizer: Tokenizer, stop_ids: Set[int] = frozenset()) -> None:
        self._tokenizer, self._stop_ids = tokenizer, stop_ids
        self._token_ids: list[int] = []
        self._given = 0  # characters

    def add(self, token_id: int) -> str:
        """The text that this token completes; often a word, sometimes nothing yet."""
        self._token_ids.append(token_id)
        is_byte = BYTE.fullmatch(self._tokenizer.id_to_token(token_id) or "")
        return "" if is_byte or not spoken(self._tokenizer, [token_id], self._stop_ids) else self._more("\ufffd")

    def end(self) -> str:
        """What was held back when the answer ended."""
        return self._more()

    def _more(self, unfinished: str | tuple[()] = ()) -> str:
        text = spoken(self._tokenizer, self._token_ids, self._stop_ids)
        start, self._given = self._given, self._given if text.endswith(unfinished) else len(text)
        return text[start : self._given]
