"""What all tests share: how hypothesis draws, and Pillow as the comparisons with transformers need it.

The suite draws the same examples for everybody who has the same commit and the same hypothesis. `pytest -m deep` and
`--hypothesis-seed=N` draw anew, with a seed that is printed at the top; an example that was found becomes a named case.
"""

import secrets
import signal

import PIL
import pytest
from hypothesis import settings
from PIL import Image

from minivtw.doctor import product_line

# Spelled out against hypothesis' default, because with CI set the profile at hand is another one.
shared = dict(parent=settings.get_profile("default"), deadline=None, database=None, print_blob=True)
settings.register_profile("minivtw", **shared, derandomize=True)
settings.register_profile("random", **shared, derandomize=False)


@pytest.hookimpl(tryfirst=True)  # before hypothesis reads the seed
def pytest_configure(config):
    draws_anew = "deep" in config.option.markexpr and "not deep" not in config.option.markexpr
    if draws_anew and config.option.hypothesis_seed is None:
        config.option.hypothesis_seed = str(secrets.randbelow(2**32))
    settings.load_profile("minivtw" if config.option.hypothesis_seed is None else "random")


def pytest_report_header(config):
    seed = config.option.hypothesis_seed
    drawn = "the same examples for everybody" if seed is None else f"drawn anew, --hypothesis-seed={seed}"
    return [f"properties: {drawn}", product_line()[0]]


@pytest.fixture(autouse=True)
def published_order_of_resizing(request, monkeypatch):
    """In comparisons with transformers Pillow resizes the width first, as it did before version 13 (`resized`)."""
    if request.node.get_closest_marker("live") and int(PIL.__version__.split(".")[0]) >= 13:
        one_pass = Image.Image.resize

        def resize(image, size, resample=None, box=None, reducing_gap=None):
            narrow = image if box else one_pass(image, (size[0], image.height), resample)
            return one_pass(narrow, size, resample, box, reducing_gap)

        monkeypatch.setattr(Image.Image, "resize", resize)


@pytest.fixture(scope="session", autouse=True)
def ctrl_c():
    """Ctrl-C is heard here and in every process begun here, also where it is ignored: in the background, under nohup."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
