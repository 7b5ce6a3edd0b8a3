"""Step through an answer, from the image to the next token: python -m minivtw.step IMAGE PROMPT"""

import contextlib
import linecache
import pdb
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np

from . import load, threads
from .cli.options import Parser, add_method_options, add_model_option, check_question
from .cli.stops import MAP, STOPS, Stop
from .cli.terminal import command, located
from .errors import InputError
from .inputs.opening import open_image
from .model import attention, decoder, vision
from .model.cache import KVCache, LayerCache
from .model.tokens import Tokens
from .page.printing import part

PACKAGE = Path(__file__).parent
LOOP = next(stop for stop in STOPS if stop.when == "index == {layer}")
AROUND = 4  # lines shown before and after the one that comes next
WIDTH = 110  # characters
# What `s` does not stop in: threads and blocks, and how things print.
UNSTEPPED = {
    "numpy", "PIL", "tokenizers", "safetensors", "contextlib",
    "minivtw.threads", "minivtw.model.blocks", "minivtw.page.printing",
}  # fmt: skip
HELP = "Enter: the next stop   s, n, r: step in, over, out   K: where the image leaves   layer 7   p NAME   q   help"


def attention_as_written(
    queries: np.ndarray, keys: np.ndarray, values: np.ndarray, sees: np.ndarray | None = None
) -> np.ndarray:
    """`model.attention.attention`, equal up to rounding, without its blocks and threads: softmax(q k^T / sqrt(head_dim)) v.

    Arguments and result are the same: queries (heads, new, head_dim) to the context (new, heads * head_dim).
    """
    heads, new, head_dim = queries.shape
    probabilities = attention.attention_probabilities(queries, keys, sees)  # (heads, new, tokens)
    context = probabilities @ np.repeat(values, heads // len(values), axis=0)  # (heads, new, head_dim)
    return context.swapaxes(0, 1).reshape(new, heads * head_dim)


@contextlib.contextmanager
def in_plain_steps() -> Iterator[None]:
    """Everything in one thread, and attention as its formula is written, for as long as someone watches."""
    before = threads.THREADS, decoder.attention, vision.attention
    threads.THREADS, decoder.attention, vision.attention = 1, attention_as_written, attention_as_written
    try:
        yield
    finally:
        threads.THREADS, decoder.attention, vision.attention = before


class Guide(pdb.Pdb):
    """pdb that stops at the next of STOPS for every Enter, says where one is, and shows arrays by their shape."""

    currentbp = 0  # the breakpoint reached last

    def __init__(self, stops: list[Stop], layer: int, layers: int, leaves: int | None = None) -> None:
        """layer: where the stops in a decoder layer are; leaves: K, if the image leaves."""
        super().__init__(skip=["a module that is not the reader's"], nosigint=True, readrc=False)
        self.prompt = "(step) "
        self.stops, self.layer, self.leaves, self.layers = stops, layer, leaves, layers
        self.reached = 0  # stops so far
        self.here = ""  # the layer that one is in, as text
        self.armed: dict[int, Stop] = {}
        self.is_running = self.has_said = self.has_left = False

    def is_skipped_module(self, module_name: str | None) -> bool:
        name = module_name or ""
        return name in UNSTEPPED or name.split(".")[0] in UNSTEPPED | sys.stdlib_module_names

    def stop_here(self, frame: FrameType) -> bool:
        is_made = frame.f_code.co_filename.startswith("<")  # by dataclasses, for one
        return not is_made and super().stop_here(frame)

    def lead(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """Run a function, from stop to stop. Returns what it returns, or None where the reader left."""
        self.arm()
        before = sys.gettrace()
        try:
            return self.runcall(function, *arguments, **options)
        finally:
            sys.settrace(before)  # such as what measures the tests' coverage
            self.disarm()

    def disarm(self) -> None:
        for number in self.armed:  # bdb has one list of breakpoints for all debuggers
            self.clear_bpbynumber(number)
        self.armed = {}

    def arm(self, most: int | None = None) -> None:
        """Set breakpoints at the stops to come; most: how many of them."""
        self.disarm()
        for stop in self.stops[self.reached :][:most]:
            file, line = self.canonic(stop.code().__code__.co_filename), stop.line()
            self.set_break(file, line, cond=stop.when.format(layer=self.layer) or None)
            self.armed[self.get_breaks(file, line)[-1].number] = stop

    def user_line(self, frame: FrameType) -> None:
        stop = self.armed.get(self.currentbp) if self.break_here(frame) else None
        if stop:
            self.arrive(stop, frame)
        if stop or self.is_running:
            super().user_line(frame)
        else:  # the first line of what is run
            self.set_continue()
        self.is_running = True

    def arrive(self, stop: Stop, frame: FrameType) -> None:
        """Say where one is, and get the next stop ready."""
        self.reached = self.stops.index(stop) + 1
        names = frame.f_locals
        if "index" in names:
            self.here = f"layer {names['index']} of {self.layers}"
        if self.leaves is not None and self.reached > self.stops.index(LOOP):  # in a layer of the decoder, or after all
            self.has_left |= names.get("index", self.layers) >= self.leaves
        places = [
            f"[{self.here if name == 'layers' and self.here else name}]" if name == stop.place else name for name in MAP
        ]
        file, line = Path(frame.f_code.co_filename), frame.f_lineno
        self.message(f"\n--- {self.reached} of {len(self.stops)}: {stop.title} --- {' > '.join(places)}\n")
        self.message("\n".join(textwrap.wrap(stop.says, WIDTH)))
        self.message(f"\n{file.relative_to(PACKAGE.parent).as_posix()}:{line}, {frame.f_code.co_qualname}\n")
        for number in range(max(line - AROUND, 1), line + AROUND + 1):
            mark = "->" if number == line else "  "
            self.message(f"{number:5} {mark} {linecache.getline(str(file), number).rstrip()}")
        self.message("")
        shown = {name: value for name, value in names.items() if is_shown(value)}
        more = [code for code in stop.look if code.removesuffix(".shape") not in shown]
        for name, value in [*shown.items(), *((code, self.value(code, frame)) for code in more)]:
            self.message(f"  {name:24} {textwrap.shorten(part(value), WIDTH, placeholder=' …')}")
        self.message(f"\n{HELP}")
        self.has_said = True
        self.arm()

    def print_stack_entry(self, frame_lineno: Any, prompt_prefix: str = "\n-> ") -> None:
        """pdb's own two lines, except where more than they tell has just been said."""
        if not self.has_said:
            super().print_stack_entry(frame_lineno, prompt_prefix)
        self.has_said = False

    def value(self, code: str, frame: FrameType | None = None) -> Any:
        frame = frame or self.curframe
        assert frame is not None
        return eval(code, frame.f_globals, frame.f_locals)

    def displayhook(self, obj: Any) -> None:
        """What is typed without `p`."""
        if obj is not None:
            self.message(part(obj))

    def do_p(self, arg: str) -> None:
        """p expression: its value in one line, an array by its shape and largest magnitude; pp prints the numbers."""
        try:
            self.message(part(self.value(arg)))
        except Exception as error:  # of what was typed
            self.error(f"{type(error).__name__}: {error}")

    def emptyline(self) -> bool:
        """Enter: on to the next stop."""
        self.set_continue()
        return True

    def do_layer(self, arg: str) -> bool | None:
        """layer i: on to the decoder's loop before layer i, in this pass or in the next token's."""
        if not arg.isdigit() or int(arg) >= self.layers:
            self.error(f"layer takes a number from 0 to {self.layers - 1}")
            return None
        self.layer, self.reached = int(arg), self.stops.index(LOOP)
        self.arm(most=1)
        return self.emptyline()

    def do_K(self, arg: str) -> bool | None:
        """K: on to the layer before which the image leaves."""
        if self.leaves is None or self.has_left:
            self.error("the image leaves here, or has left" if self.has_left else "the image never leaves")
            return None
        return self.do_layer(str(self.leaves))

    def do_run(self, arg: str) -> None:
        """run: not here."""
        self.error("q, and start it again")

    do_restart = do_run


def is_shown(value: Any) -> bool:
    """Whether a name's value is shown unasked: arrays, tokens, caches."""
    return isinstance(value, np.ndarray | Tokens | KVCache | LayerCache)


def parser() -> Parser:
    options = Parser(prog="minivtw.step", description="Step through an answer, from the image to the next token.")
    options.add_argument("asked", nargs="*", metavar="[IMAGE] PROMPT", help="an image, if there is one, and a question")
    options.add_argument("--list", action="store_true", help="print the stops as breakpoints for any debugger, and end")
    add_model_option(options)
    add_method_options(options)
    return options


def main(arguments: list[str]) -> None:
    chosen = parser().parse_args(arguments)
    if not chosen.list and not 1 <= len(chosen.asked) <= 2:
        raise InputError("give an image and a question, or a question alone; --list prints the stops")
    vlm = load(chosen.model)
    method = vlm.method(chosen.withdraw, chosen.method)
    leaves = method.withdraw_layer if method else None
    leaves = None if leaves == vlm.config.layers else leaves
    layer = leaves if leaves is not None else min(max(method.layers) if method else 0, vlm.config.layers - 1)
    if chosen.list:
        print("\n".join(f"{stop.title:26} b {stop.breakpoint(layer)}" for stop in STOPS))
        return
    image, prompt = chosen.asked if len(chosen.asked) == 2 else (None, chosen.asked[0])
    check_question(image, prompt)
    if image is not None:
        open_image(image)  # what cannot be read is said before anything begins
    guide = Guide([stop for stop in STOPS if image or not stop.needs_image], layer, vlm.config.layers, leaves)
    with in_plain_steps():
        try:
            answer = guide.lead(vlm.answer, image, prompt, withdraw=chosen.withdraw, method=chosen.method)
        except Exception as error:
            said, is_theirs = located(error, chosen.method)
            if isinstance(error, InputError) or not is_theirs:
                raise
            raise InputError(said) from error  # pdb has shown the way to it
    if answer:
        print(f"\n{answer}")


if __name__ == "__main__":
    command(main)
