"""Tokens on their way through the decoder: what a method is given at the door of every layer, and gives back."""

import copy
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from ..errors import InputError
from .attention import attention_probabilities, rotary, rotate, split_heads
from .cache import KVCache
from .layers import linear, rms_norm


class Ran(NamedTuple):
    """What one layer did: all that its operations are counted from (`counting.py`)."""

    entered: int  # tokens whose keys and values were made
    worked: int  # of these, the tokens that asked, and passed the feed-forward
    cached: int  # tokens in the layer's cache afterwards
    looked: int  # queries made once more, at this layer's door, for a method that asked where they look


@dataclass(frozen=True)
class Tokens:
    """Tokens on their way through the stack: what a method is given at every layer, and what it gives back."""

    hidden: np.ndarray  # (tokens, width) float32
    positions: np.ndarray  # (tokens,) the place of each in the conversation, ascending; never renumbered
    is_visual: np.ndarray  # (tokens,) booleans
    cache: KVCache  # what the layers hold already of the conversation
    rotary_positions: np.ndarray  # (tokens,) what rotary embedding turns by: `positions`, unless a method renumbers
    works: np.ndarray | None = None  # (tokens,) booleans: those the next layer works on; the others are read. None: all
    passed: "Passed | None" = None  # the layer they come from
    ran: tuple[Ran, ...] = ()  # what every layer so far has done
    notes: dict = field(default_factory=dict)  # what a method wants to remember until these tokens reach the end

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, stay: np.ndarray) -> "Tokens":
        """The tokens that stay; stay: (tokens,) booleans, or indices in ascending order. The others leave for good."""
        return replace(
            self,
            hidden=self.hidden[stay],
            positions=self.positions[stay],
            is_visual=self.is_visual[stay],
            rotary_positions=self.rotary_positions[stay],
            works=None if self.works is None else self.works[stay],
        )

    def freeze(self, frozen: np.ndarray) -> "Tokens":
        """The same tokens, of which the next layer only reads the frozen ones; frozen: (tokens,) booleans."""
        return replace(self, works=~frozen if self.works is None else self.works & ~frozen)

    def attention(self, rows: np.ndarray | list[int]) -> np.ndarray:
        """Where tokens looked in the layer that they have just passed; rows: their indices.

        Returns probabilities (heads, rows, tokens). Raises InputError before layer 0.
        """
        if self.passed is None:
            raise InputError("there is no layer before layer 0 whose attention a method could look at")
        entered = np.searchsorted(self.passed.entered.positions, self.positions)  # some may have left since
        return self.passed.attention(entered[rows])[:, :, entered]

    @property
    def keys(self) -> np.ndarray:
        """Their keys in the layer that they have just passed, rotated: (kv_heads, tokens, head_dim)."""
        if self.passed is None:
            raise InputError("there is no layer before layer 0 whose keys a method could look at")
        entered = np.searchsorted(self.passed.entered.positions, self.positions)
        return self.passed.keys[:, entered]


class Passed:
    """The layer that tokens have just passed. What a method looks at is computed when it asks, and counted."""

    def __init__(self, decoder, index, entered):
        self.decoder, self.index, self.entered = decoder, index, entered
        self.cache = entered.cache[index]
        self.before = len(self.cache) - len(entered)  # tokens of earlier turns; later on, more may have followed
        self.looked = 0  # rows

    def unseen(self):
        """The same layer, with nothing looked at yet."""
        again = copy.copy(self)
        again.looked = 0
        return again

    @property
    def keys(self):
        """The keys of the tokens that entered, (kv_heads, entered, head_dim)."""
        return self.cache.keys[:, self.before : self.before + len(self.entered)]

    def attention(self, rows):
        """The probabilities of some of the tokens that entered, over all of them: (heads, rows, entered)."""
        self.looked += len(rows)
        config, layer, entered = self.decoder.config, self.decoder.layers[self.index], self.entered[rows]
        normed = rms_norm(entered.hidden, layer.input_norm, config.rms_norm_eps)
        queries = split_heads(linear(normed, layer.qkv.columns(0, config.heads * config.head_dim)), config.heads)
        turned = rotate(queries, *rotary(entered.rotary_positions, config.head_dim, config.rope_theta))
        sees = self.before + 1 + np.arange(len(self.entered))[rows]
        keys = self.cache.keys[:, : self.before + len(self.entered)]
        return attention_probabilities(turned, keys, sees)[:, :, self.before :]


class EmbeddedPrompt(NamedTuple):
    """A prompt as the decoder gets it."""

    hidden: np.ndarray  # (tokens, width) float32
    is_visual: np.ndarray  # (tokens,) booleans


def arriving(hidden: np.ndarray, is_visual: np.ndarray, cache: KVCache) -> Tokens:
    """Embedded tokens at the bottom of the stack, behind what the cache holds.

    hidden: (tokens, width); is_visual: (tokens,) booleans. Raises InputError where no position is left for them.
    """
    positions = cache.claim(len(hidden))
    return Tokens(hidden, positions, is_visual, cache, positions)
