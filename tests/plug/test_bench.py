"""The door `python -m minivtw.plug`. What it counts is tested, not what it measures: time is no property of code."""

import json

import pytest

from tests.doors import assert_one_line_error, run

pytestmark = pytest.mark.live


@pytest.fixture(scope="module")
def folder(zoo, tmp_path_factory):
    """A model folder without a processor."""
    path = tmp_path_factory.mktemp("plug") / "model"
    zoo.build("smolvlm").save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def main():
    from minivtw.plug.__main__ import main

    return main


QUICK = ("--visual", 20, "--text", 9, "--new-tokens", 2, "--repeats", 1, "--device", "cpu")


def test_every_layer_is_timed_against_none(main, folder):
    ran = run(main, folder, *QUICK, "--withdraw", "0,4", "--batch", 2, "--json")
    assert ran.code == 0 and ran.out.count("\n") == 1
    found = json.loads(ran.out)
    assert (
        found["layers"] == 6
        and found["device"] == "cpu"
        and found["dtype"] == "float32"
        and found["attention"] == "sdpa"
    )
    assert found["tokens"] == {"visual": 20, "text": 9, "batch": 2, "generated": 2}
    whole, none, late = found["runs"]
    assert [run["layer"] for run in found["runs"]] == [6, 0, 4]
    width, kinds = 2 * 8 * 4, 2  # kv_heads x head_dim x bytes; keys and values
    tokens = [6 * 31, 6 * 11, 4 * 31 + 2 * 11]
    assert [run["cache_bytes"] for run in found["runs"]] == [2 * kinds * width * held for held in tokens]
    layer = lambda rows: 2 * rows * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48) + 4 * rows * rows * 32
    head = 2 * 100 * 32
    expected = [6 * layer(29), 6 * layer(9), 4 * layer(29) + 2 * layer(9)]
    assert [run["flops"] for run in found["runs"]] == [2 * (flops + head) for flops in expected]
    assert all(run["prefill"] > 0 and run["decode"] > 0 for run in (whole, none, late))


def test_the_table_says_ratios_first(main, folder):
    ran = run(main, folder, *QUICK, "--freeze", "1,2")
    header, first, second = (line.split() for line in ran.out.splitlines())
    assert header[:6] == ["withdrawn", "frozen", "FLOPs", "prefill", "decode", "cache"]
    assert first[:6] == ["never", "0", "1.000", "1.000", "1.000", "1.000"]
    assert second[:3] == ["before", "3", "2"] and 0 < float(second[3]) < 1


@pytest.mark.parametrize(
    "options, words",
    [
        (("--withdraw", "7"), "from 0 to 6, not 7"),
        (("--withdraw", "2", "--freeze", "3"), "leave before layer 2"),
        (("--withdraw", "half"), "invalid"),
        (("--batch", "0"), "1 or more"),
        (("--text", "2"), "3 or more"),
        (("--visual", "999999999"), "make 1,000,000,010 tokens; the model has "),
        (("--batch", "99999999999"), "this needs more memory than the machine has"),
        (("--device", "cuda"), "no CUDA device"),
    ],
)
def test_options_that_make_no_sense(main, folder, options, words, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert_one_line_error(run(main, folder, *QUICK, *options), words)


def test_a_model_that_is_not_there(main, tmp_path):
    assert_one_line_error(run(main, tmp_path, *QUICK), "cannot load")


def test_published_shapes(zoo):
    """That the shapes have their models' numbers of parameters, decoder and head, without making any."""
    import torch
    import transformers

    from minivtw.plug.anatomy import anatomy
    from minivtw.plug.shapes import SHAPES

    for name, millions in (("smolvlm-256m", 134.6), ("llava-1.5-7b", 6738.9), ("qwen2.5-vl-7b", 7615.6)):
        with torch.device("meta"):
            model = transformers.AutoModelForImageTextToText.from_config(SHAPES[name].config())
        parts = anatomy(model)
        weights = {
            id(weight): weight.numel()
            for part in (parts.decoder, model.get_output_embeddings())
            for weight in part.parameters()
        }
        assert sum(weights.values()) / 1e6 == pytest.approx(millions, rel=1e-3)
