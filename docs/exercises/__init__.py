"""Exercises: each file here is one, with a task, a stub to fill in, a solution, and a check that says what is wrong.

In the notebook, or in any Python that is started in `docs`:

    from exercises import check

    check(causal_softmax)  # a function of yours, found by its name

For functions in a file of yours: python docs/exercises mine.py
"""

import functools
import importlib
import pathlib
import traceback
from collections.abc import Callable
from numbers import Real
from types import ModuleType
from typing import Any

import numpy as np

import minivtw

HERE = pathlib.Path(__file__).parent
SCENE = HERE.parent / "pictures" / "scene.png"
NAMES = sorted(path.stem for path in HERE.glob("[!_]*.py"))


class NotYet(Exception):
    """What is still wrong, in a sentence."""


def expect(holds: Any, sentence: str) -> None:
    """Raise NotYet with the sentence unless something holds."""
    if not holds:
        raise NotYet(sentence)


def expect_number(found: Any) -> None:
    """Raise NotYet unless something is one number."""
    expect(isinstance(found, Real | np.integer), f"it must return one number, not {type(found).__name__}")
    expect(np.isfinite(found), f"it must return a finite number, not {found}")


def expect_array(found: Any, expected: np.ndarray, what: str, tolerance: float = 1e-4) -> None:
    """Raise NotYet, and say where, unless an array is as expected."""
    expect(isinstance(found, np.ndarray), f"{what} must be an array, not {type(found).__name__}")
    expect(found.shape == expected.shape, f"{what} must have the shape {expected.shape}, not {found.shape}")
    apart = np.nan_to_num(np.abs(found - expected), nan=np.inf)
    worst = tuple(map(int, np.unravel_index(apart.argmax(), apart.shape)))
    place = worst[0] if len(worst) == 1 else worst
    expect(apart.max() <= tolerance, f"{what} at {place} must be {expected[worst]:.4g}, not {found[worst]:.4g}")


@functools.cache
def model() -> minivtw.VLM:
    """The embedded model, loaded once."""
    return minivtw.load()


def exercise(name: str) -> ModuleType:
    """The exercise of that name: a module with `stub`, `solution` and `check`, whose docstring is the task."""
    if name not in NAMES:
        raise ValueError(f"there is no exercise {name!r}; there are {', '.join(NAMES)}")
    return importlib.import_module(f"{__name__}.{name}")


def verdict(function: Callable[..., Any], name: str | None = None) -> tuple[bool, str]:
    """Whether a function solves the exercise of that name (its own, if none is given), and a sentence to say so."""
    task = exercise(name or function.__name__)
    try:
        return True, task.check(function)
    except (NotYet, minivtw.InputError) as error:
        return False, str(error)
    except (Exception, SystemExit) as error:
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.name == function.__name__]
        where = f" in line {frames[-1].lineno}" if frames else ""
        return False, f"it raises {type(error).__name__}{where}: {error}"


def check(function: Callable[..., Any]) -> None:
    """Print whether a function solves the exercise of its name, and if not, what is wrong."""
    is_right, sentence = verdict(function)
    print(f"{'Right' if is_right else 'Not yet'}: {sentence}.")
