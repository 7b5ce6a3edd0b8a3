"""tokenizer.json: looked through before the tokenizers library gets it, which runs what it says on every prompt.

What the published families' files hold is known here; the rest is refused by its name. Some of it would end the process
(a prefix of subwords that the merges lack), some never ends, and some answers by chance (dropout).
"""

import pathlib

from tokenizers import Tokenizer

from ..errors import InputError, tokenizing
from .fields import Fields
from .files import file_of, read_fields

# Part of the file -> (under which key a sequence holds its steps, the kinds of step that are known)
STEPS = {
    "normalizer": ("normalizers", "Prepend Replace NFC NFD NFKC NFKD Strip Lowercase"),
    "pre_tokenizer": ("pretokenizers", "ByteLevel Digits Split Metaspace Whitespace WhitespaceSplit Punctuation"),
    "post_processor": ("processors", "ByteLevel TemplateProcessing"),
    "decoder": ("decoders", "ByteLevel Replace ByteFallback Fuse Strip Metaspace"),
}
MOST_STEPS = 32  # of one part
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3 = QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
# What the steps that could make a text longer, try for ever or panic are given in published files: nothing else is run.
KNOWN = {
    ("Prepend", "prepend"): ("▁",),
    ("Replace", "pattern"): ({"String": " "}, {"String": "▁"}),
    ("Replace", "content"): (" ", "▁"),
    ("Strip", "start"): (None, 0, 1),
    ("Strip", "stop"): (None, 0),  # the library panics at a word that is shorter than the two
    ("Split", "pattern"): ({"Regex": GPT2}, {"Regex": QWEN2}, {"Regex": LLAMA3}),
}


def load_tokenizer(folder: pathlib.Path, extra_tokens: tuple[str, ...] | list[str] = ()) -> Tokenizer:
    """The tokenizer.json of a model folder, extended with those of `extra_tokens` that it lacks. Raises InputError."""
    path = file_of(folder, "tokenizer.json")
    if path is None:
        raise InputError(f"{folder} lacks tokenizer.json")
    check_tokenizer(read_fields(folder, "tokenizer.json"))
    with tokenizing(f"{path} is not a tokenizer"):
        tokenizer = Tokenizer.from_buffer(path.read_bytes())
        tokenizer.add_special_tokens(list(extra_tokens))
        tokenizer.no_padding()  # what a training run left in the file
        tokenizer.no_truncation()
    return tokenizer


def check_tokenizer(fields: Fields) -> None:
    """Raise InputError for a tokenizer.json that asks for what no published family does."""
    model = fields.section("model")
    model.choice("type", ("BPE",), "BPE")
    for key in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if model.raw(key) not in (None, "", 0):
            raise model.error(f"has a {key}, which no family here knows")
    for name, (inner, kinds) in STEPS.items():
        part = fields.section(name, {"type": "Sequence", inner: []})
        steps = listed(part, inner) if part.raw("type") == "Sequence" else [part]
        for step in steps:
            kind = step.choice("type", tuple(kinds.split()))
            for (known, key), values in KNOWN.items():
                if kind == known and step.raw(key) not in values:
                    raise step.error(f"has a {key} that no family here knows, {repr(step.raw(key))[:80]}")
        check_templates([step for step in dict.fromkeys([part, *steps]) if step.has("single")])


def check_templates(steps: list[Fields]) -> None:
    """Raise InputError for a template at which the library panics: one that puts a token which it does not describe, or a
    second text, and one after another. It takes for a template what has the keys of one, whatever its type.
    """
    for step in steps:
        described = step.section("special_tokens", {})
        for piece in listed(step, "single"):
            piece.section("Sequence", {}).choice("id", ("A",), "A")
            name = piece.section("SpecialToken", {}).text("id", "")
            if name and not described.has(name):
                raise step.error(f"puts {name[:80]!r}, which its special_tokens lack")
        if step is not steps[0]:
            raise step.error("is a template after another one")


def listed(fields: Fields, inner: str) -> list[Fields]:
    """The objects of a list of them."""
    values = fields.raw(inner)
    if not isinstance(values, list) or len(values) > MOST_STEPS:
        raise fields.error(f"must be a list of at most {MOST_STEPS} {inner}")
    return [Fields({"step": value}, f"{inner} of {fields.where}").section("step") for value in values]
