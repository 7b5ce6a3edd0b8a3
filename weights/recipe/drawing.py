"""A scene to pixels: antialiased shapes on a background of low saturation.

`Style` holds what the world leaves open (how deep a star is cut, how tall a digit stands in its circle, how edges are
smoothed). Pictures are drawn in the plain style by default, the same on every machine. Training draws each scene in a
style of its own, so that the model also reads pictures of the same world that another program drew.
"""

import functools
import json
import math
import pathlib
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from world import CANVAS, Scene, Thing


class Style(NamedTuple):
    """The freedoms of the drawing, lengths as shares of an object's radius."""

    star_inner: float = 0.45  # where a star's inner corners lie
    square_half: float = 0.5**0.5  # half a square's side: its corners on the circle
    triangle_base: float = 0.5  # how far the base lies below the centre
    triangle_half: float = 0.75**0.5  # half the base: with both, corners on the circle
    cross_half: float = 0.95  # half a cross's width: its corners about on the circle
    ring_hole: float = 0.55
    digit_height: float = 1.6
    digit_width: float = 1.0  # a figure's width, as a share of what the typeface gives it
    digit_slant: float = 0.0  # how far a figure leans to the right, as a share of its height
    is_shipped_face: bool = True  # the outlines beside this file; otherwise Pillow's own typeface
    supersampling: int = 4  # the side of the square of samples behind a pixel


def vary_style(rng: np.random.Generator) -> Style:
    """A style drawn from everything that still is the same world."""
    style = Style(
        star_inner=rng.uniform(0.36, 0.52),
        cross_half=rng.uniform(0.84, 1.0),
        ring_hole=rng.uniform(0.51, 0.59),
        digit_height=rng.uniform(1.2, 2.0),
        digit_width=rng.uniform(0.85, 1.15),
        digit_slant=rng.uniform(-0.1, 0.15),
        is_shipped_face=rng.random() < 0.7,
        supersampling=int(rng.integers(2, 5)),
    )
    if rng.random() < 0.4:  # shapes measured by their box rather than by their circle
        style = style._replace(
            square_half=rng.uniform(0.7, 0.88), triangle_base=rng.uniform(0.5, 0.9), triangle_half=rng.uniform(0.8, 1.0)
        )
    return style


def draw(scene: Scene, style: Style = Style()) -> Image.Image:
    """The scene as an RGB image of CANVAS x CANVAS pixels."""
    rng = np.random.default_rng([scene.seed, 1])
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
    size = ((bottom - top) * scale, (right - left) * scale)  # (rows, columns) of samples
    center = np.array([(thing.x - left) * scale, (thing.y - top) * scale])
    radius = thing.radius * scale
    if thing.is_digit:
        draw_figure = _own_figure if style.is_shipped_face else _pillow_figure
        samples = draw_figure(thing.shape, size, center, style.digit_height * radius, style)
    elif thing.shape in ("circle", "ring"):
        across, down = (np.arange(length) + 0.5 - c for length, c in zip(size[::-1], center))
        distance = across**2 + down[:, None] ** 2  # squared, (rows, columns)
        samples = distance <= radius**2
        if thing.shape == "ring":
            samples &= distance > (style.ring_hole * radius) ** 2
    else:
        angle = np.deg2rad(thing.turn)
        rotation = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
        samples = _inside([center + radius * np.asarray(_corners(thing.shape, style)) @ rotation], size)
    by_row = samples.reshape(bottom - top, scale, -1).sum(1, dtype=np.float32)
    return by_row.reshape(bottom - top, right - left, scale).sum(2) / scale**2, top, left


def _inside(contours: list[np.ndarray], size: tuple[int, int]) -> np.ndarray:
    """Which samples of a grid (rows, columns) lie inside closed contours, each (corners, 2), by the even-odd rule.

    Along a row, every crossing of an edge flips what follows. Drawn here rather than by Pillow, whose polygons and
    figures change from release to release.
    """
    rows, columns = size
    flips = np.zeros((rows, columns + 1), bool)
    for contour in contours:
        for (x, y), (next_x, next_y) in zip(contour.tolist(), np.roll(contour, -1, axis=0).tolist()):
            low, high = sorted(min(max(math.ceil(end - 0.5), 0), rows) for end in (y, next_y))
            if low < high:
                crossed = np.arange(low, high)  # the rows
                at = x + (crossed + 0.5 - y) * ((next_x - x) / (next_y - y))
                flips[crossed, np.ceil(at - 0.5).clip(0, columns).astype(int)] ^= True
    return np.logical_xor.accumulate(flips, axis=1)[:, :columns]


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


def _own_figure(figure: str, size: tuple[int, int], center: np.ndarray, height: float, style: Style) -> np.ndarray:
    """Samples (rows, columns) of a figure of `height` around the centre, in the typeface beside this file."""
    form = height * np.array([[style.digit_width, 0], [-style.digit_slant, 1]])  # x' = width x - slant y, y' = y
    return _inside([center + contour @ form for contour in _outlines()[figure]], size)


def _pillow_figure(figure: str, size: tuple[int, int], center: np.ndarray, height: float, style: Style) -> np.ndarray:
    """The same in Pillow's own typeface, which is made bold by a stroke."""
    mask = Image.new("L", size[::-1])
    size_in_eights = max(round(height / 6), 1)  # few sizes, so that opened typefaces are used again
    box = {"font": _pillow_face(8 * size_in_eights), "stroke_width": round(0.04 * height)}
    pen = ImageDraw.Draw(mask)
    left, top, right, bottom = pen.textbbox((0, 0), figure, **box)
    pen.text((center[0] - (left + right) / 2, center[1] - (top + bottom) / 2), figure, fill=255, **box)
    return np.asarray(mask) > 127


@functools.cache
def _outlines() -> dict[str, list[np.ndarray]]:
    """The contours (corners, 2) of each figure, centred, y downwards, in heights of the figure 0."""
    figures = json.loads((pathlib.Path(__file__).parent / "typeface" / "figures.json").read_text(encoding="utf-8"))
    return {figure: [np.array(contour) for contour in contours] for figure, contours in figures.items()}


@functools.cache
def _pillow_face(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)
