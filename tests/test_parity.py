"""Against recordings of transformers, made by record.py (golden/llava, golden/tiny): layers, logits, greedy tokens."""

import hashlib
import json
import pathlib

import pytest
from safetensors.numpy import load_file

import minivtw
from minivtw.loading import embedded_folder

from .parity import TOLERANCE, compare_layers, observe, relative_error

GOLDEN = pathlib.Path(__file__).parent / "golden"
LLAVAS = sorted(path.parent for path in GOLDEN.glob("llava/*/meta.json"))
FEWEST_LLAVAS = 6


def cases(folder):
    return json.loads((folder / "meta.json").read_text(encoding="utf-8"))["cases"]


def recorded(folder, case):
    """The arrays recorded for a case, and the logits of each greedy token."""
    arrays, prefix = load_file(folder / "expected.safetensors"), f"{case['name']}."
    own = {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
    return own, own.pop("steps")


def check(vlm, case, pictures, expected, steps):
    """The prompt, every recorded array, and the greedy tokens with the logits each was chosen from."""
    images = [pictures / name for name in case["images"]]
    assert vlm.prepare(images, case["question"]).token_ids.tolist() == case["token_ids"]
    result, ours, our_steps = observe(vlm, images, case["question"])
    for name, array in expected.items():
        if name.endswith("attention") and array.shape[-2] == 1:  # of long prompts, the last query was recorded
            ours[name] = ours[name][..., -1:, :]
    compare_layers({name: array for name, array in ours.items() if name in expected}, expected)
    assert result.token_ids == case["greedy_ids"]
    assert relative_error(our_steps, steps) < TOLERANCE
    assert result.text == case["text"]
    return ours


def test_every_llava_is_recorded():
    assert len(LLAVAS) >= FEWEST_LLAVAS


@pytest.mark.parametrize("folder", LLAVAS, ids=[folder.name for folder in LLAVAS])
def test_random_llava_computes_what_transformers_does(folder):
    vlm = minivtw.load(folder)
    for case in cases(folder):
        expected, steps = recorded(folder, case)
        ours = check(vlm, case, folder.parent / "pictures", expected, steps)
        assert ours.keys() == expected.keys()  # nothing that is observed went unrecorded


@pytest.mark.parametrize("case", cases(GOLDEN / "tiny"), ids=lambda case: case["name"])
def test_embedded_model_computes_what_transformers_does(case):
    folder = GOLDEN / "tiny"
    for name, recorded_hash in json.loads((folder / "meta.json").read_text(encoding="utf-8"))["model_sha256"].items():
        same = hashlib.sha256((embedded_folder() / name).read_bytes()).hexdigest() == recorded_hash
        assert same, f"{name} of the embedded model changed since it was recorded: run `python tests/record.py tiny`"
    check(minivtw.load(), case, folder, *recorded(folder, case))
