"""A scene to pixels: antialiased shapes on a background of low saturation.

`Style` holds what the world leaves open (how deep a star is cut, how tall a digit stands in its circle, how edges are
smoothed). Pictures are drawn in the plain style by default; training draws each scene in a style of its own, so that
the model also reads pictures of the same world that another program drew.
"""

import functools
import pathlib
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from scenes import CANVAS, Scene, Thing


class Style(NamedTuple):
    """The freedoms of the drawing, lengths as shares of an object's radius."""

    star_inner: float = 0.45  # where a star's inner corners lie
    square_half: float = 0.5**0.5  # half a square's side: its corners on the circle
    triangle_base: float = 0.5  # how far the base lies below the centre
    triangle_half: float = 0.75**0.5  # half the base: with both, corners on the circle
    cross_half: float = 0.95  # half a cross's width: its corners about on the circle
    ring_hole: float = 0.55
    digit_height: float = 1.6
    supersampling: int = 4  # the side of the square of samples behind a pixel
    font: int = 0  # which of `bold_fonts()`


def vary_style(rng: np.random.Generator) -> Style:
    """A style drawn from everything that still is the same world."""
    style = Style(
        star_inner=rng.uniform(0.36, 0.52),
        cross_half=rng.uniform(0.84, 1.0),
        ring_hole=rng.uniform(0.51, 0.59),
        digit_height=rng.uniform(1.2, 2.0),
        supersampling=int(rng.integers(2, 5)),
        font=int(rng.integers(len(bold_fonts()))),
    )
    if rng.random() < 0.4:  # shapes measured by their box rather than by their circle
        style = style._replace(
            square_half=rng.uniform(0.7, 0.88), triangle_base=rng.uniform(0.5, 0.9), triangle_half=rng.uniform(0.8, 1.0)
        )
    return style


def draw(scene: Scene, style: Style | None = None) -> Image.Image:
    """The scene as an RGB image of CANVAS x CANVAS pixels; without a style, a plain one with the font of its seed."""
    rng = np.random.default_rng([scene.seed, 1])
    style = style or Style(font=int(rng.integers(len(bold_fonts()))))
    pixels = np.empty((CANVAS, CANVAS, 3), np.float32)  # (rows, columns, channels)
    ramp = np.linspace(-1, 1, CANVAS, dtype=np.float32)
    pixels[:] = scene.background
    pixels += (scene.gradient[0] * ramp[None, :] + scene.gradient[1] * ramp[:, None])[:, :, None]
    for thing in scene.things:
        cover, top, left = _coverage(thing, style)  # (rows, columns) in 0 ... 1
        height, width = cover.shape
        window = pixels[top : top + height, left : left + width]
        window += cover[:, :, None] * (np.asarray(thing.rgb, np.float32) - window)
    if scene.noise:
        pixels += rng.uniform(-scene.noise, scene.noise, pixels.shape).astype(np.float32)
    return Image.fromarray(np.clip(pixels + 0.5, 0, 255).astype(np.uint8))


def _coverage(thing: Thing, style: Style) -> tuple[np.ndarray, int, int]:
    """How much of each pixel an object covers, (rows, columns) float32, and the window's top row and left column."""
    reach = int(thing.radius * 1.25) + 3
    left, top = max(int(thing.x) - reach, 0), max(int(thing.y) - reach, 0)
    right, bottom = min(int(thing.x) + reach, CANVAS), min(int(thing.y) + reach, CANVAS)
    scale = style.supersampling
    mask = Image.new("L", ((right - left) * scale, (bottom - top) * scale))
    center = np.array([(thing.x - left) * scale, (thing.y - top) * scale])
    pen, radius = ImageDraw.Draw(mask), thing.radius * scale
    if thing.is_digit:
        _draw_digit(pen, thing.shape, center, style.digit_height * radius, style.font)
    elif thing.shape in ("circle", "ring"):
        pen.ellipse([*(center - radius), *(center + radius)], fill=255)
        if thing.shape == "ring":
            pen.ellipse([*(center - style.ring_hole * radius), *(center + style.ring_hole * radius)], fill=0)
    else:
        angle = np.deg2rad(thing.turn)
        rotation = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
        corners = center + radius * np.asarray(_corners(thing.shape, style)) @ rotation  # (corners, 2)
        pen.polygon([tuple(corner) for corner in corners], fill=255)
    cover = np.asarray(mask.reduce(scale), np.float32) / 255
    return cover, top, left


def _corners(shape: str, style: Style) -> list[tuple[float, float]]:
    """The corners (x, y) of a polygon in a circle of radius 1 around the origin, y downwards."""
    if shape == "square":
        half = style.square_half
        return [(-half, -half), (half, -half), (half, half), (-half, half)]
    if shape == "triangle":
        return [(0, -1), (style.triangle_half, style.triangle_base), (-style.triangle_half, style.triangle_base)]
    if shape == "star":
        angles = np.pi * np.arange(10) / 5
        lengths = np.where(np.arange(10) % 2, style.star_inner, 1)
        return list(zip(lengths * np.sin(angles), -lengths * np.cos(angles)))
    arm, end = style.cross_half / 3, style.cross_half  # an arm is a third as wide as the cross
    return [(-arm, -end), (arm, -end), (arm, -arm), (end, -arm), (end, arm), (arm, arm),
            (arm, end), (-arm, end), (-arm, arm), (-end, arm), (-end, -arm), (-arm, -arm)]  # fmt: skip


def _draw_digit(pen: ImageDraw.ImageDraw, figure: str, center: np.ndarray, height: float, font: int) -> None:
    """Write a figure of `height` pixels around the centre."""
    path = bold_fonts()[font]
    size = 8 * round(height / 8 / _figure_height(path))  # few distinct sizes, so that opened fonts are used again
    face = _open_font(path, max(size, 8))
    # Pillow's own typeface has no bold cut: it is thickened with a stroke.
    stroke = 0 if path else max(round(size * 0.03), 1)
    left, top, right, bottom = pen.textbbox((0, 0), figure, font=face, stroke_width=stroke)
    corner = (center[0] - (left + right) / 2, center[1] - (top + bottom) / 2)
    pen.text(corner, figure, fill=255, font=face, stroke_width=stroke)


@functools.cache
def bold_fonts() -> tuple[str, ...]:
    """Paths of the bold sans-serif typefaces found on this machine; last the empty path, Pillow's own typeface."""
    names = ("DejaVuSans-Bold.ttf", "LiberationSans-Bold.ttf", "OpenSans-Bold.ttf", "Roboto-Bold.ttf", "Lato-Bold.ttf",
             "NotoSans-Bold.ttf", "FreeSansBold.ttf", "Inter-Bold.otf", "Arial Bold.ttf", "arialbd.ttf",
             "Roboto-Black.ttf", "Lato-Black.ttf", "OpenSans-ExtraBold.ttf")  # fmt: skip
    folders = ("/usr/share/fonts", "/usr/local/share/fonts", "/Library/Fonts", "/System/Library/Fonts",
               "C:/Windows/Fonts")  # fmt: skip
    found = {path.name: str(path) for folder in folders for path in sorted(pathlib.Path(folder).rglob("*.[to]tf"))}
    return (*(found[name] for name in names if name in found), "")


@functools.cache
def _open_font(path: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(path, size) if path else ImageFont.load_default(size)


@functools.cache
def _figure_height(path: str) -> float:
    """The height of a figure in a typeface, as a share of the type size."""
    _, top, _, bottom = _open_font(path, 200).getbbox("0")
    return (bottom - top) / 200
