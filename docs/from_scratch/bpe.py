"""A byte-level BPE tokenizer (GPT-2's kind: Sennrich et al. 2016, arXiv 1508.07909; Radford et al. 2019), in plain Python.

It reads the tokenizer.json of the shipped models and answers as the `tokenizers` library does, which the package uses;
where that library cannot run, as in a browser, this takes its place. tests/test_from_scratch.py compares the two.
"""

import functools
import itertools
import json
import re
import unicodedata
from collections.abc import Iterable, Iterator
from types import SimpleNamespace
from typing import NamedTuple


def byte_letters() -> dict[int, str]:
    """A letter for each byte: its own where that can be printed, else one from 256 on. So no token holds white space."""
    printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printed]
    return {byte: chr(byte) for byte in printed} | {byte: chr(256 + i) for i, byte in enumerate(others)}


LETTERS = byte_letters()
BYTES = {letter: byte for byte, letter in LETTERS.items()}
# GPT-2's pattern: contractions, then words, numbers, and anything else, each with the blank before it; of several
# blanks the last goes with the word after them. The second pattern reads what `kinds` makes of a text.
CONTRACTION = re.compile("'(?:s|t|re|ve|m|ll|d)")
WORD = re.compile(" ?L+| ?N+| ?o+|[ s]+(?![^ s])|[ s]+")


@functools.cache
def kind(character: str) -> str:
    """L(etter), N(umber), the blank, other white s(pace) or o(ther), as Unicode has it: `\\p{L}`, `\\p{N}`, `\\s`."""
    category = unicodedata.category(character)[0]
    if character == " " or category in "LN":
        return character if character == " " else category
    return "s" if category == "Z" or character in "\t\n\v\f\r\x85" else "o"


def words_of(text: str, single_digits: bool = False) -> Iterator[str]:
    """Cut a text into the words that are tokenized one by one; single_digits: each digit is one, and no blank with it."""
    kinds = "".join(map(kind, text))
    for part in re.finditer("N|[^N]+", kinds) if single_digits else re.finditer(".+", kinds):
        start, stop = part.span()
        while start < stop:
            found = CONTRACTION.match(text, start, stop) or WORD.match(kinds, start, stop)
            assert found  # one of them takes any character
            yield text[start : found.end()]
            start = found.end()


class AddedToken(NamedTuple):
    content: str
    special: bool


class Encoding(NamedTuple):
    ids: list[int]
    tokens: list[str]


class Tokenizer:
    """Text to token ids and back: as much of `tokenizers.Tokenizer` as the package calls."""

    def __init__(self, content: dict) -> None:
        model, steps = content["model"], content["pre_tokenizer"]
        steps = steps["pretokenizers"] if steps["type"] == "Sequence" else [steps]
        if content["normalizer"] or {step["type"] for step in steps} - {"Digits", "ByteLevel"}:
            raise ValueError("only byte-level tokenizers without a normalizer are read here")
        self.model = SimpleNamespace(unk_token=None)
        self.vocabulary: dict[str, int] = dict(model["vocab"])
        pairs = (tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"])
        self.ranks = {pair: rank for rank, pair in enumerate(pairs)}  # learned earlier: merged earlier
        self.single_digits = steps[0]["type"] == "Digits"
        self.template = (content["post_processor"] or {}).get("single", [{"Sequence": {"id": "A"}}])
        self.added: dict[int, AddedToken] = {}
        for token in content["added_tokens"]:
            self.add(token["content"], token["special"])

    @classmethod
    def from_buffer(cls, data: bytes) -> "Tokenizer":
        return cls(json.loads(data))

    @classmethod
    def from_file(cls, path: str) -> "Tokenizer":
        with open(path, "rb") as file:
            return cls.from_buffer(file.read())

    def add(self, content: str, special: bool = True) -> None:
        """A token that is looked for in a text before anything else."""
        index = self.vocabulary.setdefault(content, len(self.vocabulary))
        self.added[index] = AddedToken(content, special)
        self.tokens = {index: token for token, index in self.vocabulary.items()}
        longest_first = sorted((token.content for token in self.added.values()), key=len, reverse=True)
        self.marks = re.compile(f"({'|'.join(map(re.escape, longest_first))})")

    def merged(self, word: str) -> list[str]:
        """Begin with the bytes that have a token; join the neighbours that were learned first, until none were."""
        parts = [LETTERS[byte] for byte in word.encode() if LETTERS[byte] in self.vocabulary]
        while len(parts) > 1:
            ranks = [self.ranks.get(pair, len(self.ranks)) for pair in itertools.pairwise(parts)]
            best = min(ranks)
            if best == len(self.ranks):
                break
            first = ranks.index(best)
            parts[first : first + 2] = [parts[first] + parts[first + 1]]
        return parts

    def pieces(self, text: str) -> Iterator[str]:
        """The tokens of a text, without what the template puts around it."""
        for i, part in enumerate(self.marks.split(text) if self.added else [text]):
            if i % 2:  # a mark
                yield part
            else:
                for word in words_of(part, self.single_digits):
                    yield from self.merged(word)

    def encode(self, text: str, add_special_tokens: bool = True) -> Encoding:
        names = [step["SpecialToken"]["id"] if "SpecialToken" in step else None for step in self.template]
        around = [name for name in names if add_special_tokens or name is None]
        tokens = [token for name in around for token in (self.pieces(text) if name is None else [name])]
        return Encoding([self.vocabulary[token] for token in tokens], tokens)

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        skipped = {index for index, token in self.added.items() if token.special and skip_special_tokens}
        text = "".join(self.tokens.get(index, "") for index in ids if index not in skipped)
        return bytes(BYTES[letter] for letter in text).decode(errors="replace")

    def add_special_tokens(self, tokens: list[str]) -> None:
        for token in tokens:
            self.add(token)

    def no_padding(self) -> None: ...

    def no_truncation(self) -> None: ...

    def get_added_tokens_decoder(self) -> dict[int, AddedToken]:
        return self.added

    def get_vocab_size(self) -> int:
        return len(self.vocabulary)

    def token_to_id(self, token: str) -> int | None:
        return self.vocabulary.get(token)

    def id_to_token(self, index: int) -> str | None:
        return self.tokens.get(index)
