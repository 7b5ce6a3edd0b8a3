"""A method with a parameter

Write `checkerboard(layer)`, which *returns* a method: before `layer`, of the 8 · 8 patches only those
stay that are white on a chessboard, (row + column) even; all text stays. `np.cumsum(tokens.is_visual) - 1` numbers the
visual tokens from 0; decoded tokens are text. Saved as `mine.py`, its parameter can be swept without touching the file:

```sh
python -m minivtw.evaluate weights/minivtw-tiny/samples --methods mine.py:checkerboard,layer=0 mine.py:checkerboard,layer=2
```
"""

import numpy as np

from exercises import SCENE, expect, model
from minivtw.methods.text import known
from minivtw.model.cache import KVCache


def stub(layer=2):
    """Returns a method, a function of a layer's index and the tokens that enter it."""

    def method(index, tokens):
        if index != layer:
            return tokens
        return tokens[~tokens.is_visual]  # and the white fields?

    return method


def solution(layer=2):
    """Returns a method, a function of a layer's index and the tokens that enter it."""

    def method(index, tokens):
        if index != layer:
            return tokens
        row, column = np.divmod(np.cumsum(tokens.is_visual) - 1, 8)
        return tokens[~tokens.is_visual | ((row + column) % 2 == 0)]

    return method


def check(checkerboard):
    vlm = model()
    prompt = vlm.prepare(SCENE, "What color is the star?")
    first = int(prompt.is_visual.argmax())
    for layer in (2, 0, 7):
        method, reached = checkerboard(layer=layer), {}
        expect(callable(method), f"checkerboard(layer={layer}) must return a function, not {type(method).__name__}")

        def watched(index, tokens):
            reached[index] = known(method)(index, tokens)
            return reached[index]

        vlm.advance(vlm.embed(prompt), KVCache(vlm.config), watched)
        if layer:
            expect(len(reached[layer - 1]) == 77, f"with layer={layer}, all 77 tokens must enter layer {layer - 1}")
        stayed = reached[layer]
        text = int((~stayed.is_visual).sum())
        expect(text == 13, f"{text} of 13 text tokens stayed; all must")
        row, column = np.divmod(stayed.positions[stayed.is_visual] - first, 8)
        expect(len(row) == 32, f"32 of 64 patches are white, but {len(row)} stayed")
        for patch in zip(row.tolist(), column.tolist()):
            expect(sum(patch) % 2 == 0, "the patch in row {}, column {} is black, and stayed".format(*patch))
    return "32 patches, no two of them side by side; now sweep the layer"
