"""Methods as text: `withdraw:layer=6`, `freeze:layers=4/9/18-23+withdraw:layer=24`, `mine.py:my_method,layer=3`.

So a method can be typed after `--method`, stored with a model and printed in a table. Parameters are converted and
checked by the annotations of the function that makes the method; `+` lists methods that are called one after the other.
"""

import contextlib
import functools
import inspect
import pathlib
import re
import runpy
from collections.abc import Callable, Collection
from dataclasses import dataclass
from numbers import Real
from typing import Annotated, Any

import numpy as np

from ..errors import InputError, checked_int
from ..model.tokens import Method, Tokens
from ..model.weights import MOST_LAYERS

MOST_TEXT = 10_000  # characters of a method's text, wherever it comes from
MOST_PARTS = 100  # methods in it
MAKER = "a function that returns a method takes a comma, as in FILE.py:FUNCTION,layer=2; one that is a method, none"
FILE = re.compile(r"\s*(.+?\.py):(\w+)((?:,[^+]*)?)\s*\+", re.S)  # the name of a file may hold + and : as well

Layer = Annotated[int, "a layer of the decoder"]
Until = Annotated[int, "a layer of the decoder; what it limits begins at layer 0"]
Layers = Annotated[Collection[int], "layers of the decoder"]
Share = Annotated[float, "from 0 to 1"]
Count = Annotated[int, "1 or more"]
Seed = Annotated[int, "0 or more"]


@dataclass(frozen=True, eq=False)
class NamedMethod:
    """A method that knows its text."""

    function: Method
    spec: str
    layers: tuple[int, ...] = (0,)  # that it names; 0 stands for one that names none
    withdraw_layer: int | None = None  # K, the layer before which all visual tokens leave, if it is `withdraw`

    def __call__(self, index: int, tokens: Tokens) -> Tokens:
        return self.function(index, tokens)


def named(make: Callable[..., Method]) -> Callable[..., NamedMethod]:
    """Let `make` make a `NamedMethod`, and raise InputError for parameters that are not what its annotations say."""
    signature = inspect.signature(make)

    @functools.wraps(make)
    def made(*arguments: Any, **options: Any) -> NamedMethod:
        bound = signature.bind(*arguments, **options)
        bound.apply_defaults()
        layers: set[int] = set()
        for name, value in bound.arguments.items():
            kind = signature.parameters[name].annotation
            bound.arguments[name] = value = KINDS[kind][1](value, name)
            layers |= {value} if kind is Layer else {0, value} if kind is Until else value if kind is Layers else set()
        texts = [f"{name}={written(value)}" for name, value in bound.arguments.items()]
        spec = f"{make.__name__}:{','.join(texts)}" if texts else make.__name__
        withdraw_layer = bound.arguments["layer"] if make.__name__ == "withdraw" else None
        return NamedMethod(make(*bound.args, **bound.kwargs), spec, tuple(sorted(layers)) or (0,), withdraw_layer)

    return made


def checked_layers(layers: Any, name: str) -> frozenset[int]:
    if isinstance(layers, str) or not isinstance(layers, Collection):
        raise InputError(f"{name} must be a collection of layers, not {layers!r}")
    return frozenset(checked_int(layer, name) for layer in layers)


def checked_share(share: Any, name: str) -> float:
    if not isinstance(share, Real) or not 0 <= float(share) <= 1:
        raise InputError(f"{name} is a share, from 0 to 1, not {share!r}")
    return float(share)


def written(value: Any) -> str:
    """A parameter as text: numbers as they are, layers as 4/9/18-23."""
    if not isinstance(value, Collection):
        return f"{value:g}" if isinstance(value, float) else str(value)
    layers = sorted(value)
    firsts = [layer for layer in layers if layer - 1 not in value]
    lasts = [layer for layer in layers if layer + 1 not in value]
    return "/".join(str(first) if first == last else f"{first}-{last}" for first, last in zip(firsts, lasts))


def read_layers(text: str) -> frozenset[int]:
    """4/9/18-23 as a set of layers."""
    layers: set[int] = set()
    for part in text.split("/"):
        first, _, last = part.partition("-")
        if not int(first) <= int(last or first) <= MOST_LAYERS:
            raise ValueError("layers go from the smaller to the larger, and no model has so many")
        layers.update(range(int(first), int(last or first) + 1))
    return frozenset(layers)


