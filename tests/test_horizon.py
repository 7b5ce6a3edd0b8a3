"""What each patch is still worth, against leaving the patch out of a run of the whole model."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from minivtw.analysis.horizon import patch_worth
from minivtw.analysis.migration import answer_probability
from minivtw.model.tokens import EmbeddedPrompt
from tests.random_models import cases, places_with_visual, prefill


def probability(decoder, prompt, answer, layer=None, place=None):
    """The plain way: prompt and answer through all layers in one prefill; the token at `place` leaves before `layer`."""
    hidden = np.concatenate([prompt.hidden, decoder.embedding[answer[:-1]]])
    whole = EmbeddedPrompt(hidden, np.pad(prompt.is_visual, (0, len(answer) - 1)))
    leaves = lambda index, tokens: tokens[tokens.positions != place] if index == layer else tokens
    return answer_probability(decoder, prefill(decoder, whole, leaves).hidden, answer)


@given(cases(places=places_with_visual), st.lists(st.integers(0, 4), min_size=1, max_size=3))
def test_a_patch_is_worth_what_is_missing_without_it(case, answer):
    decoder, prompt, _ = case
    layers, places = range(decoder.config.layers), np.flatnonzero(prompt.is_visual)
    without = [[probability(decoder, prompt, answer, layer, place) for place in places] for layer in layers]
    full, worth = probability(decoder, prompt, answer), patch_worth(decoder, prompt, answer)
    np.testing.assert_allclose(worth, full - np.array(without), rtol=0, atol=1e-4 * max(full, np.max(without)))
    assert np.array_equal(patch_worth(decoder, prompt, answer, layers[1::2]), worth[1::2])
