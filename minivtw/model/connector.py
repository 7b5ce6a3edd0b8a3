"""The connector: vision features become visual tokens of the decoder's width."""

import math
from dataclasses import dataclass

import numpy as np

from ..threads import threads_that_fit
from .layers import ACTIVATIONS, Linear, linear, mlp


@dataclass(frozen=True)
class Connector:
    """LLaVA 1.5's two-layer perceptron (Liu et al. 2023, arXiv 2310.03744)."""

    up: Linear  # (vision width, decoder width)
    down: Linear  # (decoder width, decoder width)
    activation: str  # a key of layers.ACTIVATIONS

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """features: (features, vision width). Returns visual tokens (features, decoder width)."""
        with threads_that_fit(len(features), *self.up.weight.shape):
            return mlp(features, self.up, self.down, ACTIVATIONS[self.activation])


def pixel_shuffle(features: np.ndarray, factor: int) -> np.ndarray:
    """Join each factor x factor square of patches (Shi et al. 2016, the way back). features: (side * side, width).

    Returns ((side / factor)^2, width * factor^2): the squares row by row, in each its patches row by row.
    """
    patches, width = features.shape
    squares = math.isqrt(patches) // factor  # per side
    grid = features.reshape(squares, factor, squares, factor, width)  # (squares, factor, squares, factor, width)
    return grid.swapaxes(1, 2).reshape(squares * squares, factor * factor * width)


@dataclass(frozen=True)
class ShuffleConnector:
    """Idefics3's: neighbouring patches side by side in one wider vector, then one linear map."""

    projection: Linear  # (vision width * factor^2, decoder width)
    factor: int  # factor x factor patches become one visual token

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """features: (features, vision width). Returns visual tokens (features / factor^2, decoder width)."""
        return linear(pixel_shuffle(features, self.factor), self.projection)
