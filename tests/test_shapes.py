"""Shape comments are true: the model runs, and every shape beside an assignment, a field or in a docstring is held
against the arrays. An axis is bound where it is first seen in a function's call, and must agree from then on; a config at hand binds its sizes first.
"""

import ast
import collections
import dataclasses
import functools
import inspect
import io
import pathlib
import re
import sys
import tokenize

import numpy as np
import pytest

import minivtw
from minivtw.methods.shelf import METHODS, method_of
from minivtw.model.cache import KVCache, LayerCache
from minivtw.model.tokens import Tokens

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "minivtw"
GOLDEN = ROOT / "tests" / "golden"
SCENE, QUESTION = str(ROOT / "docs/pictures/scene.png"), "What color is the star?"
SHAPE = re.compile(r"#.*?\(([^()]*(?:\([^()]*\)[^()]*)*)\)")
AXIS = re.compile(r"[\w *+^/()-]+")
SIZES = ("width", "heads", "kv_heads", "head_dim", "mlp_width", "vocabulary", "patches", "features", "patch_size")
METHODS_OF_CLASSES = {
    name: getattr(kind, name) for kind in (Tokens, LayerCache, KVCache, minivtw.VLM) for name in vars(kind)
}
SOURCE = functools.cache(inspect.getsourcelines)
MOST_CALLS = 15  # of a function are looked at for each method and model
BORN_IN = ("model", "methods")  # and vlm.py: every array that is made there says its shape
FILES = [
    *(path for path in (PACKAGE / "model").glob("*.py") if path.name != "blocks.py"),
    *(PACKAGE / "methods").glob("*.py"),
    *(PACKAGE / "inputs").glob("*.py"),
    PACKAGE / "vlm.py",
]


def axes_of(text):
    """The axes of a shape in words, or None for other things in brackets."""
    axes = [axis.strip() for axis in text.split(",") if axis.strip()]
    return axes if axes and all(AXIS.fullmatch(axis) for axis in axes) and ("," in text) else None


@functools.cache
def assignments(path, of_classes=False):
    """(first line, last line, [names], axes or None) of every assignment to plain names, in functions or in classes."""
    source = path.read_text(encoding="utf-8")
    said = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        shape = token.type == tokenize.COMMENT and SHAPE.match(token.string)
        if shape and axes_of(shape[1]):
            said[token.start[0]] = axes_of(shape[1])
    whole, found = ast.parse(source), []
    outside = {id(one) for node in ast.walk(whole) if isinstance(node, ast.ClassDef | ast.Module) for one in node.body}
    for node in ast.walk(whole):
        if isinstance(node, ast.Assign | ast.AugAssign | ast.AnnAssign) and (id(node) in outside) == of_classes:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            each = [one for target in targets for one in (target.elts if isinstance(target, ast.Tuple) else [target])]
            names = [one.id for one in each if isinstance(one, ast.Name)]
            if names:
                found.append((node.lineno, node.end_lineno, names, said.get(node.end_lineno)))
    return found


