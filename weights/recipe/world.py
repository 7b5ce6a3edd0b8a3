"""The visual world of the embedded model: scenes of one to five coloured shapes, sampled from a seed.

A seed decides everything: `sample_scene` turns it into a `Scene`, `drawing.draw` into pixels, and `questions` asks.
Training scenes have even seeds and evaluation scenes odd ones, so no evaluated picture was ever trained on.
"""

from typing import NamedTuple

import numpy as np

CANVAS = 256  # pixels; the model's own image processor resizes it
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
DIGITS = tuple("0123456789")
COLORS = {
    "red": (214, 48, 49),
    "green": (39, 174, 96),
    "blue": (41, 98, 215),
    "yellow": (241, 196, 15),
    "purple": (142, 68, 173),
    "orange": (230, 126, 34),
    "white": (245, 245, 245),
    "black": (25, 25, 25),
}
COLOR_JITTER = 12
SMALLEST_RADIUS, LARGEST_RADIUS = 20, 46  # pixels
SEPARATION = 8  # pixels of free space between the circles of two objects
LARGEST_TURN = 12  # degrees, for the shapes that may be turned
TURNED = ("square", "triangle", "star", "cross")


class Thing(NamedTuple):
    """One object of a scene, inside the circle of `radius` pixels around (x, y)."""

    shape: str  # one of SHAPES, or the figure of a digit
    color: str  # one of COLORS
    x: float
    y: float
    radius: float
    turn: float  # degrees
    rgb: tuple[int, int, int]  # the jittered colour

    @property
    def is_digit(self) -> bool:
        return self.shape in DIGITS


class Scene(NamedTuple):
    """Objects on a background; `seed` also fixes the noise and the freedoms that the drawing takes."""

    seed: int
    things: tuple[Thing, ...]
    background: tuple[int, int, int]
    gradient: tuple[float, float]  # how far the brightness changes from the middle to the right and bottom edges
    noise: float  # largest change of a pixel's channel


def training_seed(index: int) -> int:
    """The seed of training scene `index`: always even."""
    return 2 * index


def evaluation_seed(index: int) -> int:
    """The seed of evaluation scene `index`: always odd."""
    return 2 * index + 1


def sample_scene(seed: int, is_crowd: bool = False) -> Scene:
    """The scene of an integer seed: one to five objects of distinct (colour, shape), at most one of them a digit.

    A crowd, for training only: three to five objects of one colour or two, so that there are many of a colour to count.
    """
    rng = np.random.default_rng(seed)
    number = int(rng.integers(3 if is_crowd else 1, 6))
    kinds = _sample_kinds(rng, number, is_crowd)
    circles = _sample_circles(rng, number)
    things = tuple(
        Thing(
            shape=shape,
            color=color,
            x=x,
            y=y,
            radius=radius,
            turn=float(rng.uniform(-LARGEST_TURN, LARGEST_TURN)) if shape in TURNED and rng.random() < 0.6 else 0.0,
            rgb=_jitter(rng, COLORS[color]),
        )
        for (shape, color), (x, y, radius) in zip(kinds, circles)
    )
    darkest = int(rng.integers(110, 166))
    background = tuple(int(c) for c in darkest + rng.integers(0, 26, 3))
    angle = rng.uniform(0, 2 * np.pi)
    strength = rng.uniform(0, 20) if rng.random() < 0.6 else 0.0
    gradient = (float(strength * np.cos(angle)), float(strength * np.sin(angle)))
    noise = float(rng.uniform(0, 6)) if rng.random() < 0.6 else 0.0
    return Scene(seed, things, background, gradient, noise)


def _jitter(rng: np.random.Generator, color: tuple[int, int, int]) -> tuple[int, int, int]:
    """A colour near the given one."""
    jitter = rng.integers(-COLOR_JITTER, COLOR_JITTER + 1, 3)
    red, green, blue = (int(channel) for channel in np.clip(np.add(color, jitter), 0, 255))
    return red, green, blue


def _sample_kinds(rng: np.random.Generator, number: int, is_crowd: bool) -> list[tuple[str, str]]:
    """`number` distinct (shape, colour) pairs.

    A third of the scenes draws from few colours and a third from few shapes: otherwise hardly any picture would hold
    four red objects to count, or two stars to tell apart.
    """
    while True:
        colors, shapes = list(COLORS), list(SHAPES)
        if is_crowd:
            colors = list(rng.choice(colors, rng.integers(1, 3), replace=False))
        elif rng.random() < 0.35:
            colors = list(rng.choice(colors, rng.integers(1, 4), replace=False))
        if rng.random() < 0.35:
            shapes = list(rng.choice(shapes, rng.integers(1, 4), replace=False))
        kinds = [(str(rng.choice(shapes)), str(rng.choice(colors))) for _ in range(number)]
        if rng.random() < 0.5:
            kinds[int(rng.integers(number))] = (str(rng.choice(DIGITS)), str(rng.choice(colors)))
        if len(set(kinds)) == number:
            return kinds


def _sample_circles(rng: np.random.Generator, number: int) -> list[tuple[float, float, float]]:
    """`number` circles (x, y, radius) inside the canvas, at least SEPARATION apart."""
    while True:
        radii = rng.uniform(SMALLEST_RADIUS, LARGEST_RADIUS, number)
        for _ in range(20):  # the same radii are tried often, lest crowded pictures hold small objects only
            circles: list[tuple[float, float, float]] = []
            for radius in radii:
                for x, y in rng.uniform(radius, CANVAS - radius, (12, 2)):
                    if all(np.hypot(x - u, y - v) >= radius + r + SEPARATION for u, v, r in circles):
                        circles.append((float(x), float(y), float(radius)))
                        break
                else:
                    break
            if len(circles) == number:
                return circles
