"""Withdrawal for as long as a with-block lasts, and each generation that began in it."""

import contextlib
import functools
import os
import pathlib
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack
from typing import Any

from torch import nn

from ..checkpoints.files import read_fields
from ..checkpoints.stored import STORED
from ..errors import InputError
from .anatomy import VisualIds, anatomy
from .figures import Generation
from .hooks import Hooks, on
from .trial import try_out

Layer = int | str | os.PathLike


def withdraw(
    model: nn.Module, layer: Layer, visual_ids: VisualIds = None, check: bool = True
) -> AbstractContextManager[list[Generation]]:
    """Visual Tokens Withdrawal (Lin et al. 2024, section 3.2) in a transformers model: before layer K they leave.

    model: a vision-language model; layer: K from 0 to the number of layers, or the path of a stored withdrawal.json (or
    its folder). visual_ids: the ids of the tokens that stand for images, or a function from token ids (batch, tokens)
    to a boolean mask; None for what the config says. check: try the method on a short prompt once per model.
    Within the block `generate` and the model itself do without; outside, the model is as it was. A generation that began
    in the block keeps to it. The block gives a list of what each generation took. Raises InputError for what is not
    understood.
    """
    return plugged(model, layer, (), visual_ids, check)


def freeze(
    model: nn.Module,
    layers: Iterable[int],
    withdraw: Layer | None = None,
    visual_ids: VisualIds = None,
    check: bool = True,
) -> AbstractContextManager[list[Generation]]:
    """Let visual tokens rest in some layers (ShortV, arXiv 2504.00502), and leave before layer `withdraw`, if given.

    In a frozen layer they are read, by keys and values of the state they came with, but ask nothing, pass no output
    projection and no feed-forward. layers: indices below `withdraw`. The rest is as for `withdraw`.
    """
    if isinstance(layers, str) or not isinstance(layers, Iterable):
        raise InputError(f"the frozen layers must be a list of whole numbers, not {layers!r}")
    return plugged(model, withdraw, tuple(layers), visual_ids, check)


def withdraw_by_default(
    model: nn.Module, layer: Layer, visual_ids: VisualIds = None, check: bool = True
) -> Callable[[], None]:
    """Withdraw without a block, in all threads, until the function that this returns is called: for servers, and for
    evaluation harnesses, whose calls cannot be wrapped. Arguments as for `withdraw`.
    """
    block = ExitStack()
    block.enter_context(plugged(model, layer, (), visual_ids, check, warns=False))
    block.enter_context(shadowed(model, "undo_withdrawal", block.close))  # a block that nobody holds would end
    return block.close


@contextlib.contextmanager
def plugged(
    model: nn.Module, layer: Any, frozen: tuple, visual_ids: VisualIds = None, check: bool = True, warns: bool = True
) -> Iterator[list[Generation]]:
    """Hooks on, and off again whatever happens. layer: as for `withdraw`, or None; frozen: indices; warns: if the model
    was called in the block in no way that the hooks noticed."""
    if isinstance(layer, str | os.PathLike):  # a withdrawal.json, or a folder that holds one
        path = pathlib.Path(layer, STORED) if pathlib.Path(layer).is_dir() else pathlib.Path(layer)
        layer = read_fields(path.parent, path.name).integer("withdraw_layer")
    hooks = Hooks(anatomy(model, visual_ids), layer, frozen)
    if check:
        try_out(hooks)
    generating = [module for module in model.modules() if callable(getattr(type(module), "generate", None))]
    with on(hooks), ExitStack() as shadows:
        hooks.is_open = True
        shadows.callback(setattr, hooks, "is_open", False)
        for module in generating:  # the function itself knows its block, and so does a thread that is given it
            shadows.enter_context(shadowed(module, "generate", keeping(hooks, module.generate)))
            shadows.enter_context(shadowed(module, "generate_batch", no_continuous_batching))
        yield hooks.told
    if warns and hooks.short and not hooks.called:
        text = f"nothing was withdrawn: no call of {hooks.parts.name} within the block went through its hooks"
        warnings.warn(text, stacklevel=3)


def keeping(hooks: Hooks, generate: Callable) -> Callable:
    """`generate` with the method of a block from its first token to its last, even if the block ends meanwhile."""

    @functools.wraps(generate)
    def kept(*args: Any, **kwargs: Any) -> Any:
        with on(hooks), hooks.generation():
            return generate(*args, **kwargs)

    return kept


def no_continuous_batching(*args: Any, **kwargs: Any) -> None:
    """In place of `generate_batch`, which would hide what is wrong in its outputs."""
    raise InputError("continuous batching has a cache of its own kind, which is not understood; use generate")


@contextlib.contextmanager
def shadowed(module: Any, name: str, value: Callable) -> Iterator[None]:
    """An object's attribute in place of its class's, or of its own, for a while."""
    own = vars(module).get(name)
    setattr(module, name, value)
    try:
        yield
    finally:
        vars(module).pop(name)
        if own is not None:
            setattr(module, name, own)
