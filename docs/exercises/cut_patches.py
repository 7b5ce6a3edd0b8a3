"""Cut an image into patches

`pixels` is an image as the vision tower gets it, (channels, height, width). Cut it into squares of `side` pixels and lay
each square out as one row: (patches, channels · side · side). The patches go row by row, as one reads; within a patch
come first all pixels of the first channel, row by row, then those of the next. Two loops will do, or one `reshape` and
one `transpose`.
"""

import numpy as np

from exercises import SCENE, expect, expect_array, model
from minivtw.model.vision import patchify


def stub(pixels, side):
    """pixels: (channels, height, width). Returns (patches, channels * side * side)."""
    return pixels.reshape(-1, pixels.shape[0] * side * side)  # the right shape, but what is in a row?


def solution(pixels, side):
    """pixels: (channels, height, width). Returns (patches, channels * side * side)."""
    channels, height, width = pixels.shape
    patches = []
    for top in range(0, height, side):
        for left in range(0, width, side):
            patches.append(pixels[:, top : top + side, left : left + side].reshape(-1))
    return np.stack(patches)


def check(cut_patches):
    pixels, side = model().prepare(SCENE, "What color is the star?").tiles[0], 16
    expected, found = patchify(pixels, side), cut_patches(pixels, side)
    if isinstance(found, np.ndarray) and found.shape == expected.shape:
        by_columns = expected.reshape(8, 8, -1).swapaxes(0, 1).reshape(expected.shape)
        expect(not np.allclose(found, by_columns), "the patches go down the columns; they must go along the rows")
        channels_last = expected.reshape(-1, 3, side * side).swapaxes(1, 2).reshape(expected.shape)
        expect(not np.allclose(found, channels_last), "in a patch the channels come last; they must come first")
        is_cut_anyhow = np.allclose(np.sort(found.sum(axis=1)), np.sort(expected.sum(axis=1)), atol=1e-2)
        expect(
            is_cut_anyhow, "a row of the result is not one square of the image: its pixels come from several patches"
        )
    expect_array(found, expected, "the array of patches")
    wide = np.arange(3 * 4 * 8, dtype=np.float32).reshape(3, 4, 8)
    expect_array(cut_patches(wide, 2), patchify(wide, 2), "the array of patches of an image that is not square")
    return "64 patches of 3 x 16 x 16 = 768 numbers, as `patchify` cuts them"
