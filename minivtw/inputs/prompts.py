"""Text to token ids and back: the tokenizer, and where the visual tokens of each image stand in the prompt."""

import pathlib
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from ..errors import InputError

MARK = "<image>"  # where an image goes in a prompt


class Prompt(NamedTuple):
    """What the decoder is asked: tokens, and the tiles of the images that stand at the visual ones."""

    token_ids: np.ndarray  # (tokens,)
    is_visual: np.ndarray  # (tokens,) booleans
    tiles: np.ndarray | None  # (tiles, channels, height, width) float32


def load_tokenizer(folder, extra_tokens=()):
    """The tokenizer.json of a model folder, and behind its tokens the special ones that it lacks."""
    path = pathlib.Path(folder) / "tokenizer.json"
    if not path.is_file():
        raise InputError(f"{folder} lacks tokenizer.json")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the tokenizers library raises plain Exception
        raise InputError(f"{path} is not a tokenizer: {error}") from error
    tokenizer.add_special_tokens(list(extra_tokens))
    return tokenizer


def mark_images(text, images, mark):
    """The text with one mark an image: as the user placed them or, if they placed none, all of them first.

    mark: how the model's prompts mark an image before the text, such as "<image>\\n".
    """
    marks = text.count(MARK)
    if not text.replace(MARK, "").strip():
        raise InputError("the prompt is empty")
    if marks and marks != images:
        raise InputError(f"the prompt marks {marks} places for an image, but {images} images are given")
    return text if marks else mark * images + text


def expand_marks(text, expansions):
    """Each mark replaced by the text that stands for its image, one visual token's name for each visual token."""
    pieces = text.split(MARK)
    return pieces[0] + "".join(expansion + piece for expansion, piece in zip(expansions, pieces[1:], strict=True))


def encode(tokenizer, text, opens=True):
    """Token ids of a text, (tokens,) int64; `opens` adds what a text begins with, such as `<s>`."""
    return np.array(tokenizer.encode(text, add_special_tokens=opens).ids, np.int64)


def check_vocabulary(token_ids, vocabulary):
    """Raise InputError for a token that the decoder does not have."""
    if token_ids.max(initial=0) >= vocabulary:
        raise InputError(f"the tokenizer knows token {token_ids.max()}, but the decoder's vocabulary has {vocabulary}")


class TextStream:
    """Token ids to text, piece by piece: a character that takes several tokens appears when it is whole."""

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)

    def add(self, token_id):
        """The text that this token completes; often a word, sometimes nothing yet."""
        return self._stream.step(self._tokenizer, token_id) or ""
