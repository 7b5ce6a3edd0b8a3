"""Distances are all that counts

Write a method that adds 100 to the rotary position of every token in every layer, in prefill and in decode. Nothing
should happen to the answer: rotary positions enter attention as differences, so the scores of any two tokens stay.
"""

from dataclasses import replace

import numpy as np

from exercises import SCENE, expect, model
from minivtw.methods.text import known
from minivtw.model.cache import KVCache
from minivtw.model.tokens import embedded_text


def stub(index, tokens):
    """Called before every layer with its index and the tokens that enter it. Returns the tokens that go on."""
    return tokens  # replace(tokens, rotary_positions=…)


def solution(index, tokens):
    """Called before every layer with its index and the tokens that enter it. Returns the tokens that go on."""
    return replace(tokens, rotary_positions=tokens.positions + 100)


def check(moved):
    vlm = model()
    prompt, turned = vlm.embed(vlm.prepare(SCENE, "Where is the star?")), []

    def watched(index, tokens):
        tokens = known(moved)(index, tokens)
        turned.append((index, tokens.rotary_positions - tokens.positions))
        return tokens

    def logits(method):
        cache = KVCache(vlm.config)
        first = vlm.advance(prompt, cache, method)[0]
        return np.array([first, vlm.advance(embedded_text(vlm.decoder, [100]), cache, method)[0]])

    after, before = logits(watched), logits(None)
    for index, by in turned:
        expect((by != 0).any(), f"in layer {index} the rotary positions are as they were")
        expect(
            (by == 100).all(),
            f"in layer {index} the rotary positions moved by {by.min()} to {by.max()}, not by 100: `rotary_positions` are already moved when the next layer comes, `positions` never are",
        )
    apart = np.abs(after - before).max() / np.abs(before).max()
    expect(apart < 1e-3, f"the logits changed by {apart:.1%} of the largest")
    return f"every token stands 100 places further on, and no logit changed by more than {apart:.0e} of the largest: rounding"
