"""Break the positions

After withdrawal the text keeps its positions: 0–3, then 68–76, with a gap where the image was. Write a method that closes
the gap: before layer 5 the visual tokens leave, and from layer 5 on a token's rotary position is its place among the
tokens that the layer holds, 0, 1, 2, … A decoded token comes alone and goes on counting: its place is the number of
tokens that `tokens.cache[index]` holds already. `dataclasses.replace(tokens, rotary_positions=…)` gives tokens with other
positions. When it is right, the check says what it changes.
"""

from dataclasses import replace

import numpy as np

from exercises import SCENE, expect, model
from minivtw.methods import method_of
from minivtw.methods.text import known
from minivtw.model.cache import KVCache
from minivtw.model.tokens import embedded_text
from minivtw.search import divergence


def stub(index, tokens):
    """Called before every layer with its index and the tokens that enter it. Returns the tokens that go on."""
    if index == 5:
        tokens = tokens[~tokens.is_visual]
    return tokens  # at the positions that they had


def solution(index, tokens):
    """Called before every layer with its index and the tokens that enter it. Returns the tokens that go on."""
    if index == 5:
        tokens = tokens[~tokens.is_visual]
    if index >= 5:
        places = len(tokens.cache[index]) + np.arange(len(tokens))
        tokens = replace(tokens, rotary_positions=places)
    return tokens


def check(close_the_gap):
    vlm = model()
    prompt = vlm.embed(vlm.prepare(SCENE, "Where is the star?"))

    def two_tokens(method):
        """Logits after the prompt and after one more token; the rotary positions in the layers 4, 5 and 11."""
        turned, cache = [], KVCache(vlm.config)

        def watched(index, tokens):
            tokens = known(method)(index, tokens) if method else tokens
            if index in (4, 5, 11):
                turned.append(tokens.rotary_positions)
            return tokens

        found = [vlm.advance(prompt, cache, watched)[0]]
        return [*found, vlm.advance(embedded_text(vlm.decoder, [100]), cache, watched)[0]], turned, cache

    logits, turned, cache = two_tokens(close_the_gap)
    text = int((~prompt.is_visual).sum())
    held = cache.tokens_per_layer[5:]
    expect(held == [text + 1] * 7, f"layers 5 to 11 must hold the text alone, {text + 1} tokens after one more: {held}")
    expect(turned[0].tolist() == list(range(len(prompt.hidden))), "before layer 5 nothing must change")
    for layer, places in ((5, turned[1]), (11, turned[2])):
        expect(
            places.tolist() == list(range(text)),
            f"in layer {layer} the text's rotary positions must be 0 to {text - 1}, without a gap; they are {places}",
        )
    expect(
        turned[4].tolist() == [text],
        f"the first decoded token is token {text} of layer 5, but its rotary position is {turned[4]}",
    )
    full, kept = two_tokens(None)[0], two_tokens(method_of("withdraw:layer=5"))[0]
    apart = [float(divergence(one[0], full[0])) for one in (kept, logits)]
    return (
        f"the next token's KL divergence from the whole model is {apart[0]:.1e} with the gap and {apart[1]:.1e} without. "
        "It changes, because every distance across the image is another one; by little, because this text is short"
    )
