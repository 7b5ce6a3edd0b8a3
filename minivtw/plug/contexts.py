"""Withdrawal for as long as a with-block lasts."""

import contextlib
import json
import os
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from ..errors import InputError
from ..inputs.files import text_of
from .anatomy import anatomy
from .hooks import Hooks


@contextlib.contextmanager
def withdraw(model: nn.Module, layer: int | str | os.PathLike) -> Iterator[nn.Module]:
    """Visual Tokens Withdrawal (Lin et al. 2024, section 3.2) in a transformers model: before layer K they leave.

    model: a vision-language model; layer: K from 0 to the number of layers, or the path of a stored withdrawal.json (or
    its folder). Within the context `generate` and the model itself do without; outside, the model is as it was.
    Raises InputError for what is not understood.
    """
    with plugged(model, layer, ()):
        yield model


@contextlib.contextmanager
def freeze(
    model: nn.Module, layers: Iterable[int], withdraw: int | str | os.PathLike | None = None
) -> Iterator[nn.Module]:
    """Let visual tokens rest in some layers (ShortV, arXiv 2504.00502), and leave before layer `withdraw`, if given.

    In a frozen layer they are read, by keys and values of the state they came with, but ask nothing, pass no output
    projection and no feed-forward. layers: indices below `withdraw`. Raises InputError for what is not understood.
    """
    if isinstance(layers, str) or not isinstance(layers, Iterable):
        raise InputError(f"the frozen layers must be a list of whole numbers, not {layers!r}")
    with plugged(model, withdraw, tuple(layers)):
        yield model


@contextlib.contextmanager
def plugged(model: nn.Module, layer: Any, frozen: tuple) -> Iterator[None]:
    """Hooks on, and off again whatever happens. layer: K or None; frozen: indices."""
    layer = stored(layer) if isinstance(layer, str | os.PathLike) else layer
    hooks = Hooks(anatomy(model), layer, frozen)
    with contextlib.ExitStack() as handles:
        for module, place, hook in hooks.places():
            register = module.register_forward_hook if place == "after" else module.register_forward_pre_hook
            handles.callback(register(hook, with_kwargs=place == "before").remove)
        yield


def stored(path: str | os.PathLike) -> int:
    """K out of a withdrawal.json, or of a folder that holds one."""
    file = pathlib.Path(path)
    file = file / "withdrawal.json" if file.is_dir() else file
    text = text_of(file)
    try:
        return json.loads(text)["withdraw_layer"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{file} says no withdraw_layer") from error