def calls(path):
    """(line, name of the function) of every assignment of a call's result."""
    for node in ast.walk(ast.parse(pathlib.Path(path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
            function = node.value.func
            yield node.lineno, function.id if isinstance(function, ast.Name) else getattr(function, "attr", None)


def docstring_shapes(function):
    """({argument: axes}, [axes of what is returned]) as a docstring says them."""
    text = " ".join((inspect.getdoc(function) or "").split())
    arguments = {}
    for names, shape in re.findall(r"((?:\w+(?:, | and )?)+): \(([^()]*)\)", text):
        for name in re.split(r", | and ", names):
            if axes_of(shape):
                arguments[name] = axes_of(shape)
    returned = re.search(r"Returns[^.]*?\(([^()]*(?:\([^()]*\)[^()]*)*)\)", text)
    return arguments, returned and axes_of(returned[1])


def size_of(axis, sizes):
    """The number that an axis must have, or None where it is not bound."""
    if not re.search(r"[*+^/-]", axis):
        return int(axis) if axis.isdigit() else sizes.get(axis)
    names = set(re.findall(r"[a-z_]\w*", axis))
    if not names <= sizes.keys() or re.search(r"\w \w", axis):
        return None
    return eval(axis.replace("^", "**").replace("/", "//"), {}, dict(sizes))


class Checker:
    """Holds what is said against the arrays that come by."""

    def __init__(self):
        self.known = {str(path): assignments(path) for path in FILES}
        self.calls = {path: dict(calls(path)) for path in self.known}
        self.calls_of = collections.Counter()  # of each function, since the method changed
        self.functions = {}  # code -> what its docstring says, what each line says
        self.checked, self.wrong, self.unsaid = collections.Counter(), set(), set()

    def hold(self, where, axes, array, sizes):
        if not isinstance(array, np.ndarray):
            return
        self.checked[where] += 1
        if array.ndim != len(axes):
            self.wrong.add(f"{where} ({', '.join(axes)}): {array.shape}")
            return
        for axis, size in zip(axes, array.shape):
            expected = size_of(axis, sizes)
            if expected is None:
                if re.fullmatch(r"\w[\w ]*", axis):
                    sizes[axis] = size
            elif expected != size:
                self.wrong.add(f"{where} ({', '.join(axes)}): {axis} is {size}, not {expected}: {array.shape}")

    def sizes(self, frame):
        """What the sizes at hand are called in this frame."""
        found = {}
        names = frame.f_locals
        for holder in (names.get("config"), *(getattr(value, "config", None) for value in list(names.values()))):
            found |= {size: getattr(holder, size) for size in SIZES if isinstance(getattr(holder, size, None), int)}
        return found | {name: value for name, value in names.items() if name in SIZES and type(value) is int}

    def trace(self, frame, event, argument):
        path = frame.f_code.co_filename
        if path not in self.known or frame.f_code.co_name.startswith("<"):
            return None
        if frame.f_code not in self.functions:
            function = frame.f_globals.get(frame.f_code.co_name)
            function = function or getattr(type(frame.f_locals.get("self")), frame.f_code.co_name, None)
            code = getattr(inspect.unwrap(function), "__code__", None) if inspect.isroutine(function) else None
            says = docstring_shapes(function) if code is frame.f_code else ({}, None)
            lines = {line for _, _, line in frame.f_code.co_lines()}
            at = {line: one for one in self.known[path] for line in range(one[0], one[1] + 1) if one[0] in lines}
            self.functions[frame.f_code] = (pathlib.Path(path).relative_to(PACKAGE).as_posix(), *says, at)
        file, arguments, returned, at = self.functions[frame.f_code]
        self.calls_of[frame.f_code] += 1
        if not (arguments or returned or at) or self.calls_of[frame.f_code] > MOST_CALLS:
            return None
        sizes = self.sizes(frame)
        for name, axes in arguments.items():
            self.hold(f"{file}: {frame.f_code.co_name}'s {name}", axes, frame.f_locals.get(name), sizes)
        born = file.split("/")[0] in BORN_IN or file == "vlm.py"
        last, before = frame.f_lineno, {}
        said = {name: getattr(frame.f_locals.get(name), "shape", None) for name in arguments}

        def local(frame, event, argument):
            nonlocal last, before
            if event not in ("line", "return"):
                return local
            entry = at.get(last)
            if entry and not (event == "line" and entry[0] <= frame.f_lineno <= entry[1]):
                first, _, names, axes = entry
                for name in names:
                    value = frame.f_locals.get(name)
                    if axes:
                        self.hold(f"{file}:{first} {name}", axes, value, self.sizes(frame) | sizes)
                        sizes.update({k: v for k, v in self.sizes(frame).items() if k not in sizes})
                    elif born and self.is_new(value, name, before | {"line": first}, said, frame):
                        self.unsaid.add(f"{file}:{first} {name}")
                    if isinstance(value, np.ndarray) and axes:
                        said[name] = value.shape
                before = (
                    {name: frame.f_locals.get(name) for name in at[frame.f_lineno][2]} if frame.f_lineno in at else {}
                )
            last = frame.f_lineno
            if event == "return" and returned:
                values = argument if type(argument) is tuple else (argument,)
                for value in values:
                    self.hold(f"{file}: {frame.f_code.co_name} returns", returned, value, sizes)
            return local

        return local

    def is_new(self, value, name, before, said, frame):
        """Whether an array's shape is told neither beside an earlier value of its name or an argument that is as large,
        nor by the docstring of the function that made it."""
        if not isinstance(value, np.ndarray) or not value.ndim or value is before.get(name):
            return False
        others = [other for key, other in frame.f_locals.items() if key != name and isinstance(other, np.ndarray)]
        arguments = frame.f_code.co_varnames[: frame.f_code.co_argcount]
        like = [getattr(frame.f_locals.get(argument), "shape", None) for argument in arguments]
        is_told = said.get(name) == value.shape or value.shape in like or any(value is other for other in others)
        return not (is_told or self.is_documented(frame.f_code.co_filename, before["line"], frame))

    def is_documented(self, path, line, frame):
        """Whether what is assigned comes straight from a function whose docstring says its shape."""
        called = self.calls[path].get(line)
        function = frame.f_globals.get(called) or METHODS_OF_CLASSES.get(called)
        return function is not None and bool(re.search(r"\(\w[^()]*,[^()]*\)", inspect.getdoc(function) or ""))

    def fields(self, thing, sizes=None):
        """The shapes that a class says beside its fields, held against one of its things and what is in it."""
        path = pathlib.Path(inspect.getfile(type(thing)))
        config = getattr(thing, "config", None)
        sizes = {size: getattr(config, size) for size in SIZES if isinstance(getattr(config, size, None), int)} or sizes
        lines, first = SOURCE(type(thing))
        said = {
            names[0]: axes
            for start, _, names, axes in assignments(path, of_classes=True)
            if first <= start < first + len(lines)
        }
        names = (
            [field.name for field in dataclasses.fields(thing)] if dataclasses.is_dataclass(thing) else thing._fields
        )
        sizes = dict(sizes or {})
        for name in names:
            value = getattr(thing, name)
            if said.get(name):
                self.hold(
                    f"{path.relative_to(PACKAGE).as_posix()}: {type(thing).__name__}.{name}", said[name], value, sizes
                )
            for one in value if isinstance(value, list) else [value]:
                if type(one).__module__.startswith("minivtw.model.") and (
                    dataclasses.is_dataclass(one) or hasattr(one, "_fields")
                ):
                    self.fields(one, sizes)


TEXTS = [
    "share:layers=1-3,keep=0.3",
    "withdraw:layer=5", "freeze:layers=3-4+withdraw:layer=4", "fastv:layer=2,keep=0.5", "looked_at:layer=3,keep=0.4", "pyramiddrop:layers=2/5,keep=0.5",
    "sparsevlm:layers=2/5,keep=0.5", "dart:layer=2,keep=0.4", "random:layer=2,keep=0.5", "uniform:layer=2,keep=0.5", "adaptive",
    "visionzip:keep=0.3", "fastervlm:keep=0.3", "divprune:keep=0.3", "random_tokens:layer=3", "withdraw:layer=4+renumber:layer=4",
    "renumber:layer=2+own_positions", "smaller:side=3", "late:layer=3",
]  # fmt: skip


@pytest.fixture(scope="module")
def checker():
    """What was found while everything ran: every method, several families, two turns, sampling, an observer."""
    checker = Checker()
    assert {name for text in TEXTS for name in re.findall(r"(?:^|\+)(\w+)", text)} == METHODS.keys()
    vlm = minivtw.load()
    folders = [*sorted((GOLDEN / "llava").glob("*/config.json")), *sorted((GOLDEN / "families").glob("*/config.json"))]
    models = [vlm, *(minivtw.load(folder.parent) for folder in folders)]
    before = sys.gettrace()
    sys.settrace(checker.trace)
    try:
        for text in TEXTS:
            checker.calls_of.clear()
            chat = minivtw.Chat(vlm, method=text)
            chat.ask(QUESTION, SCENE, max_new_tokens=1)
            chat.ask("And the circle?", max_new_tokens=2, temperature=1.0, top_k=9, top_p=0.9, observe=lambda *_: None)
        for model in models[1:]:
            checker.calls_of.clear()
            if model.parts.vision:
                embedded = model.embed(model.prepare(SCENE, "Hi"))
                _, tokens = model.advance(embedded, KVCache(model.config), method_of("withdraw:layer=1"))
                checker.things = [embedded, tokens]
    finally:
        sys.settrace(before)
    for model in models:
        checker.fields(model.decoder)
        if model.parts.vision:
            checker.fields(model.parts.vision.encoder)
    for thing in checker.things:
        checker.fields(thing)
    return checker


def test_every_shape_that_is_said_is_so(checker):
    assert not checker.wrong, "\n".join(sorted(checker.wrong))


def test_what_is_said_is_seen(checker):
    """Nearly all of it: what is not, such as a branch for another layout, cannot be held here."""
    said = [(f"{path.relative_to(PACKAGE).as_posix()}:{first}", names) for path in FILES
            for first, _, names, axes in assignments(path) if axes]  # fmt: skip
    unseen = [where for where, names in said if not any(f"{where} {name}" in checker.checked for name in names)]
    assert len(said) > 60 and not unseen
    fields = {where for where in checker.checked if ": " in where and "." in where.split(": ")[1]}
    assert len(fields) >= 15 and any("Tokens.hidden" in where for where in fields)


def test_every_array_says_its_shape_where_it_is_born(checker):
    assert not checker.unsaid, "\n".join(sorted(checker.unsaid))