# Of a parameter's annotation: how its text is read, and how its value is checked.
KINDS: dict[Any, tuple[Callable[[str], Any], Callable[[Any, str], Any]]] = {
    Layer: (int, checked_int),
    Until: (int, checked_int),
    Layers: (read_layers, checked_layers),
    Share: (float, checked_share),
    Count: (int, functools.partial(checked_int, least=1)),
    Seed: (int, checked_int),
    **{plain: (plain, lambda value, _: value) for plain in (int, float, str)},  # of a reader's own function
}


def parse(text: str, methods: dict[str, Callable[..., NamedMethod]], files: bool = True) -> list[NamedMethod]:
    """The methods that a text lists, in its order. Raises InputError for a name or a parameter that does not exist.

    files: whether it may name a Python file, which is run. What comes out of a file or a request may not.
    """
    if len(text) > MOST_TEXT or text.count("+") >= MOST_PARTS:
        raise InputError(f"a method's text has at most {MOST_TEXT:,} characters and {MOST_PARTS} methods")
    if not files and ".py" in text:
        raise InputError(f"{text:.80} names a Python file; code is run only if --method names it when a command starts")
    found, rest = [], f"{text}+"
    while rest:
        part, file = rest[: rest.index("+")], FILE.match(rest)
        if file and part.partition(":")[0].strip() not in methods:
            found.append(own_method(pathlib.Path(file[1]), file[2], file[3].strip()))
            rest = rest[file.end() :]
        else:
            found.append(parse_one(part.strip(), methods))
            rest = rest[len(part) + 1 :]
    return found


def parse_one(text: str, methods: dict[str, Callable[..., NamedMethod]]) -> NamedMethod:
    name, _, rest = text.partition(":")
    if name not in methods:
        raise InputError(f"there is no method {name!r}; there are {', '.join(methods)}, and FILE.py:FUNCTION")
    options, parameters = read_options(name, methods[name], rest), inspect.signature(methods[name]).parameters
    missing = [key for key, one in parameters.items() if one.default is one.empty and key not in options]
    if missing:
        raise InputError(f"the method {name} needs {', '.join(missing)}, as in {name}:{missing[0]}=…")
    return methods[name](**options)


def read_options(name: str, make: Callable[..., Any], text: str) -> dict[str, Any]:
    """What a text such as `layer=2,keep=0.5` gives to the function `make`, each value read as its annotation says."""
    parameters, options = signature_of(make).parameters, dict[str, Any]()
    for part in filter(None, text.split(",")):
        key, _, value = part.partition("=")
        if key not in parameters:
            raise InputError(f"the method {name} takes {', '.join(parameters) or 'no parameters'}, not {key!r}")
        if key in options:
            raise InputError(f"the text gives the method {name} its {key} twice")
        kind = parameters[key].annotation  # without one a value is a number if it can be
        for read in (KINDS[kind][0],) if kind in KINDS else (int, float, str):
            with contextlib.suppress(ValueError):
                options[key] = read(value)
                break
        else:
            raise InputError(f"{key} of the method {name} cannot be {value!r}")
    return options


def own_method(path: pathlib.Path, name: str, given: str) -> NamedMethod:
    """A function (index, tokens) -> tokens out of a reader's own file; given `,layer=2`, what it returns for layer=2."""
    try:
        content = runpy.run_path(str(path))
    except (Exception, SystemExit) as error:
        raise InputError(f"cannot run {path}: {type(error).__name__}: {error}") from error
    function, spec = content.get(name), f"{path}:{name}{given}"
    if not callable(function):
        raise InputError(f"{path} has no function {name!r}; a method is given as {path}:FUNCTION")
    options = read_options(f"{path}:{name}", function, given) if given else {}
    try:
        signature_of(function).bind(*(() if given else (0, None)), **options)
    except TypeError as error:
        what = "without more" if given else "with an index and tokens"
        raise InputError(f"{spec} cannot be called {what}: {error}; {MAKER}") from error
    if given:
        try:
            function = function(**options)
        except Exception as error:
            raise InputError(f"cannot make {spec}: {type(error).__name__}: {error}") from error
        if not callable(function):
            raise InputError(f"{spec} must be a function of index and tokens, not {type(function).__name__}")
    return NamedMethod(guarded(function, spec), spec, tuple(getattr(function, "layers", (0,))))


