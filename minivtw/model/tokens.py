"""Tokens on their way through the decoder: what a method is given before every layer, and gives back."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from ..errors import InputError
from ..threads import one_blas_thread
from .attention import attention_probabilities, rotary, rotate, split_heads
from .cache import KVCache
from .layers import linear, rms_norm
from .vision import Tower
from .weights import Decoder


class LayerCount(NamedTuple):
    """What one layer did: all that its operations are counted from (`counting.py`)."""

    entered: int  # tokens whose keys and values were made
    worked: int  # of these, the tokens with queries, which passed the feed-forward
    cached: int  # tokens in the layer's cache afterwards
    extra_flops: int  # of what a method asked for before this layer, such as attention


class Followed(NamedTuple):
    """Tokens that a layer does not work on: each takes over a mixture of what it changes in their leaders."""

    followers: np.ndarray  # (followers,) positions
    leaders: np.ndarray  # (leaders,) positions
    shares: np.ndarray  # (followers, leaders) float32: of each leader's change, how much a follower takes over

    def among(self, positions: np.ndarray) -> "Followed":
        """What is left of it among the tokens at these positions."""
        follow, lead = np.isin(self.followers, positions), np.isin(self.leaders, positions)
        return Followed(self.followers[follow], self.leaders[lead], self.shares[np.ix_(follow, lead)])


@dataclass(frozen=True, eq=False)
class Tokens:
    """Tokens on their way through the stack: what a method is given at every layer, and what it gives back."""

    hidden: np.ndarray  # (tokens, width) float32
    positions: np.ndarray  # (tokens,) the place of each in the conversation, ascending; never renumbered
    is_visual: np.ndarray  # (tokens,) booleans
    cache: KVCache  # what the layers hold already of the conversation
    rotary_positions: np.ndarray  # (tokens,) what rotary embedding turns by: `positions`, unless a method renumbers
    works: np.ndarray | None = None  # (tokens,) booleans: those the next layer works on; the others are read. None: all
    followed: tuple["Followed", ...] = ()  # who follows whom in the next layer
    previous: "PreviousLayer | None" = None  # the layer they come from
    tower: Tower | None = None  # what the vision tower knows of the image among them
    ran: tuple[LayerCount, ...] = ()  # what every layer so far has done
    notes: dict = field(default_factory=dict)  # what a method wants to remember until these tokens reach the end
    extra_flops: list[int] = field(default_factory=list)  # of what methods have asked for since the last layer

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, stay: np.ndarray | list[int]) -> "Tokens":
        """The tokens that stay; stay: (tokens,) booleans, or ascending indices. The others leave for good. Raises InputError."""
        positions = self.positions[stay]  # (staying,)
        if np.ndim(positions) != 1 or (np.diff(positions) <= 0).any():  # each token sees those before it
            raise InputError("tokens stay in their order, each of them once: their indices must ascend")
        hidden = self.hidden[stay]  # (staying, width)
        visual, turns = self.is_visual[stay], self.rotary_positions[stay]  # (staying,)
        works = None if self.works is None else self.works[stay]  # (staying,)
        followed = tuple(one.among(positions) for one in self.followed)
        left = replace(self, hidden=hidden, positions=positions, is_visual=visual, rotary_positions=turns)
        return replace(left, works=works, followed=followed)

    def freeze(self, frozen: np.ndarray) -> "Tokens":
        """The same tokens, of which the next layer only reads the frozen ones; frozen: (tokens,) booleans."""
        works = ~frozen if self.works is None else self.works & ~frozen  # (tokens,)
        return replace(self, works=works) if np.any(frozen) else self  # a layer that works on all takes the shorter way

    def follow(self, followers: np.ndarray, leaders: np.ndarray, shares: np.ndarray) -> "Tokens":
        """The same tokens, of which the next layer only reads the followers; each of them takes over a mixture of what the
        layer changes in the leaders: change[followers] = shares @ change[leaders]. Calls for several groups add up.

        followers: (followers,) and leaders: (leaders,) indices; shares: (followers, leaders) float32. Nothing is taken
        over from a leader that is not worked on either, or that leaves. Raises InputError for shares of another shape.
        """
        group = Followed(self.positions[followers], self.positions[leaders], shares)
        if np.shape(shares) != (*group.followers.shape, *group.leaders.shape):
            raise InputError("shares have one row for each token that follows, and one column for each that leads")
        frozen = np.isin(np.arange(len(self)), followers)  # (tokens,)
        return replace(self.freeze(frozen), followed=(*self.followed, group))

    def attention(self, rows: np.ndarray | list[int]) -> np.ndarray:
        """Where tokens looked in the layer that they have just passed; rows: their indices, in any order.

        Returns probabilities (heads, rows, tokens). Raises InputError before layer 0.
        """
        previous = self.previous_layer("attention")
        entered = np.searchsorted(previous.positions, self.positions)  # (tokens,) some may have left since
        keys = previous.cache.keys[:, : previous.before + len(previous.positions)]  # (kv_heads, cached, head_dim)
        sees = previous.before + 1 + entered[rows]  # (rows,)
        pattern = self.attention_to(previous, entered[rows], previous.index, keys, sees)
        return pattern[:, :, previous.before + entered]

    @one_blas_thread()
    def attention_to(self, entering: Any, rows: Any, index: int, keys: np.ndarray, sees: np.ndarray) -> np.ndarray:
        """Probabilities (heads, rows, keys) of some of the tokens `entering` layer `index`: `Tokens` or a `PreviousLayer`."""
        decoder = self.previous_layer("attention").decoder
        config, weights = decoder.config, decoder.layers[index]
        query = config.heads * config.head_dim
        normed = rms_norm(entering.hidden[rows], weights.input_norm, config.rms_norm_eps)
        queries = split_heads(linear(normed, weights.qkv.columns(0, query)), config.heads)
        turned = rotate(queries, *rotary(entering.rotary_positions[rows], config.head_dim, config.rope_theta))
        self.extra_flops.append(2 * len(normed) * query * (config.width + keys.shape[1]))
        return attention_probabilities(turned, keys, sees)

    @property
    def keys(self) -> np.ndarray:
        """Their keys in the layer that they have just passed, rotated: (kv_heads, tokens, head_dim)."""
        previous = self.previous_layer("keys")
        return previous.cache.keys[:, previous.before + np.searchsorted(previous.positions, self.positions)]

    def previous_layer(self, what: str) -> "PreviousLayer":
        """The layer that all of them have just passed. Raises InputError where there is none."""
        if self.previous is None:
            raise InputError(
                f"there is no layer before layer 0 whose {what} a method could look at, nor where an image enters late"
            )
        return self.previous


Method = Callable[[int, Tokens], Tokens]  # (index of the layer to come, tokens that enter it) -> the tokens that go on


class PreviousLayer:
    """The layer that tokens have just passed: what a method looks at is computed from it when it asks."""

    def __init__(self, decoder: Decoder, index: int, entered: Tokens) -> None:
        self.decoder, self.index, self.cache = decoder, index, entered.cache[index]
        # Of those that entered it; these themselves would keep the layer before it in memory, too, and so on.
        self.hidden, self.positions, self.rotary_positions = entered.hidden, entered.positions, entered.rotary_positions
        self.before = len(self.cache) - len(entered)  # tokens of earlier turns; later on, more may have followed


class EmbeddedPrompt(NamedTuple):
    """A prompt as the decoder takes it: what `VLM.embed` returns."""

    hidden: np.ndarray  # (tokens, width) float32
    is_visual: np.ndarray  # (tokens,) booleans
    tower: Tower | None = None  # what the vision tower knows of the image; None for text, and where it is not known


def embedded_text(decoder: Decoder, token_ids: Sequence[int]) -> EmbeddedPrompt:
    """Text as the decoder takes it, such as a token that is fed back."""
    return EmbeddedPrompt(decoder.embedding[token_ids], np.zeros(len(token_ids), bool))


def arriving(prompt: EmbeddedPrompt, cache: KVCache) -> Tokens:
    """A prompt as it enters layer 0, after what the cache holds. Raises InputError where no position is left for it."""
    positions = cache.claim(len(prompt.hidden))
    hidden = prompt.hidden.copy()  # (tokens, width) a method may write into it
    return Tokens(hidden, positions, prompt.is_visual, cache, positions, tower=prompt.tower)
