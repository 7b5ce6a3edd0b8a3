"""How things print in a debugger, a notebook or a failing test: one line each, shapes and ranges instead of numbers.

`in_one_line` becomes the `repr` of everything that holds arrays or is long. Nothing is computed for it that is not there.
"""

import functools
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import fields, is_dataclass
from itertools import groupby
from typing import Any

import numpy as np

from ..checkpoints.parts import Parts, Tiler, VisionParts
from ..errors import shortened
from ..inputs.prompts import Prompt, Tiled
from ..methods.text import NamedMethod
from ..model.cache import KVCache, LayerCache
from ..model.connector import Connector, ShuffleConnector
from ..model.layers import LayerNorm, Linear
from ..model.tokens import EmbeddedPrompt, PreviousLayer, Tokens
from ..model.vision import Tower, Vision, VisionLayer
from ..model.weights import Decoder, DecoderLayer
from ..seen import Seen
from ..vlm import VLM, Answer, Chat


def ranges(numbers: Iterable[int]) -> str:
    """Ascending integers as their runs: 0-3 68-76."""
    runs = groupby(enumerate(map(int, numbers)), lambda pair: pair[1] - pair[0])
    ends = [(run[0][1], run[-1][1]) for run in (list(run) for _, run in runs)]
    return shortened(" ".join(f"{first}-{last}" if last > first else str(first) for first, last in ends), 60)


def array(values: np.ndarray) -> str:
    """An array's shape and the largest magnitude in it; of booleans, how many are true; of positions, their ranges."""
    if values.dtype == bool:
        return f"{values.sum()} of {values.size}"
    if values.dtype.kind == "f":
        return f"{values.shape} ±{np.abs(values).max(initial=0):.3g}"
    ascends = values.ndim == 1 and (np.diff(values) > 0).all()
    return f"{values.shape} {ranges(values) if ascends else f'up to {values.max(initial=0)}'}"


@functools.singledispatch
def in_one_line(thing: Any) -> str:
    """A thing in one line: its class, and its fields by name."""
    if is_dataclass(thing):
        named = [(field.name, getattr(thing, field.name)) for field in fields(thing)]
    elif hasattr(thing, "_fields"):
        named = list(zip(thing._fields, thing))
    else:
        return shortened(object.__repr__(thing), 80)
    listed = ", ".join(f"{name} {part(value)}" for name, value in named if value is not None)
    return shortened(f"{type(thing).__name__}({listed})")


def part(value: Any) -> str:
    """A field's value in few words."""
    if isinstance(value, np.ndarray):
        return array(value)
    if type(value).__repr__ is in_one_line:
        return in_one_line(value)
    if isinstance(value, np.generic):
        return str(value)
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        is_short = all(isinstance(one, str | int | float | tuple | None) for one in value) and len(repr(value)) < 100
        return repr(value) if is_short or not value else f"[{len(value)} x {type(value[0]).__name__}]"
    if callable(value):
        return getattr(value, "__name__", type(value).__name__)
    return shortened(repr(value), 100)


@in_one_line.register
def _(tokens: Tokens) -> str:
    visual = int(tokens.is_visual.sum())
    layer = tokens.previous.index + 1 if tokens.previous else len(tokens.ran)
    works = "" if tokens.works is None else f"; the next layer works on {tokens.works.sum()}"
    return shortened(
        f"Tokens({len(tokens)}: {visual} visual, {len(tokens) - visual} text; before layer {layer}; "
        f"hidden {array(tokens.hidden)}; positions {ranges(tokens.positions) or None}{works})"
    )


@in_one_line.register
def _(cache: KVCache) -> str:
    counts = ", ".join(f"{layers} x {tokens}" for tokens, layers in Counter(cache.tokens_per_layer).items())
    return shortened(f"KVCache({len(cache.layers)} layers: {counts} tokens; {cache.nbytes / 1000:,.0f} kB)")


@in_one_line.register
def _(cache: LayerCache) -> str:
    return f"LayerCache({len(cache)} tokens: positions {ranges(cache.positions) or None}; {(cache.keys.nbytes + cache.values.nbytes) / 1000:,.0f} kB)"


@in_one_line.register
def _(linear: Linear) -> str:
    return f"Linear({linear.weight.shape[0]} -> {linear.weight.shape[1]}{'' if linear.bias is None else ', bias'})"


@in_one_line.register
def _(norm: LayerNorm) -> str:
    return f"LayerNorm({len(norm.weight)})"


@in_one_line.register
def _(decoder: Decoder) -> str:
    config = decoder.config
    heads = f"{config.heads} heads over {config.kv_heads} key heads of {config.head_dim}"
    return f"Decoder({config.layers} layers, width {config.width}, {heads}, vocabulary {config.vocabulary:,})"


@in_one_line.register
def _(vision: Vision) -> str:
    config = vision.config
    pixels = f"{config.image_size} x {config.image_size} pixels -> {config.features} features"
    return f"Vision({config.layers} layers, width {config.width}, {config.heads} heads; {pixels})"


@in_one_line.register
def _(previous: PreviousLayer) -> str:
    return f"PreviousLayer({previous.index}: {len(previous.positions)} tokens after {previous.before} of earlier turns)"


@in_one_line.register
def _(answer: Answer) -> str:
    flops = answer.stats["flops"]
    saved = f"{1 - flops['prefill'] / flops['prefill_without_withdrawal']:.1%} of the prefill's FLOPs saved"
    how = f"{answer.stats['method'] or 'every token in every layer'}, {saved}"
    return f"Answer({shortened(answer.text, 100)!r}, {len(answer.token_ids)} tokens; {shortened(how, 140)})"


@in_one_line.register
def _(method: NamedMethod) -> str:
    return f"<method {shortened(method.spec)}>"


@in_one_line.register
def _(vlm: VLM) -> str:
    seen = f"; {vlm.parts.vision.encoder!r}" if vlm.parts.vision else ""
    return shortened(f"VLM({vlm.folder.name}: {vlm.decoder!r}{seen})")


@in_one_line.register
def _(chat: Chat) -> str:
    return shortened(f"Chat({chat.vlm.folder.name}, {chat.method}; {chat.cache!r})")


@in_one_line.register
def _(seen: Seen) -> str:
    return shortened(
        f"Seen({seen.vlm.folder.name}, {len(seen.token_ids)} tokens up to the image's end, {seen.method}; {seen.cache!r})"
    )


for kind in (
    *in_one_line.registry, Connector, DecoderLayer, EmbeddedPrompt, Parts, Prompt, ShuffleConnector, Tiled, Tiler, Tower,
    VisionLayer, VisionParts,
):  # fmt: skip
    if kind is not object:
        setattr(kind, "__repr__", in_one_line)  # noqa: B010


def as_html(answer: Answer) -> str:
    """An answer in a notebook: the image, its patches, and a bar per layer. The drawing is imported when it is asked for."""
    from .answer import answer_html

    return answer_html(answer)


setattr(Answer, "_repr_html_", as_html)  # noqa: B010
