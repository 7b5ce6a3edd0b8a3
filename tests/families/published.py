"""The published files that some tests compare with: `MINIVTW_CONFIGS`, or `shared/configs` beside the repository.

They are not in the repository. A test that needs them skips where they are not, and says so.
"""

import os
import pathlib

import numpy as np
import pytest

from minivtw.checkpoints import family
from minivtw.checkpoints.fields import Fields
from minivtw.checkpoints.files import read_json
from minivtw.checkpoints.tokenizer import load_tokenizer
from minivtw.vlm import VLM

CONFIGS = pathlib.Path(os.environ.get("MINIVTW_CONFIGS") or pathlib.Path(__file__).parents[3] / "shared" / "configs")
LLAVA_7B = CONFIGS / "llava-1.5-7b-hf"
SMOLVLM_256M = CONFIGS / "SmolVLM-256M-Instruct"
SMOLVLM2_500M = CONFIGS / "SmolVLM2-500M-Video-Instruct"
SMOLVLM_2B = CONFIGS / "SmolVLM-Instruct-2.2B"
needs_configs = pytest.mark.skipif(
    not CONFIGS.is_dir(), reason=f"needs the published files: none in {CONFIGS}; set MINIVTW_CONFIGS"
)


class BlankCheckpoint:
    """A checkpoint without files: every tensor that is asked for is there, has the shape asked for, and is zero.

    A model of any size takes no memory in it. `asked`: every tensor's name, with its shape as a file would have it.
    """

    def __init__(self, names=()):
        self.names = set(names)  # what `in` says is there
        self.asked = {}

    def fill(self, form):
        return form(self)

    def __contains__(self, name):
        return name in self.names

    def skip(self, prefix):
        pass

    def zeros(self, *shape):
        return np.broadcast_to(np.float32(0), shape)

    def vector(self, *names, size):
        sizes = size if isinstance(size, tuple) else (size,) * len(names)
        self.asked.update(zip(names, ((length,) for length in sizes), strict=True))
        return self.zeros(sum(sizes))

    def table(self, name, rows, width, batch=False):
        self.asked[name] = (1, rows, width) if batch else (rows, width)
        return self.zeros(rows, width)

    def matrix(self, *names, into, out, kernel=()):
        outs = out if isinstance(out, tuple) else (out,) * len(names)
        self.asked.update({name: (rows, *(kernel or (into,))) for name, rows in zip(names, outs, strict=True)})
        return self.zeros(into, sum(outs))

    def layers(self, count, read):
        return [read(index) for index in range(count)]


def blank_vlm(folder, names=()):
    """(a VLM of the folder's own files and no weights, its config's Fields, its checkpoint)."""
    fields = Fields(read_json(folder, "config.json"), str(folder / "config.json"))
    checkpoint = BlankCheckpoint(names)
    parts = family(fields).load(fields, folder, checkpoint)
    tokenizer = load_tokenizer(folder, parts.extra_tokens)
    return VLM(folder, parts, tokenizer, frozenset(), 0.0), fields, checkpoint
