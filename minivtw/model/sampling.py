"""Logits to the next token: the most probable one, or drawn from the probable ones."""

from numbers import Real

import numpy as np

from ..errors import InputError, checked_int
from .layers import softmax


class Sampler:
    """temperature 0 is greedy; top_k 0 and top_p 1 keep every token. The same seed draws the same tokens."""

    def __init__(self, temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0, seed: int = 0) -> None:
        if not isinstance(temperature, Real | float) or not 0 <= temperature < np.inf:
            raise InputError(f"the temperature must be 0 or more, not {temperature}")
        if not isinstance(top_p, Real | float) or not 0 < top_p <= 1:
            raise InputError(f"top-p must be above 0 and at most 1, not {top_p}")
        self.temperature, self.top_k, self.top_p = float(temperature), checked_int(top_k, "top-k"), float(top_p)
        self._random = np.random.default_rng(checked_int(seed, "the seed"))

    def __call__(self, logits: np.ndarray) -> int:
        """logits: (vocabulary,) float32. Returns a token id."""
        if self.temperature == 0:
            return int(np.argmax(logits))
        return int(self._random.choice(len(logits), p=self.probabilities(logits)))

    def probabilities(self, logits: np.ndarray) -> np.ndarray:
        """What is drawn from: tempered, cut to the top k, then to the nucleus (Holtzman et al. 2020). (vocabulary,)"""
        logits = logits.astype(np.float64) / max(self.temperature, 1e-260)  # any smaller would overflow
        if 0 < self.top_k < len(logits):
            logits[logits < np.partition(logits, -self.top_k)[-self.top_k]] = -np.inf
        probabilities = softmax(logits)  # (vocabulary,)
        if self.top_p < 1:
            order = np.argsort(-probabilities, kind="stable")  # (vocabulary,)
            ahead = np.cumsum(probabilities[order]) - probabilities[order]  # (vocabulary,) the mass before each token
            probabilities[order[ahead >= self.top_p]] = 0
            probabilities /= probabilities.sum()
        return probabilities
