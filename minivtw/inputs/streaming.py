"""An answer's text while its tokens come, one by one."""

import re
from collections.abc import Set

from tokenizers import Tokenizer

from .prompts import spoken

BYTE = re.compile(r"<0x[0-9A-F]{2}>")  # Llama's tokens for what its vocabulary has no other token for


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
