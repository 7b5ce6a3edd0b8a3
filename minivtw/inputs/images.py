"""How large an image may be, and its levels turned into the numbers that a model sees."""

import os
from dataclasses import dataclass

import numpy as np
from PIL import Image

from ..errors import InputError

MOST_PIXELS = 8192 * 6144  # of an image, before and after resizing: what a camera of 50 megapixels takes
RAISED = "MINIVTW_MOST_PIXELS"  # the environment variable that says another number


def check_size(width: int, height: int, name: str) -> None:
    """Raise InputError for more pixels than an image may have, whatever the size of its file."""
    said = os.environ.get(RAISED, str(MOST_PIXELS))
    if not (said.isascii() and said.isdigit() and len(said) < 20):
        raise InputError(f"{RAISED} must be a number of pixels, not {said[:80]}")
    if width * height > int(said):
        raise InputError(
            f"{name} would be {width} x {height} pixels; at most {int(said):,} are allowed ({RAISED} sets another number)"
        )


def resized(image: Image.Image, size: tuple[int, int], resample: int) -> Image.Image:
    """A Pillow image resized to (width, height), the width first; resample: Pillow's number of the interpolation.

    Levels are rounded between the two passes, so their order shows in the pixels, by up to 19 of 255. Pillow takes the
    height of a tall image first from version 13 on, and the width before; published models were trained on the latter.
    Raises InputError for more pixels than an image may have, in either pass.
    """
    for width, height in ((size[0], image.height), size):
        check_size(width, height, "the resized image")
        image = image.resize((width, height), resample)
    return image


@dataclass(frozen=True)
class Levels:
    """How the levels of an image become numbers: (levels * scale - mean) / std; None leaves a step out."""

    scale: float | None = 1 / 255
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None

    def __call__(self, image: Image.Image) -> np.ndarray:
        """A Pillow RGB image to pixels, (3, height, width) float32."""
        pixels = np.asarray(image, np.float32).transpose(2, 0, 1)  # (3, height, width)
        if self.scale:
            pixels = pixels * np.float32(self.scale)
        if self.mean:
            mean, std = np.array([self.mean, self.std], np.float32)[:, :, None, None]  # (3, 1, 1) each
            pixels = (pixels - mean) / std
        return np.ascontiguousarray(pixels)
