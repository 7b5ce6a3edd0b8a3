"""Files to pixels: open a picture safely, then resize, crop or tile, and normalise it as its model's processor does."""

import math
import pathlib
import warnings
from typing import NamedTuple

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


class ClipPixels(NamedTuple):
    """CLIP's preprocessing, in the order it happens; None leaves a step out."""

    shortest_edge: int | None  # resize until the shorter side is this long …
    exact_size: tuple[int, int] | None  # … or to exactly this (height, width)
    resample: int  # Pillow's number of the interpolation; 3 is bicubic
    crop: tuple[int, int] | None  # (height, width) cut out of the centre
    scale: float | None  # 1/255
    mean: tuple[float, float, float] | None
    std: tuple[float, float, float] | None

    def __call__(self, image):
        """A Pillow RGB image to pixels, (3, height, width) float32."""
        image = self.resize(image)
        if self.crop:
            image = centre_crop(image, *self.crop)
        return normalised(image, self.scale, self.mean, self.std)

    def resize(self, image):
        height, width = image.height, image.width
        if self.exact_size:
            height, width = self.exact_size
        elif self.shortest_edge:
            shorter, longer = sorted((height, width))
            longer = int(self.shortest_edge * longer / shorter)  # truncated, as in transformers
            height, width = (self.shortest_edge, longer) if height <= width else (longer, self.shortest_edge)
        check_size(width, height, "the resized image")
        return image.resize((width, height), self.resample)

    @property
    def size(self):
        """(height, width) of the result, where the settings fix it."""
        return self.crop or self.exact_size


def centre_crop(image, height, width):
    """The middle height x width pixels; what lies beyond the image is black."""
    top, left = (image.height - height) // 2, (image.width - width) // 2
    return image.crop((left, top, left + width, top + height))


class TiledPixels(NamedTuple):
    """Idefics3's preprocessing: the picture cut into square tiles, row by row, and last one small view of it all.

    The picture is resized twice: to its longest edge, keeping its shape, then to whole tiles. A picture of one tile is
    its own view of it all.
    """

    longest_edge: int | None  # resize until the longer side is this long; None: leave it
    side: int  # of a tile
    splits: bool  # False: only the view of it all
    resample: int  # Pillow's number of the interpolation; 1 is Lanczos
    scale: float | None  # 1/255
    mean: tuple[float, float, float] | None
    std: tuple[float, float, float] | None

    def __call__(self, image, most_tiles=None):
        """A Pillow RGB image to tiles (tiles, 3, side, side) float32 and their grid (rows, columns), (0, 0) if uncut.

        `most_tiles` shortens the longest edge, by whole tiles, until there are no more tiles than that.
        """
        side = self.side
        edge = self.edge_within(image.height, image.width, most_tiles)
        if edge:
            height, width = scaled(image.height, image.width, edge)
            image = image.resize((width, height), self.resample)
        rows, columns = self.grid(image.height, image.width)
        image = image.resize((columns * side, rows * side), self.resample)
        if rows * columns == 1:
            return self.normalised(image)[None], (0, 0)
        boxes = [(column * side, row * side) for row in range(rows) for column in range(columns)]
        views = [image.crop((left, top, left + side, top + side)) for left, top in boxes]
        views.append(image.resize((side, side), self.resample))
        return np.stack([self.normalised(view) for view in views]), (rows, columns)

    def normalised(self, image):
        return normalised(image, self.scale, self.mean, self.std)

    def grid(self, height, width):
        """Rows and columns of tiles that a picture of this size is stretched to."""
        if not self.splits:
            return 1, 1
        ratio = width / height
        if width >= height:
            columns = math.ceil(width / self.side)
            return math.ceil(int(columns * self.side / ratio) / self.side), columns
        rows = math.ceil(height / self.side)
        return rows, math.ceil(int(rows * self.side * ratio) / self.side)

    def edge_within(self, height, width, most_tiles):
        """The longest edge under which the picture becomes at most so many tiles, the view of it all included."""
        longest = self.longest_edge or max(height, width)
        for edge in (self.longest_edge, *range((longest - 1) // self.side * self.side, 0, -self.side)):
            rows, columns = self.grid(*(scaled(height, width, edge) if edge else (height, width)))
            if most_tiles is None or rows * columns == 1 or rows * columns + 1 <= most_tiles:
                break
        return edge


def scaled(height, width, longest_edge):
    """(height, width) of a picture whose longer side becomes `longest_edge`; the shorter one is even, as in Idefics3."""
    ratio = width / height
    if width >= height:
        width = longest_edge
        height = int(width / ratio)
        height = max(height + height % 2, 1)
    else:
        height = longest_edge
        width = int(height * ratio)
        width = max(width + width % 2, 1)
    return height, width


class GridPixels(NamedTuple):
    """nanoVLM's preprocessing: a picture of whole tiles, cut row by row, and first one small view of it all.

    Levels go from 0 to 1. A picture of one tile is its own view of it all.
    """

    side: int  # of a tile
    longest_edge: int  # no side becomes longer than this
    fills: bool  # make the longer side that long, even of a small picture
    views: bool  # False: no view of it all

    def __call__(self, image, most_tiles=None):
        """A Pillow RGB image to tiles (tiles, 3, side, side) float32 and their grid (rows, columns).

        `most_tiles` shortens the longest edge, by whole tiles, until there are no more tiles than that.
        """
        side = self.side
        rows, columns = self.grid_within(image.height, image.width, most_tiles)
        image = image.resize((columns * side, rows * side), Image.Resampling.BICUBIC)
        pixels = normalised(image, 1 / 255, None, None)  # (3, rows * side, columns * side)
        grid = pixels.reshape(3, rows, side, columns, side).transpose(1, 3, 0, 2, 4)
        tiles = grid.reshape(rows * columns, 3, side, side)
        if self.views and rows * columns > 1:
            tiles = np.concatenate([view_of_all(pixels, side)[None], tiles])
        return tiles, (rows, columns)

    def grid_within(self, height, width, most_tiles):
        """Rows and columns of tiles, at most so many, the view of it all included."""
        for edge in range(self.longest_edge, 0, -self.side):
            rows, columns = self.grid(height, width, edge)
            tiles = rows * columns + (self.views and rows * columns > 1)
            if most_tiles is None or tiles <= most_tiles:
                break
        return rows, columns

    def grid(self, height, width, longest_edge):
        """Rows and columns of tiles: the longer side rounded up to whole tiles, then the shorter one in proportion."""
        longer, shorter = max(height, width), min(height, width)
        target = longest_edge if self.fills else min(longest_edge, math.ceil(longer / self.side) * self.side)
        other = max(math.ceil(shorter * (target / longer) / self.side), 1)
        return (other, target // self.side) if width >= height else (target // self.side, other)


def view_of_all(pixels, side):
    """Pixels (3, height, width) shrunk to (3, side, side), bilinear and in floats, not in levels."""
    channels = [Image.fromarray(channel).resize((side, side), Image.Resampling.BILINEAR) for channel in pixels]
    return np.stack([np.asarray(channel, np.float32) for channel in channels])