def signature_of(function: Callable[..., Any]) -> inspect.Signature:
    """How a function is called; with anything, where Python does not know, as of some that are written in C."""
    try:
        return inspect.signature(function)
    except (TypeError, ValueError):
        return inspect.signature(lambda *positional, **named: None)


def known(method: Method) -> NamedMethod:
    """A method as one that knows its text: a reader's own function by its name, and what it returns is checked."""
    if isinstance(method, NamedMethod):
        return method
    name = str(spec_of(method))
    return NamedMethod(guarded(method, name), name, tuple(getattr(method, "layers", (0,))))


def guarded(function: Method, name: str) -> Method:
    """A reader's own function; raises InputError, which names it, for what no layer can work on."""

    def method(index: int, tokens: Tokens) -> Tokens:
        try:
            kept = function(index, tokens)
        except Exception as error:
            error.is_the_readers = True  # type: ignore[attr-defined]  # `terminal.command` lets it through
            raise
        if kept is tokens and len(tokens) == 1:
            return kept  # what is fed back and left alone costs no time
        if missing := what_is_missing(tokens, kept):
            raise InputError(f"{name} must return {missing}, before layer {index}")
        return kept

    return method


def what_is_missing(came: Tokens, kept: Any) -> str | None:
    """What a method that was given the tokens that `came` must return, and did not; None if nothing is missing."""
    if not isinstance(kept, Tokens):
        return f"tokens, not {type(kept).__name__}{f' ({MAKER})' if callable(kept) else ''}"
    shared = ("cache", "previous", "ran", "notes", "extra_flops")
    if any(getattr(kept, name) is not getattr(came, name) for name in shared):
        return "tokens of those that it was given, not earlier ones"
    works = np.ones(np.shape(kept.positions), bool) if kept.works is None else kept.works
    for name in ("positions", "hidden", "is_visual", "rotary_positions", "works"):
        array, like = (works, came.is_visual) if name == "works" else (getattr(kept, name), getattr(came, name))
        shape = *(np.shape(kept.positions)[:1] or came.positions.shape), *like.shape[1:]
        if not isinstance(array, np.ndarray) or (array.dtype, array.shape) != (like.dtype, shape):
            return f"{name} as {like.dtype}, of shape {shape}"
    if (np.diff(kept.positions) <= 0).any() or not np.isin(kept.positions, came.positions).all():
        return "tokens of those that it was given, each of them once and in their order"
    if not works[-1:].all() or kept.positions[-1:].tolist() != came.positions[-1:].tolist():
        return "the last token, to be worked on: its state becomes the answer"
    if not all(np.isfinite(array).all() for array in (kept.hidden, *(group.shares for group in kept.followed))):
        return "finite numbers"
    if kept.rotary_positions.min(initial=0) < 0 or kept.rotary_positions.max(initial=0) >= came.cache.max_positions:
        return f"rotary positions from 0 to {came.cache.max_positions - 1}, which are all that the model has"
    return None


def spec_of(method: Method | None) -> str | None:
    """How a method is written; a plain function by its name."""
    return None if method is None else getattr(method, "spec", None) or getattr(method, "__name__", "a method")


def first_layer(method: Method | None) -> int:
    """The first layer that a method names: before it, nothing changes. 0 as soon as one part of it names none."""
    return min(known(method).layers, default=0) if method else 0


def check(method: Method | None, layers: int) -> NamedMethod | None:
    """Raise InputError where a method names a layer that a decoder of `layers` does not have. Returns it as it is `known`."""
    if method is None:
        return None
    if not callable(method):
        raise InputError(f"a method is a function of a layer's index and its tokens, not {method!r}")
    for layer in known(method).layers:
        if layer > layers:
            raise InputError(f"a layer must be from 0 to {layers}, the number of layers, not {layer}")
    return known(method)


def withdrawal_layer(method: Method | None) -> int | None:
    """K, the layer before which all visual tokens leave, where a method withdraws, whatever else it does."""
    return getattr(method, "withdraw_layer", None)
