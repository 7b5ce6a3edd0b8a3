"""Hostile model folders by the thousand: whatever is changed in a file, the model answers or says in one line why not.

What is drawn knows the formats: a change is a value of a config, an entry of a safetensors header, a step of a tokenizer,
so that it reaches what reads it and does not end at the first brace. Memory is bounded: whoever takes what a config
promises, and a file does not hold, fails.
"""

import collections
import contextlib
import copy
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from minivtw import InputError, load
from minivtw.checkpoints.checkpoint import Headers
from minivtw.checkpoints.files import read_fields
from minivtw.checkpoints.tokenizer import QWEN2, load_tokenizer
from minivtw.inputs.prompts import encode, spoken
from minivtw.loading import assembled
from tests.doors import bounded_memory, copied, examples
from tests.families.test_families import GOLDEN as FAMILIES
from tests.test_hostile_folders import CLIP, FIRST, LATER, NOT_PART, SHARDS, SIGLIP, TILES

BASES = (CLIP, SIGLIP, SHARDS, FIRST, LATER, TILES, FAMILIES / "idefics3-whole")
GONE = object()
ODD = [
    GONE, None, -1, 0, 1, 2, 3, 4, 5, 7, 8, 12, 16, 64, 1000, 4096, 10**5, 10**7, 10**9, 2**31, 2**63, 10**30, 10**400,
    0.5, 2.0, -1e-5, 1e308, 1e-320, float("nan"), float("inf"), "", "x", "\ud800", "a\0b", "a\nb", "x" * 5000, [], [1],
    [1, 2, 3], [[4, 4]], ["x", None], [[]], {}, {"a": 1}, {"type": "x"}, True, False,
]  # fmt: skip
PICTURES = [Image.new("RGB", size, "red") for size in ((70, 40), (3, 300))]
TRIED = collections.Counter()  # (class, outcome) -> cases; a deep run prints it


def paths(value, at=()):
    """The place of every value of a JSON value, as the keys that lead there."""
    yield at
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in inner:
        yield from paths(part, (*at, key))


def put(value, at, new):
    """A copy of a JSON value with one place replaced, or gone."""
    if not at:
        return {} if new is GONE else new
    value = copy.copy(value)
    if new is GONE and len(at) == 1:
        del value[at[0]]
    else:
        value[at[0]] = put(value[at[0]], at[1:], new)
    return value


