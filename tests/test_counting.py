"""The formulas of FLOPs and bytes against the matrix products that really happen."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minivtw.counting import cache_bytes, layer_flops, plain_run, prompt_flops
from minivtw.methods.shelf import dart, divprune, fastervlm, fastv, looked_at, pyramiddrop, sparsevlm, visionzip
from minivtw.methods.withdrawal import adaptive, freeze, random_tokens, then, withdraw
from minivtw.model.layers import Linear
from minivtw.model.tokens import EmbeddedPrompt, LayerCount
from minivtw.model.weights import DecoderConfig, DecoderLayer
from tests.random_models import cases, decoders, prefill, random_prompt, random_tower, renumbered


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
        return (
            Linear(*map(view, value)) if isinstance(value, Linear) else None if value is None else value.view(Counted)
        )

    layers = [DecoderLayer(*map(view, layer)) for layer in decoder.layers]
    return dataclasses.replace(
        decoder, layers=layers, embedding=view(decoder.embedding), norm=view(decoder.norm), head=view(decoder.head)
    )


def own_logits(decoder, run):
    """FLOPs of the logits that the tests' `prefill` makes of all tokens but the last; a model makes one row."""
    return 2 * (len(run.hidden) - 1) * decoder.config.width * decoder.config.vocabulary


@st.composite
def methods(draw, layers):
    """Any method, with what it looks at, and two of them one after the other."""
    one = st.one_of(
        st.integers(0, layers).map(withdraw),
        st.frozensets(st.integers(0, layers)).map(freeze),
        st.builds(adaptive, st.sampled_from([0.0, 0.3, 0.6, 1.0]), st.integers(1, 2)),
        st.integers(0, layers).map(random_tokens),
        st.integers(0, layers).map(renumbered),
        *(st.builds(make, st.integers(1, layers)) for make in (fastv, looked_at, dart)),
        st.builds(pyramiddrop, st.frozensets(st.integers(1, layers), min_size=1)),
        st.builds(sparsevlm, st.frozensets(st.integers(1, layers), min_size=1)),
        st.builds(divprune, st.sampled_from([0.0, 0.4, 1.0])),
    )
    return draw(st.one_of(st.none(), one, st.tuples(one, one).map(lambda pair: then(*pair))))


@given(cases(), st.integers(0, 4), st.data())
def test_what_is_counted_equals_the_products_that_happen(case, steps, data):
    decoder, prompt, _ = case
    method = data.draw(methods(decoder.config.layers))
    instrumented, is_text = counted(decoder), np.zeros(1, bool)
    Counted.flops = 0
    run = prefill(instrumented, prompt._replace(hidden=prompt.hidden.view(Counted)), method)
    assert Counted.flops - own_logits(decoder, run) == prompt_flops(decoder.config, run.ran)
    for _ in range(steps):
        Counted.flops = 0
        step = prefill(instrumented, EmbeddedPrompt(decoder.embedding[[0]], is_text), method, run.cache)
        assert Counted.flops == prompt_flops(decoder.config, step.ran)
    assert run.cache.nbytes == cache_bytes(decoder.config, run.cache.tokens_per_layer)


@given(cases(), st.integers(0, 20), st.data())
def test_a_second_turn_counts_what_the_first_left_behind(case, new, data):
    decoder, prompt, _ = case
    method = data.draw(methods(decoder.config.layers))
    instrumented = counted(decoder)
    cache = prefill(instrumented, prompt, method).cache
    hidden = np.random.default_rng(new).standard_normal((new + 1, decoder.config.width)).astype(np.float32)
    turn = EmbeddedPrompt(hidden.view(Counted), np.arange(new + 1) < new // 2)
    Counted.flops = 0
    again = prefill(instrumented, turn, method, cache)
    assert Counted.flops - own_logits(decoder, again) == prompt_flops(decoder.config, again.ran)


@given(cases(), st.integers(0, 20))
def test_a_plain_run_is_what_happens_without_a_method(case, before):
    decoder, prompt, _ = case
    cache = prefill(
        decoder, EmbeddedPrompt(np.ones((before, decoder.config.width), np.float32), np.zeros(before, bool))
    ).cache
    assert list(prefill(decoder, prompt, None, cache).ran) == plain_run(decoder.config, len(prompt.hidden), before)


@given(decoders(), st.sampled_from([fastervlm, visionzip]), st.booleans(), st.sampled_from([0.0, 0.5, 1.0]))
def test_what_a_method_asks_of_the_tower_is_counted(decoder, make, class_token, keep):
    tower = random_tower(4, class_token, drop_first=class_token)
    view = [layer._replace(qkv=Linear(*(part.view(Counted) for part in layer.qkv))) for layer in tower.vision.layers]
    tower = tower._replace(vision=dataclasses.replace(tower.vision, layers=view))
    prompt = random_prompt(decoder, [False] + 16 * [True] + 3 * [False])._replace(tower=tower)
    Counted.flops = 0
    run = prefill(counted(decoder), prompt, make(keep))
    assert Counted.flops - own_logits(decoder, run) == prompt_flops(decoder.config, run.ran)


def test_a_layer_by_hand():
    """One head of width 2 in a layer of width 4 with 3 mlp channels; 2 tokens enter, 5 are cached."""
    config = DecoderConfig(9, 4, 1, 1, 1, 2, 3, 1e-5, 1e4, 64)
    products = (
        2 * 4 * 6 + 2 * 2 * 5 + 2 * 5 * 2 + 2 * 2 * 4 + 2 * 4 * 6 + 2 * 3 * 4
    )  # qkv scores context output gate_up down
    assert layer_flops(config, LayerCount(entered=2, worked=2, cached=5, extra_flops=7)) == 2 * products + 7


LLAVA_7B = DecoderConfig(32000, 4096, 32, 32, 32, 128, 11008, 1e-5, 1e4, 4096)  # Vicuna-7B in LLaVA-1.5


def withdrawn_run(config, tokens, text, layer):
    """What the layers do if all but `text` of the tokens leave before `layer`."""
    return plain_run(config, tokens)[:layer] + plain_run(config, text)[layer:]


def test_the_flops_that_the_paper_reports():
    """Lin et al. 2024: 8.48 -> 4.68 TFLOP with 576 visual and 64 text tokens, K = 16 of 32."""
    assert prompt_flops(LLAVA_7B, plain_run(LLAVA_7B, 640)) == pytest.approx(8.48e12, rel=0.005)
    assert prompt_flops(LLAVA_7B, withdrawn_run(LLAVA_7B, 640, 64, 16)) == pytest.approx(4.68e12, rel=0.005)


def test_the_same_in_the_way_of_fastv():
    """Chen et al. 2024, a layer: 4 n d^2 + 2 n^2 d + 2 n d m. A multiplication with its addition is one, and
    the feed-forward has two matrices where Llama's has three."""
    width, mlp_width = LLAVA_7B.width, LLAVA_7B.mlp_width

    def fastv(tokens):
        return 4 * tokens * width**2 + 2 * tokens**2 * width + 2 * tokens * width * mlp_width

    for tokens in (64, 640):
        third_matrix = tokens * width * mlp_width
        assert layer_flops(LLAVA_7B, LayerCount(tokens, tokens, tokens, 0)) == 2 * (fastv(tokens) + third_matrix)
    assert 32 * fastv(640) == pytest.approx(3.3e12, rel=0.01)
    ours = [layer_flops(LLAVA_7B, LayerCount(tokens, tokens, tokens, 0)) for tokens in (64, 640)]
    assert fastv(64) / fastv(640) == pytest.approx(ours[0] / ours[1], abs=0.002)
