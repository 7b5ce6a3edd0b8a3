"""Calibration: what the search of minivtw finds, and what a withdrawal at every K measures, layer by layer."""

import json

import pytest

import minivtw
from minivtw.errors import InputError

pytestmark = pytest.mark.live

CLOSE = 1e-4  # nats


def loaded(folder):
    import transformers

    model = transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype="float32").eval()
    return model, transformers.AutoProcessor.from_pretrained(folder)


def asked(folder, most, prompt):
    lines = (folder / "samples" / "questions.jsonl").read_text(encoding="utf-8").splitlines()[:most]
    return [(folder / "samples" / line["image"], prompt(line["question"])) for line in map(json.loads, lines)]


def test_the_embedded_model_has_the_stored_curve(plug):
    folder = minivtw.load().folder
    model, processor = loaded(folder)
    stored = json.loads((folder / "withdrawal.json").read_text())
    samples = asked(folder, stored["samples"]["count"], lambda question: f"USER: <image>\n{question} ASSISTANT:")
    seen = []
    found = plug.calibrate(model, processor, samples, stored["threshold"], seen.append)
    assert stored["criterion"] == found["criterion"] == "kl" and seen == list(range(1, len(samples) + 1))
    assert found["withdraw_layer"] == stored["withdraw_layer"] and found["samples"]["count"] == len(samples)
    assert found["curve"] == pytest.approx(stored["curve"], abs=CLOSE)


@pytest.mark.slow
def test_minivtw_smol_has_the_stored_curve(plug):
    """Needs `python -m minivtw.fetch smol`."""
    from minivtw.fetch import fetch

    folder = fetch("smol")
    stored = json.loads((folder / "withdrawal.json").read_text())
    model, processor = loaded(folder)
    found = plug.calibrate(model, processor, asked(folder, 20, str))
    assert found["withdraw_layer"] == stored["withdraw_layer"]
    assert found["curve"] == pytest.approx(stored["curve"], abs=CLOSE)


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
        ([inputs], None, {"eta": 1e-9}, "no layer meets the threshold"),
        ([batch], None, {}, "one prompt"),
        ([text], None, {}, "with an image"),
        (["scene.png"], None, {}, "must be an image and a question"),
        ([("scene.png", "Hm?")], None, {}, "processor"),
        ([("nothing.png", "Hm?")], object(), {}, "cannot read the image nothing.png"),
    ):
        with pytest.raises(InputError, match=words):
            plug.calibrate(model, processor, samples, **options)