def changes(content, odd):
    """A strategy: JSON content with one or two values replaced; rarely a damaged text. Gives the bytes."""
    places = collections.defaultdict(list)
    for place in paths(content):
        places[place[:1]].append(place)  # chosen first, so that a long list, such as a vocabulary, does not draw all
    place = st.sampled_from(sorted(places)).flatmap(lambda top: st.sampled_from(places[top]))
    damage = st.none() | st.tuples(st.floats(0, 1), st.sampled_from(["", "[" * 5000, '"', "9" * 5000]))

    def changed(case):
        replaced, rarely, damaged = case
        new = content
        for at, value in replaced:
            with contextlib.suppress(LookupError, TypeError):  # an earlier change has taken this place away
                new = put(new, at, value)
        text = json.dumps(new)
        if rarely == 0 and damaged:
            middle = int(damaged[0] * len(text))
            text = text[:middle] + damaged[1] + text[middle + 3 :]
        return text.encode()

    pairs = st.lists(st.tuples(place, odd), min_size=1, max_size=2)
    return st.tuples(pairs, st.integers(0, 20), damage).map(changed)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Copies of recorded models, to be changed and put back."""
    folder = tmp_path_factory.mktemp("models")
    return {base.name: copied(base, folder / base.name, NOT_PART) for base in BASES}


def answers(folder):
    return load(folder).answer(PICTURES[0], "What is it?", max_new_tokens=1)


def prepares(folder):
    """All but the arithmetic: config, header, tokenizer, tiles, prompt."""
    vlm = assembled(read_fields(folder, "config.json"), Headers(folder))
    for picture in PICTURES:
        prompt = vlm.prepare(picture, "What is it? é 漢")
        vlm.tokenizer.decode(prompt.token_ids[:9].tolist())


def encodes(folder):
    tokenizer = load_tokenizer(folder, ("<image>", "<more>"))
    for opens in (True, False):
        token_ids = encode(tokenizer, " What is it? é 漢 <image>", opens)
    spoken(tokenizer, [*token_ids.tolist(), 10**6], frozenset())


def holds(name, path, content, use):
    """One case: `content` in place of a file; use(folder) succeeds, or raises InputError in one line."""
    path.write_bytes(content)
    try:
        use(path.parent)
        TRIED[name, "works"] += 1
    except InputError as error:
        assert len(str(error).splitlines()) == 1
        TRIED[name, "one line"] += 1


def tried(name, examples, strategy, check, *changed):
    """Check many examples of a strategy, with bounded memory; the changed files are put back at the end."""
    kept = {path: path.read_bytes() for path in changed}
    told = settings(max_examples=examples, suppress_health_check=list(HealthCheck), database=None)
    try:
        with bounded_memory(2**30):
            told(given(strategy)(check))()
    finally:
        for path, content in kept.items():
            path.write_bytes(content)
    print(name, {outcome: cases for (tried, outcome), cases in TRIED.items() if tried == name})


CONFIGS = ["config.json", "preprocessor_config.json", "processor_config.json", "generation_config.json"]


@examples(quick=12, deep=250)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("base", [base.name for base in BASES])
def test_any_value_of_a_config(models, base, examples):
    found = [models[base] / name for name in CONFIGS if (models[base] / name).exists()]
    kept = {path: path.read_bytes() for path in found}
    contents = {path: json.loads(content) for path, content in kept.items()}

    def check(case):
        path, content, in_full = case
        holds("config", path, content, answers if in_full == 0 else prepares)
        path.write_bytes(kept[path])  # the next case changes another one

    cases = st.sampled_from([found[0], *found]).flatmap(
        lambda path: st.tuples(st.just(path), changes(contents[path], st.sampled_from(ODD)), st.integers(0, 7))
    )
    tried("config", examples, cases, check, *found)


KINDS = """Sequence Prepend Replace NFC NFKD Strip Lowercase Precompiled StripAccents BertNormalizer Nmt ByteLevel Digits
Split Metaspace Whitespace WhitespaceSplit Punctuation CharDelimiterSplit FixedLength UnicodeScripts BertPreTokenizer
TemplateProcessing RobertaProcessing BertProcessing ByteFallback Fuse WordPiece BPEDecoder CTC BPE WordLevel Unigram""".split()  # noqa: SIM905
TEXTS = [[{"Sequence": {"id": text, "type_id": 0}}] for text in "AB"] + [
    [{"SpecialToken": {"id": "<s>", "type_id": 0}}],
    [],
]
VALUES = {
    "prepend": ["▁", "ab"], "pattern": [{"String": " "}, {"Regex": QWEN2}, {"Regex": ".*.*.*.*\\b\\B"}], "content": [" ", "ab"],
    "behavior": ["Isolated", "Removed"], "invert": [False, True], "replacement": ["▁"], "prepend_scheme": ["always", "x"],
    "start": [0, 1, 9], "stop": [0, 1, 2**62], "add_prefix_space": [True, 3], "trim_offsets": [True], "single": TEXTS,
    "pair": TEXTS, "special_tokens": [{"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}, {}],
}  # fmt: skip
STEP = st.fixed_dictionaries(
    {"type": st.sampled_from(KINDS)}, optional={key: st.sampled_from(values) for key, values in VALUES.items()}
)
INNER = ("normalizers", "pretokenizers", "processors", "decoders")
STEPS = st.one_of(
    STEP,
    st.lists(STEP, max_size=3).map(lambda steps: {"type": "Sequence", **dict.fromkeys(INNER, steps)}),
    st.sampled_from(ODD),
    st.sampled_from(KINDS),
    st.sampled_from(KINDS).map(lambda kind: {"type": kind, "pattern": {"Regex": "(a|b)"}, "content": "x", "length": 0}),
    st.sampled_from([{"String": ""}, {"Regex": "("}, {"Regex": "(a*)*"}, {"Regex": "\\p{L}"}, "Isolated", "Removed"]),
)


@examples(quick=25, deep=1400)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("base", ["clip-plain", "clip-qwen2", "idefics3-tiles"])
def test_any_value_of_a_tokenizer(models, base, examples, capfd):
    path = models[base] / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    tried(
        "tokenizer", examples, changes(content, STEPS), lambda changed: holds("tokenizer", path, changed, encodes), path
    )
    assert "panicked" not in capfd.readouterr().err


def parts_of(path):
    """(header, data) of a safetensors file."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


@examples(quick=25, deep=1000)
@pytest.mark.parametrize("base", ["clip-plain", "nanovlm-first"])
def test_any_entry_of_a_safetensors_header(models, base, examples):
    path = models[base] / "model.safetensors"
    header, data = parts_of(path)
    odd = st.one_of(
        st.sampled_from(ODD),
        st.sampled_from(
            ["F64", "BF16", "F16", "F8_E4M3", "BOOL", [0, 4], [4, 0], [0, 2**62], [10**9] * 3, [0], [32, 0]]
        ),
    )

    def check(case):
        text, longer = case
        length = max(len(text) + longer, 0)
        holds("header", path, length.to_bytes(8, "little") + text + data, prepares)

    lengths = st.sampled_from([0] * 12 + [1, -1, 1000, 2**40, 2**62])
    tried("header", examples, st.tuples(changes(header, odd), lengths), check, path)


@examples(quick=25, deep=300)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("base", ["clip-plain", "nanovlm-first"])
def test_any_bytes_of_a_safetensors_file(models, base, examples):
    path = models[base] / "model.safetensors"
    whole = path.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    places = [st.integers(0, 7), st.integers(8, start - 1), *[st.integers(start, len(whole) - 1)] * 3]
    byte = st.sampled_from([0, 1, 0x7F, 0x80, 0xFF]) | st.integers(0, 255)

    def check(case):
        flips, cut = case
        content = bytearray(whole[: len(whole) - cut])
        for place, byte in flips:
            content[min(place, len(content) - 1)] = byte
        holds("bytes", path, bytes(content), answers if flips[0][0] >= start else prepares)

    flips = st.sampled_from(places).flatmap(lambda place: st.lists(st.tuples(place, byte), min_size=1, max_size=6))
    cuts = st.sampled_from([0] * 20 + [1, 4, 1000, len(whole) - start, len(whole) - 9])
    tried("bytes", examples, st.tuples(flips, cuts), check, path)
