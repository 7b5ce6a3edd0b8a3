"""Every family: withdrawal by hooks is what a mask says it must be, and every layer's cache is as long as K says."""

import random

import pytest

pytestmark = pytest.mark.live

FAMILIES = (
    "llava", "llava-interleave", "llava-next", "llava-onevision", "idefics3", "smolvlm", "qwen2-vl", "qwen2.5-vl",
    "qwen3-vl", "internvl", "gemma3", "gemma3-short-window", "paligemma",
)  # fmt: skip
TOLERANCE = 1e-5  # of the largest logit
LAYERS = 6


def relative(ours, expected):
    return float((ours - expected).abs().max() / expected.abs().max())


def test_every_family_is_here(zoo):
    assert set(FAMILIES) == set(zoo.NAMES)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_those_of_text_that_may_not_see_the_image(zoo, masks, plug, built, name, attention):
    model = built(name, attention)
    inputs, _ = zoo.prompts(name, model, [[3, 2, 5]])
    text = inputs["input_ids"] != zoo.IMAGE
    full = masks.logits(model, inputs, LAYERS)[text]
    for layer in (0, 1, 3, 5, 6):
        expected = masks.logits(model, inputs, layer)[text]
        assert (relative(full, expected) > 0.01) == (layer < LAYERS)  # the image matters to this model
        with plug.withdraw(model, layer), zoo.torch.no_grad():
            for use_cache in (True, False):
                assert relative(model(**inputs, use_cache=use_cache).logits[text], expected) < TOLERANCE


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_tokens_and_cache_lengths(zoo, masks, plug, built, answer, lengths, name):
    model = built(name)
    inputs, _ = zoo.prompts(name, model, [[3, 2, 5]])
    seen = inputs["input_ids"].shape[1] + 5  # the last token said is not fed back
    for layer in (0, 2, 6):
        with plug.withdraw(model, layer):
            said, _, cache = answer(model, inputs)
        assert said.tolist() == masks.greedy(model, inputs, layer).tolist()
        expected = [seen if index < layer else 3 + 2 + 5 + 5 for index in range(LAYERS)]
        if name == "gemma3-short-window":  # local layers hold the 8 tokens that the next one may see
            expected = [8 if index % 3 < 2 else tokens for index, tokens in enumerate(expected)]
        assert lengths(cache) == expected


@pytest.mark.parametrize("name", FAMILIES)
def test_frozen_layers_let_visual_tokens_be_read_and_nothing_else(zoo, masks, plug, built, answer, name):
    model = built(name)
    inputs, _ = zoo.prompts(name, model, [[3, 2, 5]])
    text = inputs["input_ids"] != zoo.IMAGE
    local = name.startswith("gemma3")  # whose local layers cannot be frozen
    for frozen, layer in (([2], 4), ([2, 5], None)) if local else (([0, 2], 4), ([1, 2, 5], None), ([0], 2)):
        until = LAYERS if layer is None else layer
        expected = masks.logits(model, inputs, until, frozen)[text]
        assert relative(masks.logits(model, inputs, until)[text], expected) > 0.003
        with plug.freeze(model, frozen, layer), zoo.torch.no_grad():
            for use_cache in (True, False):
                assert relative(model(**inputs, use_cache=use_cache).logits[text], expected) < TOLERANCE
            said, *_ = answer(model, inputs)
        assert said.tolist() == masks.greedy(model, inputs, until, frozen).tolist()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_batch_answers_as_its_prompts_do_one_at_a_time(zoo, plug, built, answer, lengths, name, attention):
    model = built(name, attention)
    batch, alone = zoo.prompts(name, model, [[3, 5], [2, 4, 5], [7], [12, 4]])
    for frozen, layer in (((), 0), ((), 3), ((2,), 4)):
        context = plug.freeze(model, frozen, layer) if frozen else plug.withdraw(model, layer)
        with context:
            said, logits, cache = answer(model, batch)
            for row, one in enumerate(alone):
                expected, steps, _ = answer(model, one)
                assert said[row].tolist() == expected[0].tolist()
                assert relative(logits[:, row], steps[:, 0]) < TOLERANCE
        assert lengths(cache)[5] == 16 + 5  # as long as the longest text: no prompt pays for another's image


@pytest.mark.parametrize("name", FAMILIES)
def test_random_prompts_of_every_shape(zoo, masks, plug, built, name):
    model = built(name)
    draw = random.Random(name)
    for seed in range(4):
        shape = [draw.randint(0, 6), *(draw.randint(1, 6) for _ in range(draw.randint(0, 2))), draw.randint(1, 9)]
        inputs, _ = zoo.prompts(name, model, [shape], seed)
        text, layer = inputs["input_ids"] != zoo.IMAGE, draw.randint(0, LAYERS)
        expected = masks.logits(model, inputs, layer)[text]
        with plug.withdraw(model, layer), zoo.torch.no_grad():
            assert relative(model(**inputs).logits[text], expected) < TOLERANCE
