"""The pieces that every transformer layer is made of: norms, activations, feed-forward.

All arrays are float32. A linear weight has shape (in, out), so that `x @ weight` is one BLAS call.
"""

import math
from typing import NamedTuple

import numpy as np


def rms_norm(x, weight, eps):
    """Root-mean-square norm (Zhang & Sennrich 2019): x / sqrt(mean(x^2) + eps) * weight.

    x: (..., width); weight: (width,). Returns (..., width).
    """
    mean_square = np.mean(x * x, axis=-1, keepdims=True)  # (..., 1)
    return x / np.sqrt(mean_square + eps) * weight


class LayerNorm(NamedTuple):
    """Scale and shift of a layer norm, each (width,)."""

    weight: np.ndarray
    bias: np.ndarray


def layer_norm(x, norm, eps):
    """Layer norm (Ba et al. 2016): (x - mean) / sqrt(variance + eps) * weight + bias.

    x: (..., width). Returns (..., width).
    """
    centred = x - np.mean(x, axis=-1, keepdims=True)  # (..., width)
    variance = np.mean(centred * centred, axis=-1, keepdims=True)  # (..., 1)
    return centred / np.sqrt(variance + eps) * norm.weight + norm.bias


class Linear(NamedTuple):
    """A linear map: weight (in, out), bias (out,) or None."""

    weight: np.ndarray
    bias: np.ndarray | None = None

    def columns(self, start, stop):
        """The map to some of the outputs; nothing is copied."""
        return Linear(self.weight[:, start:stop], None if self.bias is None else self.bias[start:stop])


def linear(x, parameters):
    """x @ weight + bias. x: (tokens, in). Returns (tokens, out)."""
    projected = x @ parameters.weight  # (tokens, out)
    return projected if parameters.bias is None else projected + parameters.bias


def softmax(scores):
    """Softmax over the last axis; -inf is allowed as long as one entry of the axis is finite."""
    largest = np.max(scores, axis=-1, keepdims=True, initial=-np.inf)  # (..., 1); initial: zero rows are fine
    shifted = scores - largest  # the largest exponent is 0: no overflow
    exponentials = np.exp(shifted, out=shifted)
    exponentials /= np.sum(exponentials, axis=-1, keepdims=True)
    return exponentials


def sigmoid(x):
    """1 / (1 + exp(-x)), written with tanh, which cannot overflow."""
    return 0.5 * np.tanh(0.5 * x) + 0.5


def silu(x):
    """x * sigmoid(x), the gate of SwiGLU."""
    return x * sigmoid(x)


def quick_gelu(x):
    """x * sigmoid(1.702 x): the approximation that OpenAI's CLIP was trained with."""
    return x * sigmoid(np.float32(1.702) * x)


def gelu_tanh(x):
    """The tanh approximation of GELU (Hendrycks & Gimpel 2016), `gelu_pytorch_tanh` in SigLIP."""
    return 0.5 * x * (1 + np.tanh(np.float32(math.sqrt(2 / math.pi)) * (x + np.float32(0.044715) * x**3)))


# NumPy has no erf. The C library's is tabulated once and interpolated linearly: between neighbours h apart the
# error is at most h^2/8 max|erf''| = 7.3e-9 for h = 1/4096, an eighth of float32's rounding at 1 (6e-8). Past
# |x| = 4, erf is 1 to 1.6e-8.
ERF_STEPS = 4096  # per unit of x
ERF_TABLE = np.array([math.erf(step / ERF_STEPS) for step in range(4 * ERF_STEPS + 2)])  # float64


def erf(x):
    """The error function of a float32 array, within 3e-8 of the exact value before rounding."""
    steps = np.minimum(np.abs(x), 4.0).astype(np.float64) * ERF_STEPS
    below = steps.astype(np.int64)
    left, right = ERF_TABLE[below], ERF_TABLE[below + 1]
    return np.copysign(left + (steps - below) * (right - left), x).astype(np.float32)


def gelu(x):
    """Exact GELU: x * Phi(x) = x / 2 * (1 + erf(x / sqrt 2))."""
    return 0.5 * x * (1 + erf(x * np.float32(math.sqrt(0.5))))


ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu_pytorch_tanh": gelu_tanh, "gelu": gelu, "silu": silu}


def mlp(x, up, down, activation):
    """Two linear maps with an activation between: vision layers and LLaVA's connector. x: (tokens, in)."""
    return linear(activation(linear(x, up)), down)


def swiglu(x, gate_up, down):
    """SwiGLU feed-forward (Shazeer 2020): (silu(x Wg) * (x Wu)) Wd, with Wg and Wu side by side in one matrix.

    x: (tokens, width); gate_up: (width, 2 * mlp_width); down: (mlp_width, width). Returns (tokens, width).
    """
    gate, up = np.split(x @ gate_up, 2, axis=-1)  # (tokens, mlp_width) each
    return (silu(gate) * up) @ down
