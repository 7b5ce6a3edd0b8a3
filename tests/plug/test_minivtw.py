"""The same model in transformers and in minivtw: the same tokens and the same logits, at every K."""

from collections import defaultdict

import numpy as np
import pytest
from PIL import Image

import minivtw
from tests.parity import TOLERANCE, relative_error

pytestmark = pytest.mark.live

QUESTION = "What color is the star?"
TOKENS = 12


def picture(size, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8))


def compare(plug, vlm, model, inputs, images):
    import torch

    model.generation_config.eos_token_id = None  # as many tokens as minivtw said, whatever they are
    layers = model.config.get_text_config().num_hidden_layers
    for layer in (None, 0, layers // 2, layers - 1):
        seen = defaultdict(list)
        keep = lambda name, array, seen=seen: seen[name].append(array.copy())
        ours = vlm.answer(images, QUESTION, withdraw=layer, max_new_tokens=TOKENS, observe=keep)
        options = dict(max_new_tokens=len(ours.token_ids), do_sample=False)
        with plug.withdraw(model, layers if layer is None else layer):
            theirs = model.generate(**inputs, **options, output_logits=True, return_dict_in_generate=True)
        assert ours.token_ids == theirs.sequences[0, inputs["input_ids"].shape[1] :].tolist()
        assert relative_error(np.stack(seen["decoder.logits"]), torch.cat(theirs.logits).numpy()) < TOLERANCE
        cache = getattr(theirs, "cache", None) or theirs["past_key_values"]
        assert ours.stats["cache"]["tokens_per_layer"] == [part.keys.shape[-2] for part in cache.layers]


def test_the_embedded_model(plug):
    from tests import reference

    vlm = minivtw.load()
    theirs = reference.Reference(vlm.folder)
    image = picture((256, 256))
    compare(plug, vlm, theirs.model, theirs.inputs([image], QUESTION), [image])


@pytest.mark.parametrize("seed", range(4))
def test_random_llava(plug, tmp_path, seed):
    from tests import reference

    reference.build(reference.random_variant(seed), tmp_path)
    theirs, images = reference.Reference(tmp_path), [picture((90, 61), seed), picture((31, 47))][: 1 + seed % 2]
    compare(plug, minivtw.load(tmp_path), theirs.model, theirs.inputs(images, QUESTION), images)


@pytest.mark.parametrize("seed", range(4))
def test_random_smolvlm(plug, tmp_path, seed):
    import torch

    from tests.families import reference
    from tests.families.test_families_live import random_smolvlm

    reference.build(random_smolvlm(reference, seed), tmp_path)
    theirs, images = reference.Reference(tmp_path), [picture((90, 61), seed), picture((31, 47))][: 1 + seed % 2]
    token_ids, tiles = theirs.inputs(images, QUESTION)
    inputs = {"input_ids": torch.tensor(token_ids)[None], "pixel_values": tiles[None]}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    compare(plug, minivtw.load(tmp_path), theirs.model, inputs, images)
