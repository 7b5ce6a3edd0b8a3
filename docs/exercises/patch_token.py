"""Which token shows this patch?

The image is cut into 8 rows of 8 patches, and the prompt holds one visual token for each, in the order in which one
reads. `is_visual` says of each of the prompt's tokens whether it is one. Give the index, in the prompt, of the token for
the patch in a row and a column, both counted from 0. (The text before the image has a length, too.)
"""

import numpy as np

from exercises import SCENE, expect, model


def stub(is_visual, row, column):
    """is_visual: (tokens,) booleans. Returns an index into them."""
    return 8 * row + column


def solution(is_visual, row, column):
    """is_visual: (tokens,) booleans. Returns an index into them."""
    return np.flatnonzero(is_visual)[8 * row + column]


def check(patch_token):
    vlm = model()
    for system in (None, "Answer in one word."):
        is_visual = vlm.prepare(SCENE, "What color is the star?", system=system).is_visual
        first = int(is_visual.argmax())
        for row, column in ((0, 0), (0, 7), (3, 1), (7, 7)):
            found, wanted = patch_token(is_visual, row, column), first + 8 * row + column
            where = f"row {row}, column {column} of a prompt whose image begins at token {first}"
            expect(found != first + 8 * column + row or row == column, f"rows and columns are exchanged: {where}")
            expect(found == wanted, f"the token for {where} is {wanted}, not {found}")
    return "whatever text comes before the image, the patch is found"
