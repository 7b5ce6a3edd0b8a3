"""What the commands share: options, errors in one line, a progress line, files that are written whole or not at all."""

import argparse
import os
import pathlib
import sys
import tempfile
import warnings
from collections.abc import Callable
from typing import Any

from .checkpoints.layouts import SYSTEMS
from .errors import InputError
from .shelf import METHODS


class Parser(argparse.ArgumentParser):
    """An argument parser that reports a wrong option in one line, like every other error."""

    def error(self, message: str) -> Any:
        raise InputError(message)


def command(main: Callable[[list[str]], None]) -> None:
    """Run a command: errors become one line on standard error and exit code 2."""
    warnings.showwarning = lambda message, *_: print(f"minivtw: {' '.join(str(message).split())}", file=sys.stderr)
    try:
        main(sys.argv[1:])
        sys.stdout.flush()
    except InputError as error:
        print_error(error)
        sys.exit(2)
    except MemoryError:
        print("minivtw: error: this needs more memory than the machine has", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader (`| head`) has left; there is nobody to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def print_error(error: InputError) -> None:
    print(f"minivtw: error: {one_line(error)}", file=sys.stderr)


def one_line(message: object) -> str:
    return " ".join(str(message).split())


def add_model_option(options: argparse.ArgumentParser) -> None:
    options.add_argument(
        "--model", metavar="MODEL",
        help="a model folder, or a name on the Hugging Face hub (default: the embedded model)",
    )  # fmt: skip


def add_size_options(options: argparse.ArgumentParser) -> None:
    """How much of a model is held, and of a picture seen."""
    options.add_argument(
        "--max-tiles", type=int, metavar="N", help="cut a picture into at most N tiles (default: the model's)"
    )
    options.add_argument(
        "--low-memory", action="store_true", help="hold one layer at a time, read from disk at every use"
    )


def add_method_options(options: argparse.ArgumentParser) -> None:
    """Which tokens go on: the flagship by its layer, or any method by its text."""
    options.add_argument(
        "--withdraw", type=withdraw_option, default="auto", metavar="auto|off|K",
        help="the layer before which the visual tokens leave; auto (default): what is stored with the model",
    )  # fmt: skip
    options.add_argument(
        "--method", metavar="NAME:parameters",
        help=f"another method, such as freeze:layers=7-9+withdraw:layer=10; names: {', '.join(METHODS)}, "
        "and FILE.py:FUNCTION for your own",
    )  # fmt: skip


def add_system_option(options: argparse.ArgumentParser) -> None:
    options.add_argument(
        "--system", metavar="TEXT", type=lambda text: SYSTEMS.get(text, text),
        help=f"a message before the first turn, in words or by name: {', '.join(SYSTEMS)} (default: the model's own)",
    )  # fmt: skip


def add_sampling_options(options: argparse.ArgumentParser) -> None:
    """How tokens are chosen, and how many."""
    options.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="0: prefill only (default: 128)")
    options.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy (default)")
    options.add_argument("--top-k", type=int, default=0, metavar="N", help="draw from the N most probable; 0: all (default)")
    options.add_argument("--top-p", type=float, default=1.0, metavar="P", help="draw from the most probable that sum to P")
    options.add_argument("--seed", type=int, default=0, metavar="N", help="of the drawing (default: 0)")


def sampling(chosen: argparse.Namespace) -> dict[str, Any]:
    """The parsed sampling options, as `Chat.ask` takes them."""
    return {name: getattr(chosen, name) for name in ("max_new_tokens", "temperature", "top_k", "top_p", "seed")}


def withdraw_option(text: str) -> str | int | None:
    """auto, off or a layer, as `VLM.answer` takes it."""
    if text in ("auto", "off"):
        return None if text == "off" else text
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"takes auto, off or a layer, not {text}") from None


