"""How large a picture may be, and its levels turned into the numbers that a model sees."""

import os

import numpy as np

from ..errors import InputError

MOST_PIXELS = 8192 * 6144  # of a picture, before and after resizing: what a camera of 50 megapixels takes
RAISED = "MINIVTW_MOST_PIXELS"  # the environment variable that says another number


def check_size(width, height, name):
    """Raise InputError for more pixels than a picture may have, whatever the size of its file."""
    said = os.environ.get(RAISED, str(MOST_PIXELS))
    if not (said.isascii() and said.isdigit() and len(said) < 20):
        raise InputError(f"{RAISED} must be a number of pixels, not {said[:80]}")
    if width * height > int(said):
        raise InputError(
            f"{name} would be {width} x {height} pixels; at most {int(said):,} are allowed ({RAISED} sets another number)"
        )


def normalised(image, scale, mean, std):
    """A Pillow RGB image to (levels * scale - mean) / std, (3, height, width) float32; None leaves a step out."""
    pixels = np.asarray(image, np.float32).transpose(2, 0, 1)  # (3, height, width)
    if scale:
        pixels = pixels * np.float32(scale)
    if mean:
        pixels = (pixels - np.float32(mean)[:, None, None]) / np.float32(std)[:, None, None]
    return np.ascontiguousarray(pixels)
