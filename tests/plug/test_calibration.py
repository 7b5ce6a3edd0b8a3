"""Calibration: what the search of minivtw finds, and what a withdrawal at every K measures, layer by layer."""

import json

import pytest

import minivtw
from minivtw.errors import InputError
from minivtw.inputs.questions import read_questions
from minivtw.search.calibration import calibrate

pytestmark = pytest.mark.live

CLOSE = 1e-4  # nats


def loaded(folder):
    import transformers

    model = transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype="float32").eval()
    return model, transformers.AutoProcessor.from_pretrained(folder, backend="pil")


def asked(folder, most, prompt):
    lines = (folder / "samples" / "questions.jsonl").read_text(encoding="utf-8").splitlines()[:most]
    return [(folder / "samples" / line["image"], prompt(line["question"])) for line in map(json.loads, lines)]


def searched(vlm, samples):
    """What the NumPy search finds on the same samples."""
    return calibrate(vlm, read_questions(vlm.folder / "samples", most=samples), "kl", 0.003)


def test_the_embedded_model_has_the_curve_of_the_numpy_search(plug):
    vlm = minivtw.load()
    model, processor = loaded(vlm.folder)
    samples = asked(vlm.folder, 20, lambda question: f"USER: <image>\n{question} ASSISTANT:")
    seen, expected = [], searched(vlm, 20)
    found = plug.calibrate(model, processor, samples, 0.003, seen.append)
    assert expected["criterion"] == found["criterion"] == "kl" and seen == list(range(1, len(samples) + 1))
    assert found["withdraw_layer"] == expected["withdraw_layer"] and found["samples"]["count"] == len(samples)
    assert found["curve"] == pytest.approx(expected["curve"], abs=CLOSE)


@pytest.mark.slow
def test_minivtw_smol_has_the_curve_of_the_numpy_search(plug):
    """Needs `python -m minivtw.fetch smol`. One sample of each family: thirty prefills of both models each."""
    from minivtw.fetch import fetch

    vlm = minivtw.load(fetch("smol"))
    model, processor = loaded(vlm.folder)
    found, expected = plug.calibrate(model, processor, asked(vlm.folder, 7, str)), searched(vlm, 7)
    assert found["withdraw_layer"] == expected["withdraw_layer"]
    assert found["curve"] == pytest.approx(expected["curve"], abs=CLOSE)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "name",
    ["llava", "llava-onevision", "smolvlm", "qwen2.5-vl", "internvl", "gemma3", "gemma3-short-window", "paligemma"],
)
def test_every_value_is_that_of_a_withdrawal_there(zoo, masks, plug, built, name, attention):
    model = built(name, attention)
    inputs, _ = zoo.prompts(name, model, [[3, 2, 5]])
    found = plug.calibrate(model, None, [inputs], eta=1e9)
    full = masks.logits(model, inputs, 6)[:, -1].double().log_softmax(-1)
    for layer, value in enumerate(found["curve"]):
        withdrawn = masks.logits(model, inputs, layer)[:, -1].double().log_softmax(-1)
        assert value == pytest.approx(float((withdrawn.exp() * (withdrawn - full)).sum()), abs=CLOSE)
    assert len(found["curve"]) == 6 and found["withdraw_layer"] == 0


def test_what_calibration_cannot_use(zoo, plug, built):
    model = built("llava")
    inputs, _ = zoo.prompts("llava", model, [[3, 5]])
    batch, _ = zoo.prompts("llava", model, [[3, 5], [2, 5]])
    text, _ = zoo.prompts("llava", model, [[5]])
    for samples, processor, options, words in (
        ([], None, {}, "needs samples"),
        ([inputs], None, {"eta": 1e-9}, "no layer meets the kl criterion's threshold"),
        ([batch], None, {}, "one prompt"),
        ([text], None, {}, "with an image"),
        (["scene.png"], None, {}, "must be an image and a question"),
        ([("scene.png", "Hm?")], None, {}, "processor"),
        ([("nothing.png", "Hm?")], object(), {}, "cannot read the image nothing.png"),
    ):
        with pytest.raises(InputError, match=words):
            plug.calibrate(model, processor, samples, **options)
