"""How much of its attention does the text give to the image?

`pattern` are a layer's attention probabilities, (heads, tokens, tokens): row i says where token i looked, and sums to 1.
`is_visual` says which tokens are visual. Return the share that goes to visual tokens, from 0 to 1: the mean over all heads
and over the text tokens that come after the image. (Those before it cannot see it at all.)
"""

import numpy as np

from exercises import SCENE, expect, expect_number, model


def stub(pattern, is_visual):
    """pattern: (heads, tokens, tokens); is_visual: (tokens,) booleans. Returns a share from 0 to 1."""
    return float(pattern[:, :, is_visual].sum(axis=-1).mean())  # over whose rows?


def solution(pattern, is_visual):
    """pattern: (heads, tokens, tokens); is_visual: (tokens,) booleans. Returns a share from 0 to 1."""
    after_image = ~is_visual & (np.cumsum(is_visual) > 0)
    return float(pattern[:, after_image][:, :, is_visual].sum(axis=-1).mean())


def check(image_share):
    seen, vlm = {}, model()
    prompt = vlm.prepare(SCENE, "What color is the star?")
    vlm.answer(
        SCENE, "What color is the star?", withdraw="off", max_new_tokens=1, observe=lambda n, a: seen.update({n: a})
    )
    is_visual, shares = prompt.is_visual, []
    after = ~is_visual & (np.cumsum(is_visual) > 0)
    for layer in range(vlm.config.layers):
        pattern = seen[f"decoder.layers.{layer}.attention"]
        to_image = pattern[:, :, is_visual].sum(axis=-1)  # (heads, tokens)
        found, wanted = image_share(pattern, is_visual), float(to_image[:, after].mean())
        expect_number(found)
        expect(abs(found - to_image.mean()) > 1e-5, "the rows of the visual tokens count, too; only text rows should")
        expect(
            abs(found - to_image[:, ~is_visual].mean()) > 1e-5,
            "the text before the image counts, too, and it cannot see the image",
        )
        expect(
            abs(found - pattern[:, after][:, :, is_visual].mean()) > 1e-5,
            "take the sum over the visual tokens before the mean: that is the mean share of one token",
        )
        expect(abs(found - wanted) < 1e-5, f"in layer {layer} it must be {wanted:.4f}, not {found:.4f}")
        shares.append(wanted)
    return f"from {min(shares):.0%} to {max(shares):.0%}, layer by layer"
