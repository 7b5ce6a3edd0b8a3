"""What a prompt may not say: the model's own marks, tokens that the decoder does not have, and more than can be read.

`<image>` marks where an image goes; the word itself is written `\\<image>`.
"""

import re
from collections.abc import Iterable

import numpy as np
from tokenizers import Tokenizer

from ..errors import InputError
from .prompts import MARK, encode

MOST_CHARACTERS = 500_000  # of a prompt, before its tokens are counted
INSIDE = "\N{WORD JOINER}"  # stands in `<image>` where the word is meant
WORD = MARK.replace("<", f"<{INSIDE}")
# Docling's instructions have these marks: places on a page, kinds of answers.
SAYABLE = re.compile(r"<(loc_\d+|otsl|chart|code|formula)>")


def refuse_marks(text: str, tokenizer: Tokenizer, marks: Iterable[str] = ()) -> None:
    """Raise InputError for words that would become one of the model's own marks: a turn, an end, a tile.

    marks: those of the layout, which some tokenizers do not call special. `<image>` is not looked at: it says where an
    image goes. What is not text, or too long a text to be looked at, is an error, too. Turns in plain words, such as
    USER: and ASSISTANT: in LLaVA 1.5, are words like any other: they can be said, and read as turns.
    """
    if not isinstance(text, str):
        raise InputError(f"a prompt is text, not an object of type {type(text).__name__}")
    if len(text) > MOST_CHARACTERS:
        raise InputError(f"the prompt is {len(text):,} characters long; at most {MOST_CHARACTERS:,} are read")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError("the prompt is not UTF-8 text") from error
    words, unknown = text.replace(MARK, ""), getattr(tokenizer.model, "unk_token", None)
    said = frozenset(encode(tokenizer, words, opens=False).tolist())  # some tokenizers change the text before they look
    added = tokenizer.get_added_tokens_decoder().items()
    own: dict[str, int | None] = {token.content: index for index, token in added if token.special}
    own |= {mark: tokenizer.token_to_id(mark) for mark in marks}
    for mark, index in own.items():
        if (mark in words or (index in said and mark != unknown)) and not SAYABLE.fullmatch(mark):
            raise InputError(f"the prompt says {mark}, which is a mark of the model's own and cannot be said")


def with_words(text: str) -> str:
    """What a user typed, with each `\\<image>` as WORD, which marks no place for an image."""
    return text.replace(f"\\{MARK}", WORD)


def encode_words(tokenizer: Tokenizer, text: str, opens: bool) -> np.ndarray:
    """`encode` for a text with WORDs: each is cut inside, so that the tokenizer does not take it for its mark.

    A piece is read after a line break, as no word goes on over one, and the break's own tokens are dropped.
    """
    first, *pieces = re.split(f"(?<=<){INSIDE}(?={MARK[1:]})", text)
    goes_on = lambda piece: encode(tokenizer, f"\n{piece}", opens=False)[len(encode(tokenizer, "\n", opens=False)) :]
    return np.concatenate([encode(tokenizer, first, opens), *map(goes_on, pieces)])  # (tokens,)


def check_vocabulary(token_ids: np.ndarray, vocabulary: int) -> None:
    """Raise InputError for a token that the decoder does not have."""
    if token_ids.max(initial=0) >= vocabulary:
        raise InputError(f"the tokenizer knows token {token_ids.max()}, but the decoder's vocabulary has {vocabulary}")
