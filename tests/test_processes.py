"""Several processes: a forked one answers, and a model can be sent to another."""

import os
import pathlib
import pickle
import subprocess
import sys

import pytest

import minivtw
from tests.families.conversation import picture

GOLDEN = pathlib.Path(__file__).parent / "golden"
FOLDERS = sorted(path.parent for path in GOLDEN.glob("*/*/config.json"))

FORKED = """
import os, signal, sys, minivtw
vlm = minivtw.load(sys.argv[1], low_memory=sys.argv[2] == "True")
answer = lambda: vlm.answer(None, "a " * 60, max_new_tokens=2).token_ids
before = answer()
child = os.fork()
if not child:
    signal.alarm(30)
    os._exit(0 if answer() == before else 1)
print("ended with", os.waitpid(child, 0)[1], "of", minivtw.threads.THREADS, "threads")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("low_memory", [False, True])
def test_a_forked_process_answers_as_its_parent_did(low_memory):
    """It has none of its parent's threads, neither those that compute nor the one that reads ahead."""
    arguments = [sys.executable, "-c", FORKED, GOLDEN / "llava" / "clip-plain", str(low_memory)]
    two = {"OPENBLAS_NUM_THREADS": "2", "OMP_NUM_THREADS": "2"}
    done = subprocess.run(arguments, env=os.environ | two, capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith("ended with 0 of "), done


@pytest.mark.parametrize("folder", FOLDERS, ids=[folder.name for folder in FOLDERS])
def test_a_pickled_model_answers_as_itself(folder):
    vlm = minivtw.load(folder)
    sent = pickle.loads(pickle.dumps(vlm))
    ask = lambda asked: asked.answer([picture(30, 60)], "What?", max_new_tokens=3).token_ids
    assert ask(sent) == ask(vlm)
