"""The pieces that every transformer layer is made of: norms, activations, feed-forward.

All arrays are float32. A linear weight has shape (in, out), so that `x @ weight` is one BLAS call.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from ..errors import InputError
from .blocks import by_rows

Observe = Callable[[str, np.ndarray], None] | None  # sees an intermediate array by its name; None: nobody looks


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    """Root-mean-square norm (Zhang & Sennrich 2019): x / sqrt(mean(x^2) + eps) * weight.

    x: (tokens, width); weight: (width,). Returns (tokens, width).
    """
    normed = x / np.sqrt((x * x).sum(axis=-1, keepdims=True) / np.float32(x.shape[-1]) + np.float32(eps))
    normed *= weight
    return normed


def check_finite(x: np.ndarray, where: str) -> np.ndarray:
    """x, unless a number of it is not finite: then InputError, which names `where` it was computed."""
    if not np.isfinite(x).all():
        raise InputError(f"numbers stop being finite in {where}; python -m minivtw.doctor MODEL names damaged weights")
    return x


class LayerNorm(NamedTuple):
    """Scale and shift of a layer norm, each (width,)."""

    weight: np.ndarray
    bias: np.ndarray


def layer_norm(x: np.ndarray, norm: LayerNorm, eps: float) -> np.ndarray:
    """Layer norm (Ba et al. 2016): (x - mean) / sqrt(variance + eps) * weight + bias.

    x: (tokens, width). Returns (tokens, width).
    """
    normed = x - np.mean(x, axis=-1, keepdims=True)  # (tokens, width)
    normed /= np.sqrt(np.mean(normed * normed, axis=-1, keepdims=True) + eps)
    normed *= norm.weight
    normed += norm.bias
    return normed


class Linear(NamedTuple):
    """A linear map: weight (in, out), bias (out,) or None."""

    weight: np.ndarray
    bias: np.ndarray | None = None

    def columns(self, start: int, stop: int | None) -> "Linear":
        """The map to some of the outputs; nothing is copied."""
        return Linear(self.weight[:, start:stop], None if self.bias is None else self.bias[start:stop])


@by_rows
def linear(x: np.ndarray, /, parameters: Linear) -> np.ndarray:
    """x @ weight + bias. x: (tokens, in). Returns (tokens, out)."""
    projected = x @ parameters.weight  # (tokens, out)
    if parameters.bias is not None:
        projected += parameters.bias
    return projected


def softmax(scores: np.ndarray) -> np.ndarray:
    """Softmax over the last axis; -inf is allowed as long as one entry of the axis is finite."""
    # The largest exponent is 0: no overflow. With `initial`, zero rows are fine.
    shifted = scores - np.max(scores, axis=-1, keepdims=True, initial=-np.inf)
    exponentials = np.exp(shifted, out=shifted)
    return np.divide(exponentials, np.sum(exponentials, axis=-1, keepdims=True), out=exponentials)


def gated(x: np.ndarray, minus_z: np.ndarray) -> np.ndarray:
    """x * sigmoid(z) = x / (1 + exp(-z)). minus_z is used up: it becomes the result."""
    with np.errstate(over="ignore"):  # exp of a very negative z is infinite, and x / infinity is the 0 that is right
        np.exp(minus_z, out=minus_z)
    minus_z += 1
    return np.divide(x, minus_z, out=minus_z)


def silu(x: np.ndarray) -> np.ndarray:
    """x * sigmoid(x), the gate of SwiGLU."""
    return gated(x, -x)


def quick_gelu(x: np.ndarray) -> np.ndarray:
    """x * sigmoid(1.702 x): the approximation that OpenAI's CLIP was trained with."""
    return gated(x, x * np.float32(-1.702))


def gelu_tanh(x: np.ndarray) -> np.ndarray:
    """The tanh approximation of GELU (Hendrycks & Gimpel 2016), `gelu_pytorch_tanh` in SigLIP.

    x / 2 * (1 + tanh(z)) with z = sqrt(2 / pi) (x + 0.044715 x^3), and (1 + tanh(z)) / 2 is sigmoid(2 z).
    """
    minus_z = np.float32(-2 * math.sqrt(2 / math.pi) * 0.044715) * (x * x)  # a power costs many times as much
    minus_z -= np.float32(2 * math.sqrt(2 / math.pi))
    minus_z *= x
    return gated(x, minus_z)


# NumPy has no erf. The C library's is tabulated once and interpolated linearly: between neighbours h apart the
# error is at most h^2/8 max|erf''| = 7.3e-9 for h = 1/4096, an eighth of float32's rounding at 1 (6e-8). Past
# |x| = 4, erf is 1 to 1.6e-8.
ERF_STEPS = 4096  # per unit of x
ERF_TABLE = np.array([math.erf(step / ERF_STEPS) for step in range(4 * ERF_STEPS + 2)])  # float64


def erf(x: np.ndarray) -> np.ndarray:
    """The error function of a float32 array, within 3e-8 of the exact value before rounding."""
    steps = np.fmin(np.abs(x), 4.0).astype(np.float64) * ERF_STEPS
    below = steps.astype(np.int64)
    left, right = ERF_TABLE[below], ERF_TABLE[below + 1]
    return np.copysign(left + (steps - below) * (right - left), x).astype(np.float32)


def gelu(x: np.ndarray) -> np.ndarray:
    """Exact GELU: x * Phi(x) = x / 2 * (1 + erf(x / sqrt 2))."""
    return 0.5 * x * (1 + erf(x * np.float32(math.sqrt(0.5))))


ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu_pytorch_tanh": gelu_tanh, "gelu": gelu, "silu": silu}


@by_rows
def mlp(x: np.ndarray, /, up: Linear, down: Linear, activation: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Two linear maps with an activation between: vision layers and LLaVA's connector. x: (tokens, in)."""
    return linear(activation(linear(x, up)), down)


def swiglu(x: np.ndarray, gate_up: np.ndarray, down: np.ndarray) -> np.ndarray:
    """SwiGLU feed-forward (Shazeer 2020): (silu(x Wg) * (x Wu)) Wd, with Wg and Wu side by side in one matrix.

    x: (tokens, width); gate_up: (width, 2 * mlp_width); down: (mlp_width, width). Returns (tokens, width).
    """
    both = x @ gate_up  # (tokens, 2 * mlp_width)
    hidden = silu(both[:, : len(down)])  # (tokens, mlp_width)
    hidden *= both[:, len(down) :]
    return hidden @ down
