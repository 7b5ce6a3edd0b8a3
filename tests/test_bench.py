"""The door `python -m minivtw.bench`. What it measures is not tested: time is not a property of the code."""

import numpy as np
import pytest
from PIL import Image

from minivtw.bench import main
from tests.doors import assert_one_line_error, run
from tests.small_llava import write_folder


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """The arguments that every run shares: a picture, a question, a small model."""
    folder = tmp_path_factory.mktemp("bench")
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (12, 12, 3), np.uint8)).save(folder / "noise.png")
    return folder / "noise.png", "Hm?", "--model", write_folder(folder / "model")


def test_every_layer_is_timed_against_none(asked):
    ran = run(main, *asked, "--withdraw", "auto,0,4", "--repeats", "2", "--new-tokens", "1")
    assert ran.code == 0 and ran.err == ""
    rows = [line.split() for line in ran.out.splitlines()[1:]]
    assert [row[0] for row in rows] == ["off", "auto", "0", "4"]
    assert rows[0][2] == rows[0][4] == "1.00"
    for _, prefill, ratio, decode, _ in rows:
        assert float(prefill) > 0 and float(decode) > 0
        assert float(ratio) == pytest.approx(float(prefill) / float(rows[0][1]), abs=0.02)


@pytest.mark.parametrize(
    "options, words",
    [
        (("--withdraw", "5"), "from 0 to 4"),
        (("--method", "adaptive:loud=1"), "takes share, quiet"),
        (("--repeats", "0"), "1 or more"),
        (("--new-tokens", "0"), "1 or more"),
    ],
)
def test_options_that_make_no_sense(asked, options, words):
    assert_one_line_error(run(main, *asked, *options), words)