def methods_to_try(vlm: Any, withdraws: str, methods: list[str] | None) -> dict[str, Any]:
    """The columns of a table: what `--withdraw off,auto,K` and `--method`, which may be repeated, name.

    Returns the method of each by its name in the table.
    """
    named = {}
    for text in withdraws.split(","):
        try:
            option = withdraw_option(text.strip())
        except argparse.ArgumentTypeError as error:
            raise InputError(f"argument --withdraw: {error}") from None
        named[text.strip()] = vlm.method(option)
    return named | {text: vlm.method(method=text) for text in methods or []}


def progress_line(total: int) -> Callable[[int], None]:
    """A bar on standard error while a terminal shows it; the returned function is told how many are done."""

    def progress(done: int) -> None:
        if sys.stderr.isatty():
            filled = 40 * done // total
            end = "\n" if done == total else ""
            print(f"\r[{'#' * filled}{'.' * (40 - filled)}] {done}/{total}", end=end, file=sys.stderr, flush=True)

    return progress


def counter_line(what: str) -> Callable[[int], None]:
    """As `progress_line`, where nobody knows how many there will be."""

    def progress(done: int) -> None:
        if sys.stderr.isatty():
            print(f"\r{done} {what}", end="", file=sys.stderr, flush=True)

    return progress


def check_writable(path: str | pathlib.Path) -> pathlib.Path:
    """Raise InputError where a file cannot be written: before the work, not after it. Returns the path."""
    path = pathlib.Path(path)
    if path.is_dir() or not path.parent.is_dir():
        raise InputError(f"cannot write {path}: {'it is a folder' if path.is_dir() else 'there is no such folder'}")
    return path


def write_whole(path: str | pathlib.Path, text: str) -> None:
    """Write a file whole or not at all: beside its place, then moved there; the old one stays until then."""
    path, partial = pathlib.Path(path), None
    try:
        with tempfile.NamedTemporaryFile(
            "w", dir=path.parent, prefix=f".{path.name}-", delete=False, encoding="utf-8"
        ) as file:
            partial = file.name
            file.write(text)
        os.chmod(partial, 0o644)  # temporary files are private; what is written for others to read is not
        os.replace(partial, path)
    except OSError as error:
        if partial:
            os.unlink(partial)
        raise InputError(f"cannot write {path}: {error.strerror}") from error


class Printer:
    """Prints an answer's pieces as they come, without the space that most begin with."""

    def __init__(self) -> None:
        self._started = False

    def __call__(self, piece: str) -> None:
        piece = piece if self._started else piece.lstrip()
        self._started = self._started or bool(piece)
        sys.stdout.write(piece)
        sys.stdout.flush()


def stats_table(stats: dict[str, Any]) -> str:
    """`Answer.stats` as text: each number with and without what the method spared."""
    tokens, seconds = stats["tokens"], stats["seconds"]
    depth = f"{stats['layers']} layers"
    if stats["withdraw_layer"] is not None:
        depth += f", visual tokens withdrawn before layer {stats['withdraw_layer']}"
    elif stats["method"] and not stats["method"].startswith("withdraw:"):
        depth += f", {stats['method']}"
    decoded = max(tokens["generated"] - 1, 0)  # the first comes out of the prefill
    rate = f"{decoded / seconds['decode']:.0f} tokens/s" if decoded and seconds["decode"] else "-"
    rows = [
        ("model", f"{stats['model']}: {depth}"),
        ("tokens", f"{tokens['visual']} visual, {tokens['text']} text, {tokens['generated']} generated"),
        ("cache", saving(stats["cache"]["bytes"], stats["cache"]["bytes_without_withdrawal"], 1e3, "kB")),
        ("prefill", saving(stats["flops"]["prefill"], stats["flops"]["prefill_without_withdrawal"], 1e6, "MFLOP")),
        ("seconds", ", ".join(f"{phase} {value:.3f}" for phase, value in seconds.items())),
        ("decode", rate),
    ]
    return "\n".join(f"{name:8} {value}" for name, value in rows)


def saving(now: float, without: float, unit: float, name: str) -> str:
    return f"{now / unit:,.1f} {name} instead of {without / unit:,.1f} ({1 - now / without:.1%} saved)"
