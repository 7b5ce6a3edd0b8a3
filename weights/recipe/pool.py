"""Training pictures drawn ahead of time, in chunks on disk, so that drawing never holds training up.

    python weights/recipe/pool.py --runs RUNS --chunks 16     write (or go on writing) 16 chunks of 5,000 pictures

A chunk is two arrays beside each other: `pixels-NNN.npy` (scenes, 128, 128, 3) uint8, resized as the model's image
processor resizes, and `things-NNN.npy` (scenes, 5, 5) float32: shape, colour, x, y, radius of each object; shape -1
where there is none. Questions are asked afresh at every visit, from `things`.
"""

import argparse
import pathlib

import numpy as np
from drawing import draw, vary_style
from PIL import Image
from world import COLORS, DIGITS, SHAPES, Scene, sample_scene, training_seed

CHUNK = 5_000
CROWD_EVERY = 4  # every fourth picture shows many objects of a colour
SIDE = 128  # pixels of the model's image
MOST_THINGS = 5
KINDS = (*SHAPES, *DIGITS)  # what the column `shape` counts
COLOR_NAMES = tuple(COLORS)


def model_pixels(picture: Image.Image) -> np.ndarray:
    """A square picture to the model's size, (SIDE, SIDE, 3) uint8: antialiased bicubic, as CLIP's image processor."""
    return np.asarray(picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC))


def things_array(scene: Scene) -> np.ndarray:
    """The objects of a scene, (MOST_THINGS, 5) float32: shape, colour, x, y, radius; shape -1 where there is none."""
    rows = np.full((MOST_THINGS, 5), -1, np.float32)
    for row, thing in zip(rows, scene.things):
        row[:] = KINDS.index(thing.shape), COLOR_NAMES.index(thing.color), thing.x, thing.y, thing.radius
    return rows


def write_chunk(folder: pathlib.Path, number: int) -> None:
    """Draw chunk `number`; it appears under its name only when whole."""
    pixels = np.empty((CHUNK, SIDE, SIDE, 3), np.uint8)
    things = np.empty((CHUNK, MOST_THINGS, 5), np.float32)
    for row in range(CHUNK):
        scene = sample_scene(training_seed(number * CHUNK + row), is_crowd=row % CROWD_EVERY == 0)
        style = vary_style(np.random.default_rng([scene.seed, 2]))
        pixels[row] = model_pixels(draw(scene, style))
        things[row] = things_array(scene)
    for name, array in (("things", things), ("pixels", pixels)):  # pixels last: who finds them finds both
        partial = folder / f".{name}-{number:03d}.npy"
        np.save(partial, array)
        partial.rename(folder / f"{name}-{number:03d}.npy")


class Pool:
    """The chunks written so far, memory-mapped; `refresh` takes in those that have appeared since."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        self.pixels: list[np.ndarray] = []  # one (CHUNK, SIDE, SIDE, 3) uint8 a chunk
        self.things: list[np.ndarray] = []  # one (CHUNK, MOST_THINGS, 5) float32 a chunk
        self.refresh()

    def refresh(self) -> None:
        while (self.folder / f"pixels-{len(self.pixels):03d}.npy").exists():
            number = len(self.pixels)
            self.pixels.append(np.load(self.folder / f"pixels-{number:03d}.npy", mmap_mode="r"))
            self.things.append(np.load(self.folder / f"things-{number:03d}.npy"))

    def sample(self, rng: np.random.Generator, batch: int) -> tuple[np.ndarray, np.ndarray]:
        """Random pictures: pixels (batch, SIDE, SIDE, 3) uint8 and things (batch, MOST_THINGS, 5) float32."""
        chunks = rng.integers(len(self.pixels), size=batch)
        rows = rng.integers(CHUNK, size=batch)
        pixels = np.stack([self.pixels[chunk][row] for chunk, row in zip(chunks, rows)])
        things = np.stack([self.things[chunk][row] for chunk, row in zip(chunks, rows)])
        return pixels, things


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=pathlib.Path, default=pathlib.Path(__file__).parent / "runs")
    parser.add_argument("--chunks", type=int, default=16, help=f"how many chunks of {CHUNK} pictures (default: 16)")
    parser.add_argument("--start", type=int, default=0, help="first chunk to write, to share the work (default: 0)")
    parser.add_argument("--step", type=int, default=1, help="write every step-th chunk only (default: 1)")
    arguments = parser.parse_args()
    folder = arguments.runs / "pool"
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(arguments.start, arguments.chunks, arguments.step):
        if not (folder / f"pixels-{number:03d}.npy").exists():
            write_chunk(folder, number)
        print(f"chunk {number + 1} of {arguments.chunks}", flush=True)


if __name__ == "__main__":
    main()
