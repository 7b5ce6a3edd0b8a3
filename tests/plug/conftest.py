"""Torch is imported when a live test runs, not when tests are collected."""

import pytest


@pytest.fixture(scope="session")
def zoo():
    """The random models of every family."""
    from . import models

    models.torch.set_num_threads(1)
    return models


@pytest.fixture(scope="session")
def masks():
    """What withdrawal must mean, by masks."""
    from . import masks

    return masks


@pytest.fixture(scope="session")
def plug():
    """The module under test."""
    import minivtw.plug

    return minivtw.plug


@pytest.fixture(scope="session")
def built(zoo):
    """Models by family and attention, each built once; a test that changes one builds its own."""
    made = {}

    def get(name, attention="sdpa"):
        if (name, attention) not in made:
            made[name, attention] = zoo.build(name, attention=attention)
        return made[name, attention]

    return get


@pytest.fixture
def answer(zoo):
    """Greedy generation: (the tokens said (prompts, tokens), their logits (tokens, prompts, vocabulary), the cache)."""

    def generate(model, inputs, tokens=6, **options):
        options = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True, **options}
        made = model.generate(**inputs, max_new_tokens=tokens, **options)
        steps = zoo.torch.stack(made.logits) if made.logits else None
        return made.sequences[:, -tokens:], steps, made[zoo.cache_name(model)]

    return generate


@pytest.fixture
def lengths():
    """How many tokens each layer of a cache holds."""
    return lambda cache: [layer.keys.shape[-2] for layer in cache.layers]
