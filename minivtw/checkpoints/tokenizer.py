"""tokenizer.json: looked through before the tokenizers library gets it, which runs what it says on every prompt.

What the published families' files hold is known here; the rest is refused by its name. Some of it would end the process
(a prefix of subwords that the merges lack), some never ends, and some answers by chance (dropout).
"""

import pathlib
import re

from tokenizers import Tokenizer

from ..errors import InputError
from ..inputs.tokenizing import tokenizing
from .fields import Fields
from .files import file_of, read_json

NORMALIZERS = ("Sequence", "Prepend", "Replace", "NFC", "NFD", "NFKC", "NFKD", "Strip", "Lowercase")
PRE_TOKENIZERS = (
    "Sequence",
    "ByteLevel",
    "Digits",
    "Split",
    "Metaspace",
    "Whitespace",
    "WhitespaceSplit",
    "Punctuation",
)
POST_PROCESSORS = ("Sequence", "ByteLevel", "TemplateProcessing")
DECODERS = ("Sequence", "ByteLevel", "Replace", "ByteFallback", "Fuse", "Strip", "Metaspace")
# Part of the file -> (the kinds that are known, under which key a sequence holds its own)
STEPS = {
    "normalizer": (NORMALIZERS, "normalizers"),
    "pre_tokenizer": (PRE_TOKENIZERS, "pretokenizers"),
    "post_processor": (POST_PROCESSORS, "processors"),
    "decoder": (DECODERS, "decoders"),
}
MOST_STEPS = 32  # of one part
MOST_GROWTH = 16  # times as long as it was, a text may become
REPEATED_GROUP = re.compile(r"\)[*+{]")  # in a regular expression: what may try for ever


def load_tokenizer(folder: pathlib.Path, extra_tokens: tuple[str, ...] | list[str] = ()) -> Tokenizer:
    """The tokenizer.json of a model folder, and behind its tokens the special ones that it lacks. Raises InputError."""
    path = file_of(folder, "tokenizer.json")
    if path is None:
        raise InputError(f"{folder} lacks tokenizer.json")
    check(Fields(read_json(folder, "tokenizer.json"), str(path)))
    with tokenizing(f"{path} is not a tokenizer"):
        tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8"))
        tokenizer.add_special_tokens(list(extra_tokens))
        tokenizer.no_padding()  # what a training run left in the file
        tokenizer.no_truncation()
    return tokenizer


def check(fields: Fields) -> None:
    """Raise InputError for a tokenizer.json that asks for what no published family does."""
    model = fields.part("model")
    model.choice("type", ("BPE",), "BPE")
    for key in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if model.raw(key) not in (None, "", 0):
            raise model.error(f"has a {key}, which no family here knows")
    vocabulary, unknown = model.part("vocab"), model.text("unk_token", "")
    if unknown and not vocabulary.has(unknown):
        raise model.error(f"has an unk_token that is not in its vocabulary, {unknown[:80]!r}")
    for name, (kinds, inner) in STEPS.items():
        steps = steps_of(fields.part(name, {}), kinds, inner)
        growth = 1.0
        for step in steps:
            growth *= grows(step)
            if step.raw("type") == "TemplateProcessing":
                check_template(step)
        if len(steps) > MOST_STEPS or growth > MOST_GROWTH:
            raise fields.error(f"has a {name} that makes a text too long, or takes too many steps")


def check_template(step: Fields) -> None:
    """Raise InputError for a template that puts a token which it does not describe: the library panics at it."""
    described = step.part("special_tokens", {})
    for key in ("single", "pair"):
        pieces = step.raw(key)
        for piece in pieces if isinstance(pieces, list) else []:
            token = piece.get("SpecialToken") if isinstance(piece, dict) else None
            name = token.get("id") if isinstance(token, dict) else None
            if isinstance(name, str) and not described.has(name):
                raise step.error(f"puts {name[:80]!r}, which its special_tokens lack")


def steps_of(fields: Fields, kinds: tuple[str, ...], inner: str, depth: int = 0) -> list[Fields]:
    """A part of tokenizer.json as its steps one after the other."""
    kind = fields.choice("type", kinds, "")
    if kind != "Sequence":
        return [fields] if kind else []
    values = fields.raw(inner)
    if not isinstance(values, list) or len(values) > MOST_STEPS or depth > 2:
        raise fields.error(f"must be a list of at most {MOST_STEPS} {inner}, not nested in each other")
    parts = [Fields({"step": value}, f"{inner} of {fields.where}").part("step") for value in values]
    return [step for part in parts for step in steps_of(part, kinds, inner, depth + 1)]


def grows(step: Fields) -> float:
    """How many times as long a step may make a text of a character."""
    pattern = step.part("pattern", {})
    if REPEATED_GROUP.search(pattern.text("Regex", "")):
        raise step.error("repeats a group in a regular expression, which may take for ever")
    added = step.text("content", "") if pattern.has("String") or pattern.has("Regex") else ""
    return max(len(added) / max(len(pattern.text("String", "")), 1), 1) + len(step.text("prepend", ""))
