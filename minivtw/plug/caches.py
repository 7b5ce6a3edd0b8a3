"""The caches of transformers, when layers hold different numbers of tokens.

A cache says how many tokens it has seen by asking a layer, the first of its kind; `generate`, the positions and the
masks count by that. Where tokens left before that very layer, `ShortLayer` answers for them.
"""

from typing import Any, NamedTuple

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from ..errors import InputError
from .rows import Keys


class Held(NamedTuple):
    """What stays with a cache between forward passes: which tokens its short layers hold."""

    plan: tuple  # the layers that made it so
    total: int  # tokens that the cache has seen
    text: Keys  # in the layers from K on
    frozen: Keys  # in the frozen layers, which hold visual tokens before text

    def cut(self, past: int) -> "Held":
        """After `cache.crop`, by which assisted generation takes back what it guessed: `past` tokens are left."""
        gone = self.total - past
        if gone == 0:
            return self
        if gone < 0 or bool((self.text.places[:, -gone:] < past).any()):
            raise InputError("this cache was cropped into an image, or went on outside the context; start a new one")
        text, frozen = (keys._replace(places=keys.places[:, :-gone]) for keys in (self.text, self.frozen))
        return self._replace(total=past, text=text, frozen=frozen)

    @property
    def lacks_tokens(self) -> bool:
        """Whether any token left."""
        return self.text.places.shape[1] < self.total or not self.frozen.ordered


class HeldCache(DynamicCache):
    """A DynamicCache some of whose layers lack tokens. It goes on only within a block like the one that made it."""

    held: Held | None = None
    inside = False  # a pass whose hooks take care of it is going on

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if not self.inside and self.held is not None and self.held.lacks_tokens:
            raise InputError(
                "visual tokens left this cache in a block of minivtw's withdraw or freeze, which has ended; go on with "
                "it in such a block (and join a thread within its block)"
            )
        return super().update(key_states, value_states, *args, **kwargs)


class ShortLayer(DynamicLayer):
    """A layer that holds fewer keys and values than the conversation has tokens."""

    unheld = 0  # tokens seen and not held

    def get_seq_length(self) -> int:
        return super().get_seq_length() + self.unheld


class ShortSlidingLayer(DynamicSlidingWindowLayer):
    """A local layer that holds fewer keys and values than it would: it counts tokens, and must not count what it holds."""

    def crop(self, tokens_to_remove: int) -> None:
        before: int = self.get_seq_length()
        super().crop(tokens_to_remove)
        self.cumulative_length = before + tokens_to_remove if tokens_to_remove <= 0 else min(before, tokens_to_remove)


def check(cache: Any) -> None:
    """Raise InputError unless every layer of the cache can have a length of its own."""
    kinds, offloads = {type(layer) for layer in getattr(cache, "layers", [])}, getattr(cache, "offloading", False)
    grow = {DynamicLayer, DynamicSlidingWindowLayer, ShortLayer, ShortSlidingLayer}
    others = {kind.__name__ for kind in kinds - grow}
    if type(cache) not in (DynamicCache, HeldCache) or offloads or others:
        kind = "one that is offloading" if offloads else " and ".join(sorted(others or {type(cache).__name__}))
        raise InputError(f"withdrawal needs a DynamicCache, whose layers grow one by one, not {kind}")


def layer_of(cache: Any, index: int) -> Any:
    """A layer of the cache, None where it has none yet."""
    return cache.layers[index] if cache is not None and index < len(cache.layers) else None


def length(cache: Any, index: int) -> int:
    """How many tokens a layer of the cache holds keys of."""
    keys = getattr(layer_of(cache, index), "keys", None)
    return 0 if keys is None or keys.ndim < 4 else keys.shape[-2]


def shown(cache: Any, index: int) -> int:
    """How many of them it gives to attention: a local layer may hold more, to take back what was guessed."""
    holds, span = length(cache, index), window(cache, index)
    return holds if span is None else min(holds, span - 1)


def window(cache: Any, index: int) -> int | None:
    """How many tokens a local layer looks back, itself included; None if it sees them all, or the mask alone says.

    The cache knows, for transformers makes it by the config. An attention's own `sliding_window` does not: some carry
    the config's number in global layers, too, others in none.
    """
    layer = layer_of(cache, index)
    return layer.sliding_window if isinstance(layer, DynamicSlidingWindowLayer) else None


def prepare(cache: Any, short: list[int], layer_types: list[str] | None) -> None:
    """Before a forward pass: let the layers that report the cache's length answer for what they will not hold.

    short: the layers that will lack tokens; layer_types: the config's list, None if all layers are alike.
    """
    full = [index for index, kind in enumerate(layer_types or []) if kind == "full_attention"]
    for index in {0, *full[:1]} & set(short):
        while len(cache.layers) <= index:
            cache.layers.append(DynamicLayer())
        if type(cache.layers[index]) is DynamicLayer:
            cache.layers[index].__class__ = ShortLayer
    for index in short:
        if type(layer_of(cache, index)) is DynamicSlidingWindowLayer:
            cache.layers[index].__class__ = ShortSlidingLayer
    cache.__class__ = HeldCache
    cache.inside = True


def settle(cache: Any, short: list[int], held: Held) -> None:
    """After a forward pass: the layers with a count of their own count what left, too, and the cache remembers it."""
    for index in short:
        layer = cache.layers[index]
        if isinstance(layer, ShortLayer):
            layer.unheld = held.total - length(cache, index)
        elif isinstance(layer, DynamicSlidingWindowLayer):
            layer.cumulative_length = held.total
    cache.held, cache.inside = held, False
