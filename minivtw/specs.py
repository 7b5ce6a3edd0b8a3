"""Methods as text: `withdraw:layer=6`, `freeze:layers=4/9/18-23+withdraw:layer=24`, `mine.py:my_method`.

So a method can be typed after `--method`, stored with a model and printed in a table. Parameters are converted by the
annotations of the function that makes the method; `+` lists methods that are asked one after the other.
"""

import functools
import inspect
import pathlib
import re
import runpy
from collections.abc import Callable, Collection
from typing import Annotated, Any

from .checkpoints.fields import MOST_LAYERS
from .errors import InputError
from .model.tokens import Tokens

Method = Callable[[int, Tokens], Tokens]  # (index of the layer to come, tokens at its door) -> the tokens that go on
Layer = Annotated[int, "a layer of the decoder"]
Layers = Annotated[Collection[int], "layers of the decoder"]


def named(make: Callable[..., Method]) -> Callable[..., Method]:
    """Let the methods that `make` makes know their text (`spec`) and the layers that they name (`layers`).

    The returned function raises InputError for parameters of the wrong kind.
    """
    parameters = inspect.signature(make).parameters

    @functools.wraps(make)
    def made(*arguments: Any, **options: Any) -> Method:
        bound = inspect.signature(make).bind(*arguments, **options)
        bound.apply_defaults()
        layers: list[int] = []
        for name, value in bound.arguments.items():
            if parameters[name].annotation in (Layer, Layers):
                layers += checked_layers(name, value if parameters[name].annotation is Layers else [value])
        keep = bound.arguments.get("keep", 1)
        if not 0 <= keep <= 1:
            raise InputError(f"keep is a share of the visual tokens, from 0 to 1, not {keep}")
        method = make(*bound.args, **bound.kwargs)
        texts = [f"{name}={written(value)}" for name, value in bound.arguments.items()]
        method.spec = f"{make.__name__}:{','.join(texts)}" if texts else make.__name__  # type: ignore[attr-defined]
        method.layers = tuple(layers)  # type: ignore[attr-defined]
        return method

    return made


def checked_layers(name: str, layers: Collection[int]) -> list[int]:
    """Raise InputError unless these are layer numbers."""
    for layer in layers:
        if isinstance(layer, bool) or not hasattr(layer, "__index__") or layer < 0:
            raise InputError(f"{name} must be 0 or a whole number above it, not {layer!r}")
    return sorted(int(layer) for layer in layers)


def written(value: Any) -> str:
    """A parameter as text: numbers as they are, layers as 4/9/18-23."""
    if not isinstance(value, Collection) or isinstance(value, str):
        return f"{value:g}" if isinstance(value, float) else str(value)
    runs: list[list[int]] = []
    for layer in sorted(value):
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return "/".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def read_layers(text: str) -> frozenset[int]:
    """4/9/18-23 as a set of layers."""
    layers: set[int] = set()
    for part in text.split("/"):
        first, _, last = part.partition("-")
        if int(last or first) > MOST_LAYERS:
            raise ValueError("no model has so many layers")
        layers.update(range(int(first), int(last or first) + 1))
    return frozenset(layers)


def parse(text: str, methods: dict[str, Callable[..., Method]], files: bool = True) -> list[Method]:
    """The methods that a text lists, in its order. Raises InputError for a name or a parameter that does not exist.

    files: whether it may name a Python file, which is run. What comes out of a file or a request may not.
    """
    if not files and ".py" in text:
        raise InputError("this method is in a Python file; code is run only if --method names it when a command starts")
    return [parse_one(part.strip(), methods) for part in text.split("+")]


def parse_one(text: str, methods: dict[str, Callable[..., Method]]) -> Method:
    name, _, rest = text.partition(":")
    if name.endswith(".py"):
        return own_method(pathlib.Path(name), rest)
    if name not in methods:
        raise InputError(f"there is no method {name!r}; there are {', '.join(methods)}, and FILE.py:FUNCTION")
    parameters = inspect.signature(methods[name]).parameters
    options: dict[str, Any] = {}
    for part in filter(None, rest.split(",")):
        key, _, value = part.partition("=")
        if key not in parameters:
            raise InputError(f"the method {name} takes {', '.join(parameters) or 'no parameters'}, not {key!r}")
        kind: Any = parameters[key].annotation
        read: Callable[[str], Any] = int if kind is Layer else read_layers if kind is Layers else kind
        try:
            options[key] = read(value)
        except ValueError:
            raise InputError(f"{key} of the method {name} cannot be {value!r}") from None
    missing = [
        key for key, parameter in parameters.items() if parameter.default is parameter.empty and key not in options
    ]
    if missing:
        raise InputError(f"the method {name} needs {', '.join(missing)}, as in {name}:{missing[0]}=…")
    return methods[name](**options)


def own_method(path: pathlib.Path, name: str) -> Method:
    """A function (index, tokens) -> tokens out of a reader's own Python file."""
    try:
        content = runpy.run_path(str(path))
    except (Exception, SystemExit) as error:
        raise InputError(f"cannot run {path}: {type(error).__name__}: {error}") from error
    function = content.get(name)
    if not callable(function):
        raise InputError(f"{path} has no function {name!r}; a method is given as {path}:FUNCTION")

    def method(index: int, tokens: Tokens) -> Tokens:
        kept = function(index, tokens)
        if not isinstance(kept, Tokens):
            raise InputError(f"{path}:{name} must return tokens, not {type(kept).__name__}")
        return kept

    method.spec = f"{path}:{name}"  # type: ignore[attr-defined]
    return method


def spec_of(method: Method | None) -> str | None:
    """How a method is written; a plain function by its name."""
    return None if method is None else getattr(method, "spec", None) or getattr(method, "__name__", "a method")


def first_layer(method: Method | None) -> int:
    """The first layer that a method names: before it, nothing changes. 0 for a method that names none."""
    return min(getattr(method, "layers", ()), default=0)


def check(method: Method | None, layers: int) -> Method | None:
    """Raise InputError where a method names a layer that a decoder of `layers` does not have. Returns the method."""
    if method is not None and not callable(method):
        raise InputError(f"a method is a function of a layer's index and its tokens, not {method!r}")
    for layer in getattr(method, "layers", ()):
        if layer > layers:
            raise InputError(f"a layer must be from 0 to {layers}, the number of layers, not {layer}")
    return method


def withdrawal_layer(method: Method | None) -> int | None:
    """K, where a method is `withdraw` and nothing else."""
    match = re.fullmatch(r"withdraw:layer=(\d+)", spec_of(method) or "")
    return int(match.group(1)) if match else None
