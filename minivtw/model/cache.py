"""The KV cache: the keys and values of every token a layer has seen, one store per layer, each of its own length.

Without withdrawal all stores are equally long. With it the deep ones hold text only, by construction: a token that
has left never reaches them.
"""

import bisect

import numpy as np

from ..errors import InputError
from .weights import DecoderConfig


class LayerCache:
    """Keys, values and original positions of the tokens that reached one layer. Keys are stored already rotated."""

    def __init__(self) -> None:
        self._store = np.empty((2, 1, 0, 1), np.float32)  # (2, kv_heads, capacity, head_dim), grown by `append`
        self._positions: list[int] = []  # ascending

    def __len__(self) -> int:
        return len(self._positions)

    def append(self, keys: np.ndarray, values: np.ndarray, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Add tokens. keys, values: (kv_heads, new, head_dim); positions: (new,).

        Returns all keys and all values, (kv_heads, length, head_dim) each, as views: reading copies nothing.
        """
        start, end = len(self), len(self) + len(positions)
        if end > self._store.shape[2] or not self._store.size:
            room = max(end, 2 * start)  # at least doubles: n tokens, one at a time, cost O(n) copies in all
            grown = np.empty((2, len(keys), room, keys.shape[2]), np.float32)  # (2, kv_heads, room, head_dim)
            grown[:, :, :start] = self._store[:, :, :start]
            self._store = grown
        self._store[0, :, start:end], self._store[1, :, start:end] = keys, values
        self._positions.extend(positions.tolist())
        return self.keys, self.values

    @property
    def keys(self) -> np.ndarray:
        """(kv_heads, length, head_dim), rotated to their positions."""
        return self._store[0, :, : len(self)]

    @property
    def values(self) -> np.ndarray:
        """(kv_heads, length, head_dim)."""
        return self._store[1, :, : len(self)]

    @property
    def positions(self) -> np.ndarray:
        """(length,) the place of each token in the whole prompt, ascending."""
        return np.array(self._positions, np.int64)

    def trim(self, position: int) -> None:
        """Forget the tokens at this position and after it."""
        del self._positions[bisect.bisect_left(self._positions, position) :]


class KVCache:
    """One `LayerCache` per layer, and the position that the next token takes in every one of them."""

    def __init__(self, config: DecoderConfig) -> None:
        self.layers = [LayerCache() for _ in range(config.layers)]
        self.max_positions = config.max_positions
        self.next_position = 0

    def __getitem__(self, layer: int) -> LayerCache:
        return self.layers[layer]

    def claim(self, count: int) -> np.ndarray:
        """The next `count` positions, (count,) integers, also for tokens withdrawn later. Raises InputError if too few are left."""
        self.check_room(count)
        positions = np.arange(self.next_position, self.next_position + count)  # (count,)
        self.next_position += count
        return positions

    def check_room(self, count: int) -> None:
        """Raise InputError unless `count` more tokens find a position."""
        end = self.next_position + count
        if end > self.max_positions:
            raise InputError(f"the prompt ends at token {end}; the model has {self.max_positions} positions")

    @property
    def tokens_per_layer(self) -> list[int]:
        """How many tokens each layer holds, shallow to deep."""
        return [len(layer) for layer in self.layers]

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values held (the room reserved for more does not count)."""
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.layers)

    def trim(self, position: int) -> None:
        """Go back to the moment when `position` was next, so that another continuation can follow."""
        for layer in self.layers:
            layer.trim(position)
        self.next_position = min(position, self.next_position)
