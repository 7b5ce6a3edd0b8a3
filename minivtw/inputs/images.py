"""Files to pixels: open a picture safely, check its size, and turn levels into the numbers that a model sees."""

import pathlib
import warnings

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ..errors import InputError

MOST_PIXELS = 100_000_000  # of a picture, before and after resizing


def open_image(source):
    """A path, or a Pillow image, to an upright RGB image; of an animation, the first frame.

    Raises InputError for what is missing, broken, empty or too large to be a picture.
    """
    if isinstance(source, Image.Image):
        return upright_rgb(source, "the image")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(source) as image:
                return upright_rgb(image, source)
    except UnidentifiedImageError as error:
        empty = pathlib.Path(source).stat().st_size == 0
        raise InputError(f"{source} is {'empty' if empty else 'not an image that Pillow can read'}") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InputError(f"{source} is too large: {error}") from error
    except (OSError, SyntaxError, ValueError) as error:  # SyntaxError is how Pillow calls a broken PNG
        raise InputError(f"cannot read the image {source}: {getattr(error, 'strerror', None) or error}") from error


def upright_rgb(image, name):
    """Turned as EXIF says, laid on white where transparent (as transformers' processors do), any mode made RGB."""
    if image.width * image.height == 0:
        raise InputError(f"{name} has no pixels")
    check_size(image.width, image.height, name)
    image = ImageOps.exif_transpose(image)
    if "A" in image.getbands() or "transparency" in image.info:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB")


def check_size(width, height, name):
    """Raise InputError for more pixels than any picture needs."""
    if width * height > MOST_PIXELS:
        raise InputError(f"{name} would be {width} x {height} pixels; at most {MOST_PIXELS:,} are allowed")


def normalised(image, scale, mean, std):
    """A Pillow RGB image to (levels * scale - mean) / std, (3, height, width) float32; None leaves a step out."""
    pixels = np.asarray(image, np.float32).transpose(2, 0, 1)  # (3, height, width)
    if scale:
        pixels = pixels * np.float32(scale)
    if mean:
        pixels = (pixels - np.float32(mean)[:, None, None]) / np.float32(std)[:, None, None]
    return np.ascontiguousarray(pixels)
