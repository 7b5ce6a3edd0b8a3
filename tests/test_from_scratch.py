"""The tokenizer and the file format written out in docs/from_scratch/ do what the two libraries do."""

import json
import pathlib
import unicodedata

import numpy as np
import pytest
import safetensors
import safetensors.numpy
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from docs.from_scratch import bpe, tensors

from .doors import examples

ROOT = pathlib.Path(__file__).parent.parent
FILE = ROOT / "weights" / "minivtw-tiny" / "tokenizer.json"
LETTERED = FILE.read_bytes()
# Digits one by one, no template, not a token for every byte, some tokens that begin alike: as SmolLM2's file has it.
SPLIT = json.loads(LETTERED)
SPLIT["pre_tokenizer"] = {
    "type": "Sequence",
    "pretokenizers": [{"type": "Digits", "individual_digits": True}, SPLIT["pre_tokenizer"]],
}
SPLIT["post_processor"] = None
for letter in "Ãñé":
    SPLIT["model"]["vocab"].pop(bpe.LETTERS.get(ord(letter), letter), None)
SPLIT["model"]["merges"] = [
    pair for pair in SPLIT["model"]["merges"] if all(one in SPLIT["model"]["vocab"] for one in (*pair, "".join(pair)))
]
FILES = {"as shipped": LETTERED, "digits one by one": json.dumps(SPLIT).encode()}
PAIRS = {
    name: (bpe.Tokenizer.from_buffer(data), tokenizers.Tokenizer.from_buffer(data)) for name, data in FILES.items()
}
for pair in PAIRS.values():
    for one in pair:
        one.add_special_tokens(["<image>", "<image><image>", "<new>"])
EVERY = pytest.mark.parametrize("own, library", PAIRS.values(), ids=PAIRS)
# Which characters are letters depends on the version of Unicode: those that Unicode 3.2 knew are what they are.
STABLE = st.characters(exclude_categories=["Cs"]).filter(lambda one: unicodedata.ucd_3_2_0.category(one) != "Cn")
WORDS = st.sampled_from(
    [
        "What",
        "color",
        "is",
        "the",
        "star",
        "?",
        "'s",
        "'re",
        "'LL",
        "<s>",
        "<image>",
        "<image",
        "<new>",
        "12",
        "½",
        "²",
        "Ⅷ",
        "三",
        "ñ",
        "é",
        "🙂",
        "👩\u200d🚀",
        "_",
        "\xa0",
        "\u200b",
    ]
)
SPACES = st.text(" \t\n\r\x0b\x0c\x1c\x85\u2003\u3000", max_size=4)
TEXTS = st.lists(st.one_of(WORDS, SPACES, st.text(STABLE, max_size=6)), max_size=12).map("".join)


@EVERY
@examples(quick=60, deep=5000)
def test_a_text_has_the_library_s_tokens(own, library, examples):
    @settings(max_examples=examples)
    @given(text=TEXTS)
    @example(text="  two  blanks and\n\n a line,  \t ")
    @example(text="<s>USER: <image><image><image>\nIt's 1234 don't 'sss ASSISTANT:")
    @example(text="Ünïcödé 東京 한국어 עברית العربية हिन्दी ไทย")
    def check(text):
        for around in (True, False):
            ours, theirs = (one.encode(text, add_special_tokens=around) for one in (own, library))
            assert (ours.ids, ours.tokens) == (theirs.ids, theirs.tokens)

    check()


@EVERY
@examples(quick=60, deep=2000)
def test_tokens_have_the_library_s_text(own, library, examples):
    @settings(max_examples=examples)
    @given(ids=st.lists(st.integers(0, 500), max_size=12))
    def check(ids):
        for skips in (True, False):
            assert own.decode(ids, skips) == library.decode(ids, skip_special_tokens=skips)

    check()


