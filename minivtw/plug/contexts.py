"""Withdrawal for as long as a with-block lasts."""

import os
import pathlib
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

from torch import nn

from ..checkpoints.files import read_fields
from ..checkpoints.stored import STORED
from ..errors import InputError
from .anatomy import anatomy
from .hooks import Hooks


def withdraw(model: nn.Module, layer: int | str | os.PathLike) -> AbstractContextManager[nn.Module]:
    """Visual Tokens Withdrawal (Lin et al. 2024, section 3.2) in a transformers model: before layer K they leave.

    model: a vision-language model; layer: K from 0 to the number of layers, or the path of a stored withdrawal.json (or
    its folder). Within the context `generate` and the model itself do without; outside, the model is as it was.
    Raises InputError for what is not understood.
    """
    return plugged(model, layer, ())


def freeze(
    model: nn.Module, layers: Iterable[int], withdraw: int | str | os.PathLike | None = None
) -> AbstractContextManager[nn.Module]:
    """Let visual tokens rest in some layers (ShortV, arXiv 2504.00502), and leave before layer `withdraw`, if given.

    In a frozen layer they are read, by keys and values of the state they came with, but ask nothing, pass no output
    projection and no feed-forward. layers: indices below `withdraw`. Raises InputError for what is not understood.
    """
    if isinstance(layers, str) or not isinstance(layers, Iterable):
        raise InputError(f"the frozen layers must be a list of whole numbers, not {layers!r}")
    return plugged(model, withdraw, tuple(layers))


@contextmanager
def plugged(model: nn.Module, layer: Any, frozen: tuple) -> Iterator[nn.Module]:
    """Hooks on, and off again whatever happens. layer: as for `withdraw`, or None; frozen: indices."""
    if isinstance(layer, str | os.PathLike):  # a withdrawal.json, or a folder that holds one
        path = pathlib.Path(layer, STORED) if pathlib.Path(layer).is_dir() else pathlib.Path(layer)
        layer = read_fields(path.parent, path.name).integer("withdraw_layer")
    hooks = Hooks(anatomy(model), layer, frozen)
    with ExitStack() as handles:
        for module, place, hook in hooks.places():
            register = module.register_forward_hook if place == "after" else module.register_forward_pre_hook
            handles.callback(register(hook, with_kwargs=place == "before").remove)
        yield model
