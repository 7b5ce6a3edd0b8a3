"""The published files that some tests compare with: `MINIVTW_CONFIGS`, or `shared/configs` beside the repository.

They are not in the repository. A test that needs them skips where they are not, and says so.
"""

import os
import pathlib

import numpy as np
import pytest

from minivtw.checkpoints import family
from minivtw.checkpoints.checkpoint import Checkpoint
from minivtw.checkpoints.files import read_fields
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


class BlankCheckpoint(Checkpoint):
    """A checkpoint without files: every tensor that is asked for is there, has the shape asked for, and is zero.

    A model of any size takes no memory in it. `asked`: every tensor's name, with its shape as a file would have it.
    """

    def __init__(self, names=()):
        self.shards = dict.fromkeys(names)  # what `in` says is there
        self.asked = {}
        self._checked, self.low_memory, self._names = False, False, {}

    def fill(self, form, names=None):
        return form(self)

    def skip(self, prefix):
        pass

    def _take(self, *names, shapes, out):
        self.asked.update(zip(names, shapes, strict=True))
        return np.broadcast_to(np.float32(0), out)


def blank_vlm(folder, names=()):
    """(a VLM of the folder's own files and no weights, its config's Fields, its checkpoint)."""
    fields = read_fields(folder, "config.json")
    checkpoint = BlankCheckpoint(names)
    parts = family(fields).load(fields, folder, checkpoint)
    tokenizer = load_tokenizer(folder, parts.extra_tokens)
    return VLM(folder, parts, tokenizer, frozenset(), 0.0), fields, checkpoint
