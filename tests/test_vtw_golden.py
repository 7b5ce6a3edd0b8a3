"""Against recordings of the published Visual Tokens Withdrawal code (arXiv 2405.05803); see golden/vtw/README.md."""

import json
import os
import pathlib

import numpy as np
import pytest
from safetensors.numpy import load_file

from minivtw.checkpoints import llama
from minivtw.checkpoints.checkpoint import Checkpoint
from minivtw.checkpoints.fields import Fields
from minivtw.methods.withdrawal import withdraw
from minivtw.model.cache import KVCache
from minivtw.model.decoder import forward, logits
from minivtw.model.tokens import EmbeddedPrompt, arriving

from .random_models import renumbered

GOLDEN = pathlib.Path(os.environ.get("MINIVTW_GOLDEN", pathlib.Path(__file__).parent / "golden" / "vtw"))
CASES = [
    (folder, case)
    for folder in sorted(path.parent for path in GOLDEN.glob("*/meta.json"))
    for case in json.loads((folder / "meta.json").read_text(encoding="utf-8"))["cases"]
]
TOLERANCE = 1e-5  # absolute, on logits


def test_there_are_recordings():
    assert CASES, f"{GOLDEN} holds no recordings"


@pytest.mark.parametrize("folder, case", CASES, ids=[f"{folder.name}-{case['name']}" for folder, case in CASES])
def test_published_code_is_matched(folder, case):
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    expected = load_file(folder / "expected.safetensors")
    config = llama.decoder_config(Fields(meta["config"], str(folder)))
    decoder = Checkpoint(folder).fill(lambda take: llama.decoder(config, take))
    method = (
        None
        if case["withdraw_layer"] is None
        else {"keep": withdraw, "reindex": renumbered}[case["positions"]](case["withdraw_layer"])
    )
    cache = KVCache(config)

    hidden = expected["inputs_embeds"]  # (tokens, width)
    is_visual = np.zeros(len(hidden), bool)
    is_visual[meta["system_tokens"] : meta["system_tokens"] + meta["image_tokens"]] = True
    prefilled = logits(decoder, forward(decoder, arriving(EmbeddedPrompt(hidden, is_visual), cache), method).hidden)
    assert np.abs(prefilled - expected[f"{case['name']}.prefill_logits"]).max() < TOLERANCE

    steps = [prefilled[-1]]
    for _ in range(meta["steps"]):
        embedded = decoder.embedding[[steps[-1].argmax()]]  # (1, width)
        said = forward(decoder, arriving(EmbeddedPrompt(embedded, np.zeros(1, bool)), cache), method)
        steps.append(logits(decoder, said.hidden)[0])
    assert np.abs(np.array(steps) - expected[f"{case['name']}.step_logits"]).max() < TOLERANCE
    assert [int(step.argmax()) for step in steps[:-1]] == case["greedy_ids"]
    assert cache.tokens_per_layer == case["kv_lengths"]
