"""The shelf against plain PyTorch over transformers' layers: who is kept in every layer, and what the model then says.

Run with `pytest -m live`; needs the extra `reference`.
"""

from types import SimpleNamespace

import pytest

import minivtw
from minivtw.methods.shelf import method_of
from minivtw.methods.withdrawal import then
from minivtw.model.cache import KVCache

from .parity import relative_error
from .shelf_models import METHODS
from .test_parity_live import QUESTION, picture

pytestmark = pytest.mark.live


@pytest.fixture(scope="module", params=["clip", "siglip"])
def models(request, tmp_path_factory):
    """One random LLaVA of 36 visual tokens and six layers in both: with a class token and without."""
    from . import reference

    folder, sizes = tmp_path_factory.mktemp(request.param), {"image_size": 36, "patch_size": 6, "num_hidden_layers": 3}
    vision = getattr(reference, request.param)(**sizes)
    selected = reference.feature(-2, "default" if request.param == "clip" else "full")
    variant = reference.Variant("shelf", vision, reference.llama(num_hidden_layers=6), selected, seed=7)
    reference.build(variant, folder)
    return reference.Reference(folder), minivtw.load(folder)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("text", METHODS)
def test_who_is_kept_and_what_is_said(models, text, seed):
    from .shelf_reference import RULES, carry

    torch_model, vlm = models
    inputs = torch_model.inputs([picture(seed)], QUESTION)
    arrays = torch_model.prefill(inputs)
    is_visual = inputs["input_ids"][0].numpy() == torch_model.model.config.image_token_id
    class_token = vlm.parts.vision.encoder.config.class_token
    tower = torch_model.model.model.vision_tower
    seen = SimpleNamespace(arrays=arrays, visual=int(is_visual.sum()), used=2, class_token=class_token, tower=tower)
    assert seen.visual == 36
    kept, expected = carry(torch_model, arrays["decoder.embeddings"], is_visual, *RULES[text.split(":")[0]](seen))
    assert len(kept[-1]) < 36

    ours, prompt = [], vlm.prepare([picture(seed)], QUESTION)
    note = lambda index, tokens: ours.append(tokens.positions[tokens.is_visual].tolist()) or tokens
    logits, _ = vlm.advance(vlm.embed(prompt), KVCache(vlm.config), then(method_of(text), note))
    assert ours == kept
    assert relative_error(logits, expected) < 1e-5
