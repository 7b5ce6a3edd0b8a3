"""What each generation within a block took, and what it would have taken without: tokens, cache, operations."""

import dataclasses
from typing import Any, NamedTuple

from . import caches


@dataclasses.dataclass
class Generation:
    """One call of `generate`; outside it, one call of the model with the calls that go on with its cache."""

    visual: int = 0  # tokens of images that went in, over the whole batch
    text: int = 0  # tokens of text (and padding) that went in, the answer's included
    cache_bytes: int = 0  # of keys and values at the end
    cache_bytes_without: int = 0
    flops: int | None = 0  # of the layers' matrices and attention, masks disregarded; None: layers choose among experts
    flops_without: int | None = 0
    cache: Any = dataclasses.field(default=lambda: None, repr=False, compare=False)  # a weak reference


class Sizes(NamedTuple):
    """What a layer multiplies with."""

    weights: int | None  # elements of its matrices; None: the layer chooses among experts
    written: int  # of those which make keys and values
    width: int  # of all heads together

    def flops(self, rows: int, keys: int, resting: int = 0) -> int:
        """Of `rows` tokens (over the batch) that look at `keys` each, and of `resting` ones that are only read."""
        return 2 * rows * (self.weights or 0) + 4 * rows * keys * self.width + 2 * resting * self.written


def sizes(layer: Any) -> Sizes:
    """Measure a layer by what its modules say; a matrix in few bits has as many elements as any other."""
    elements = {name: part.in_features * part.out_features for name, part in layer.named_modules() if is_matrix(part)}
    chooses = any(part.ndim == 3 for part in layer.parameters()) or any("expert" in name for name in elements)
    attention, config = layer.self_attn, getattr(layer.self_attn, "config", None)
    heads = getattr(config, "num_attention_heads", 0)
    written = sum(count for name, count in elements.items() if name.endswith(("self_attn.k_proj", "self_attn.v_proj")))
    width = heads * getattr(attention, "head_dim", 0)
    return Sizes(None if chooses else sum(elements.values()), written, width)


def is_matrix(part: Any) -> bool:
    return isinstance(getattr(part, "in_features", None), int) and isinstance(getattr(part, "out_features", None), int)


def note(told: Generation, measured: list[Sizes], now: Any, until: int, frozen: tuple) -> None:
    """Add one pass. measured: each layer; now: the `Pass` that has ended; until: K; frozen: the frozen layers."""
    batch = len(now.held.text.places)
    tokens = batch * (now.total - now.past)
    visual = 0 if now.visual is None else int(now.visual.sum())
    told.visual, told.text = told.visual + visual, told.text + tokens - visual
    text = tokens if now.text is None else now.text.index.numel()
    told.cache_bytes = told.cache_bytes_without = 0
    for index in range(len(measured)):
        size, whole = measured[index], index < until and index not in frozen
        keys = now.total if index < until else now.held.text.places.shape[1]
        if size.weights is None or told.flops is None or told.flops_without is None:
            told.flops = told.flops_without = None
        else:
            told.flops += size.flops(tokens if whole else text, keys, visual if index in frozen else 0)
            told.flops_without += size.flops(tokens, now.total)
        if held := caches.length(now.cache, index):
            part = now.cache.layers[index]
            each = sum(side.numel() * side.element_size() for side in (part.keys, part.values)) // held
            told.cache_bytes += each * held
            told.cache_bytes_without += each * min(now.total, (caches.window(now.cache, index) or now.total + 1) - 1)
