"""The shelf against its recordings: who is kept in every layer, by a second implementation in PyTorch.

`tests/record.py shelf` wrote them with `shelf_reference.py`; `test_shelf_live.py` compares with that as it runs.
"""

import json
import pathlib

import numpy as np
import pytest

import minivtw
from minivtw.inputs.prompts import Prompt
from minivtw.methods.shelf import method_of
from minivtw.methods.withdrawal import then
from minivtw.model.cache import KVCache
from tests.parity import relative_error
from tests.shelf_models import IMAGE_TOKEN, METHODS, SEEDS, SIDE, TOWERS, VISUAL, question, write

RECORDED = json.loads((pathlib.Path(__file__).parent / "golden" / "shelf.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module", params=TOWERS)
def model(request, tmp_path_factory):
    return request.param, minivtw.load(write(request.param, tmp_path_factory.mktemp(request.param)))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("text", METHODS)
def test_who_is_kept_and_what_is_said(model, text, seed):
    (tower, vlm), kept = model, []
    token_ids, tiles = question(seed)
    prompt = Prompt(token_ids, token_ids == IMAGE_TOKEN, tiles, ((SIDE, SIDE),))
    note = lambda index, tokens: kept.append(tokens.positions[tokens.is_visual].tolist()) or tokens
    logits, _ = vlm.advance(vlm.embed(prompt), KVCache(vlm.config), then(method_of(text), note))
    expected = RECORDED[tower][text][seed]
    assert kept == expected["kept"] and len(kept[-1]) < VISUAL
    assert relative_error(logits[: len(expected["logits"])], np.array(expected["logits"])) < 1e-4
