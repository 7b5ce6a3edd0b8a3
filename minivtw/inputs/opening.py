"""An image from anywhere, opened safely: whatever is wrong with it is one InputError, and it cannot grow, run or wait."""

import contextlib
import ctypes
import logging
import os
import stat
import warnings
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ..errors import InputError
from .images import check_size

# Of what Pillow reads, what is left alone: EPS is a program, which it would run; in the others another image may lie
# than the one whose size they say.
NOT_READ = ("EPS", "FITS", "ICNS", "ICO", "IPTC")
ORIENTATION = 0x0112  # EXIF's tag


def open_image(source: Any) -> Image.Image:
    """A path, a binary stream or a Pillow image, to an upright RGB image; of an animation, the first frame.

    Raises InputError for what is missing, broken, empty, too large or no image; the cause is chained.
    """
    is_path, is_image = isinstance(source, str | os.PathLike), isinstance(source, Image.Image)
    name = os.fspath(source) if is_path else "the image" if is_image else "the stream"
    cannot = f"cannot read the image {name or repr(name)}" if is_path else f"cannot read {name}"
    try:
        if is_image:
            return upright_rgb(source, name)
        if not is_path and not hasattr(source, "read"):
            kind = type(source).__name__
            raise InputError(f"an image is a path, a binary stream or a Pillow image, not an object of type {kind}")
        if is_path and not stat.S_ISREG(os.stat(source).st_mode):  # opening a pipe may wait for ever
            raise InputError(f"{cannot}: a folder, a pipe or a device is no image")
        with open(source, "rb") if is_path else contextlib.nullcontext(source) as file:
            if not file.seek(0, os.SEEK_END):
                raise InputError(f"{name} is empty")
            with Image.open(file) as image:
                return upright_rgb(image, name)
    except InputError:
        raise
    except UnidentifiedImageError as error:
        raise InputError(f"{name} is not an image that Pillow can read") from error
    except Exception as error:  # whatever Pillow runs into, from its own limit to AttributeError and struct.error
        why = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise InputError(f"{cannot}: {why}") from error


def refuse_swapped(image: Any, text: Any) -> None:
    """Raise InputError where the question is a file, and what stands for the image is not."""
    is_file = isinstance(text, os.PathLike) or (isinstance(text, str) and os.path.isfile(text))
    if is_file and isinstance(image, str) and not os.path.isfile(image):
        raise InputError(f"{text} is a file where the question belongs: answer(image, prompt), but ask(prompt, image)")


def upright_rgb(image: Image.Image, name: str) -> Image.Image:
    """Turned as EXIF says, laid on white where transparent (as transformers' processors do), any mode made RGB."""
    if image.format in NOT_READ:
        raise InputError(f"{name} is of the kind {image.format}, which is not read; save it as PNG")
    if image.width * image.height == 0:
        raise InputError(f"{name} has no pixels")
    check_size(image.width, image.height, name)
    image.load()
    turn = None
    with contextlib.suppress(Exception):  # as in `open_image`; an image is not the worse for damaged notes about it
        turn = image.getexif().get(ORIENTATION)
    image = eight_bits(image)
    has_holes = "A" in image.getbands() or "transparency" in image.info
    rgb = on_white(image) if has_holes else image.convert("RGB")  # a copy, whatever the mode
    rgb.info = {}
    rgb.getexif()[ORIENTATION] = turn if isinstance(turn, int) else 1
    ImageOps.exif_transpose(rgb, in_place=True)
    return rgb


def eight_bits(image: Image.Image) -> Image.Image:
    """Levels of grey from 0 to 65535 to levels from 0 to 255. Pillow's own `convert` makes all above 255 white."""
    if not image.mode.startswith("I") or (image.mode == "I" and np.max(image.getextrema()) <= 255):
        return image
    grey = image.convert("I").point(lambda level: level * (1 / 257) + 0.5).convert("L")
    if isinstance(image.info.get("transparency"), int):
        grey.info["transparency"] = round(image.info["transparency"] / 257)
    return grey


def on_white(image: Image.Image) -> Image.Image:
    """An image with transparent places, on white, RGB. The same levels as `Image.alpha_composite`, in half the memory."""
    image, white = image if image.mode == "RGBA" else image.convert("RGBA"), Image.new("RGB", image.size, "white")
    white.paste(image, mask=image)
    return white


def hush() -> None:
    """For commands: what Pillow, libtiff and NumPy have to say besides does not reach standard error, from any thread.

    It changes the whole process, once and for good: a filter set for the time of one image would be lost, or
    never reset, where several threads open images.
    """
    warnings.filterwarnings("ignore", module=r"PIL\.")
    warnings.simplefilter("ignore", RuntimeWarning)  # NumPy's; what is not finite is found where a layer ends
    logging.getLogger("PIL").setLevel(logging.CRITICAL)
    with contextlib.suppress(AttributeError, OSError):  # libtiff stays loud where it is a library of its own
        library = ctypes.CDLL(Image.core.__file__)
        library.TIFFSetErrorHandler(None)
        library.TIFFSetWarningHandler(None)
