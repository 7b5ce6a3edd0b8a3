"""The caches of transformers, when layers hold different numbers of tokens.

A cache says how many tokens it has seen by asking a layer, the first of its kind; `generate`, the positions and the
masks count by that. Where tokens left before that very layer, `ShortLayer` answers for them.
"""

from typing import Any, NamedTuple

from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from ..errors import InputError
from .rows import Keys

NOTE = "minivtw_held"  # the attribute of a cache under which `Held` is kept


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


class ShortLayer(DynamicLayer):
    """A layer that holds fewer keys and values than the conversation has tokens."""

    unheld = 0  # tokens seen and not held

    def get_seq_length(self) -> int:
        return super().get_seq_length() + self.unheld


def check(cache: Any) -> None:
    """Raise InputError unless every layer of the cache can have a length of its own."""
    kinds, offloads = {type(layer) for layer in getattr(cache, "layers", [])}, getattr(cache, "offloading", False)
    others = {kind.__name__ for kind in kinds - {DynamicLayer, DynamicSlidingWindowLayer, ShortLayer}}
    if not isinstance(cache, DynamicCache) or offloads or others:
        kind = "one that is offloading" if offloads else " and ".join(sorted(others or {type(cache).__name__}))
        raise InputError(f"withdrawal needs a DynamicCache, whose layers grow one by one, not {kind}")


def length(cache: Any, index: int) -> int:
    """How many tokens a layer of the cache holds keys of."""
    keys = cache.layers[index].keys if cache is not None and index < len(cache.layers) else None
    return 0 if keys is None or keys.ndim < 4 else keys.shape[-2]


def prepare(cache: DynamicCache, short: list[int], layer_types: list[str] | None) -> None:
    """Before a forward pass: let the layers that report the cache's length answer for what they will not hold.

    short: the layers that will lack tokens; layer_types: the config's list, None if all layers are alike.
    """
    full = [index for index, kind in enumerate(layer_types or []) if kind == "full_attention"]
    for index in {0, *full[:1]} & set(short):
        while len(cache.layers) <= index:
            cache.layers.append(DynamicLayer())
        if type(cache.layers[index]) is DynamicLayer:
            cache.layers[index].__class__ = ShortLayer


def settle(cache: DynamicCache, short: list[int], total: int) -> None:
    """After a forward pass that ends at place `total`: the layers with a count of their own count what left, too."""
    for index in short:
        layer = cache.layers[index]
        if isinstance(layer, ShortLayer):
            layer.unheld = total - length(cache, index)
        elif isinstance(layer, DynamicSlidingWindowLayer):
            layer.cumulative_length = total
