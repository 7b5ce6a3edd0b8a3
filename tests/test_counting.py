"""The formulas of FLOPs and bytes against the matrix products that really happen."""

import dataclasses

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from minivtw.counting import cache_bytes, decode_flops, layer_flops, prefill_flops
from minivtw.model.decoder import DecoderLayer, logits
from minivtw.model.layers import Linear
from minivtw.methods import Withdrawal
from tests.random_models import Asked, cases, prefill


class Counted(np.ndarray):
    """An array that counts the FLOPs of every matrix product it takes part in, and makes arrays of its kind."""

    flops = 0

    def __array_ufunc__(self, ufunc, method, *inputs, out=None, **options):
        plain = [value.view(np.ndarray) if isinstance(value, Counted) else value for value in inputs]
        if out is not None:
            options["out"] = tuple(value.view(np.ndarray) if isinstance(value, Counted) else value for value in out)
        result = getattr(ufunc, method)(*plain, **options)
        if ufunc is np.matmul:
            Counted.flops += 2 * result.size * plain[0].shape[-1]
        return result.view(Counted) if isinstance(result, np.ndarray) else result

    def __array_function__(self, function, types, arguments, options):
        result = super().__array_function__(function, types, arguments, options)
        return result.view(Counted) if type(result) is np.ndarray else result


def counted(decoder):
    """The same decoder, its weights counting."""

    def view(value):
        return Linear(*map(view, value)) if isinstance(value, Linear) else None if value is None else value.view(Counted)

    layers = [DecoderLayer(*map(view, layer)) for layer in decoder.layers]
    return dataclasses.replace(decoder, layers=layers, embedding=view(decoder.embedding), norm=view(decoder.norm), head=view(decoder.head))


@given(cases(), st.integers(0, 4))
def test_formulas_equal_the_products_that_happen(case, steps):
    decoder, prompt, layer = case
    instrumented, tokens, text = counted(decoder), len(prompt.hidden), int((~prompt.is_visual).sum())
    Counted.flops = 0
    run = prefill(instrumented, prompt, Withdrawal(layer))
    Counted.flops -= 2 * run.hidden.shape[0] * decoder.config.width * decoder.config.vocabulary  # the test's own logits
    logits(instrumented, run.hidden[-1:])
    assert Counted.flops == prefill_flops(decoder.config, tokens, text, layer)

    before = run.cache.tokens_per_layer
    Counted.flops = 0
    for _ in range(steps):
        prefill(instrumented, Asked(decoder.embedding[[0]], np.zeros(1, bool)), Withdrawal(layer), run.cache)
    assert Counted.flops == decode_flops(decoder.config, before, steps)
    assert run.cache.nbytes == cache_bytes(decoder.config, run.cache.tokens_per_layer)


@given(cases(), st.integers(0, 20))
def test_a_second_turn_counts_what_the_first_left_behind(case, new):
    decoder, prompt, layer = case
    instrumented = counted(decoder)
    run = prefill(instrumented, prompt, Withdrawal(layer))
    before = run.cache.tokens_per_layer
    turn = Asked(np.ones((new + 1, decoder.config.width), np.float32), np.zeros(new + 1, bool))
    Counted.flops = 0
    again = prefill(instrumented, turn, Withdrawal(layer), run.cache)
    Counted.flops -= 2 * (len(again.hidden) - 1) * decoder.config.width * decoder.config.vocabulary
    assert Counted.flops == prefill_flops(decoder.config, new + 1, new + 1, layer, before)


def test_a_layer_by_hand():
    """One head of width 2 in a layer of width 4 with 3 mlp channels; 2 tokens enter, 5 are cached."""
    from minivtw.model.decoder import DecoderConfig

    config = DecoderConfig(9, 4, 1, 1, 1, 2, 3, 1e-5, 1e4, 64)
    products = 2 * 4 * 6 + 2 * 2 * 5 + 2 * 5 * 2 + 2 * 2 * 4 + 2 * 4 * 6 + 2 * 3 * 4  # qkv scores context output gate_up down
    assert layer_flops(config, 2, 5) == 2 * products