@EVERY
def test_the_vocabulary_is_the_library_s(own, library):
    assert own.get_vocab_size() == library.get_vocab_size()
    for index in range(own.get_vocab_size() + 2):
        token = library.id_to_token(index)
        assert own.id_to_token(index) == token and (
            token is None or own.token_to_id(token) == library.token_to_id(token)
        )
    ours, theirs = (one.get_added_tokens_decoder() for one in (own, library))
    assert {index: (token.content, token.special) for index, token in theirs.items()} == dict(ours)
    assert own.token_to_id("no such token") is None


def test_every_character_is_cut_as_the_library_cuts_it():
    """Every 29th of those that have long been assigned, between a letter and a digit, and twice."""
    own, library = PAIRS["as shipped"]
    for code in range(0, 0x110000, 29):
        if unicodedata.ucd_3_2_0.category(chr(code)) not in ("Cn", "Cs", "Co"):
            text = f"a{chr(code)}1 {chr(code) * 2}  b"
            assert own.encode(text).ids == library.encode(text).ids, hex(code)


def test_a_tokenizer_of_another_kind_is_refused():
    other = json.loads(LETTERED) | {"pre_tokenizer": {"type": "Metaspace"}}
    with pytest.raises(ValueError, match="byte-level"):
        bpe.Tokenizer(other)


# --- safetensors


@pytest.mark.parametrize(
    "path", sorted(ROOT.rglob("*.safetensors")), ids=lambda path: f"{path.parent.name}/{path.name}"
)
def test_a_shipped_file_is_read_as_the_library_reads_it(path):
    with safetensors.safe_open(path, framework="numpy") as theirs, tensors.safe_open(path) as ours:
        assert set(ours.keys()) == set(theirs.keys())
        kinds = {theirs.get_slice(name).get_dtype() for name in theirs.keys()}  # noqa: SIM118
    if "BF16" not in kinds:  # which NumPy does not have
        ours, theirs = tensors.load_file(path), safetensors.numpy.load_file(path)
        assert all(
            np.array_equal(ours[name], theirs[name], equal_nan=array.dtype.kind == "f")
            for name, array in theirs.items()
        )


KINDS = st.sampled_from(["<f8", "<f4", "<f2", "<i8", "<i4", "<i2", "i1", "u1", "<u2", "<u4", "<u8", "?"])
SHAPES = arrays.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)
NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8).filter(
    lambda name: name != "__metadata__"
)
FILLED = st.dictionaries(NAMES, KINDS.flatmap(lambda kind: arrays.arrays(kind, SHAPES)), max_size=4)


METADATA = st.none() | st.dictionaries(st.text("abc", min_size=1), st.text("xyz ", max_size=9), min_size=1, max_size=2)


@settings(max_examples=60)
@given(filled=FILLED, metadata=METADATA)
def test_files_go_both_ways(filled, metadata):
    by_library = safetensors.numpy.save(filled, metadata if filled else None)  # 0.4 writes no JSON for metadata alone
    for written, read in ((tensors.save(filled, metadata), safetensors.numpy.load), (by_library, tensors.load)):
        back = read(written)
        assert back.keys() == filled.keys()
        for name, array in filled.items():
            assert (back[name].dtype, back[name].shape, back[name].tobytes()) == (
                array.dtype,
                array.shape,
                array.tobytes(),
            )


@settings(max_examples=30)
@given(data=st.data())
def test_a_damaged_file_is_refused_as_the_library_refuses_it(data):
    whole = safetensors.numpy.save({"a": np.arange(6, dtype=np.float32), "b": np.ones((2, 2), np.int8)})
    cut = data.draw(st.integers(0, len(whole) - 1))
    for broken in (whole[:cut], whole + bytes(1 + cut), b"\xff" * 8 + whole[8:], whole.replace(b'"F32"', b'"F64"')):
        for load, error in (
            (tensors.load, tensors.SafetensorError),
            (safetensors.numpy.load, safetensors.SafetensorError),
        ):
            with pytest.raises(error):
                load(broken)
