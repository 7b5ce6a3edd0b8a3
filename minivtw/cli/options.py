"""What the commands share: their options, what is asked with them, and the table of what an answer took."""

import argparse
import os
from typing import Any

from ..checkpoints.layouts import SYSTEMS
from ..errors import InputError
from ..methods.shelf import METHODS
from ..methods.text import Method
from ..vlm import VLM


class Parser(argparse.ArgumentParser):
    """An argument parser that reports a wrong option, or help that cannot be shown, in one line like every other error."""

    def error(self, message: str) -> Any:
        raise InputError(message)

    def print_help(self, file: Any = None) -> None:
        print(self.format_help(), end="", flush=True)  # where argparse says nothing of a full disk


def add_model_option(options: argparse.ArgumentParser) -> None:
    place = "a model folder, or a name on the Hugging Face hub (default: the embedded model)"
    options.add_argument("--model", metavar="MODEL", help=place)


def add_method_options(options: argparse.ArgumentParser) -> None:
    """Which tokens go on: withdrawal by its layer, or any method by its text."""
    add = options.add_mutually_exclusive_group().add_argument
    layer = "the layer before which the visual tokens leave; auto (default): what is stored with the model"
    add("--withdraw", type=withdraw_option, default="auto", metavar="auto|off|K", help=layer)
    names = f"names: {', '.join(METHODS)}, and FILE.py:FUNCTION or FILE.py:FUNCTION,layer=2,… for your own"
    method = f"another method, such as freeze:layers=7-9+withdraw:layer=10; {names}"
    add("--method", metavar="NAME:parameters", help=method)


def add_asking_options(options: argparse.ArgumentParser) -> None:
    """Which model is asked, how much of it is held and of an image seen, which tokens go on, and how they are chosen."""
    add = options.add_argument
    add_model_option(options)
    add("--max-tiles", type=int, metavar="N", help="cut an image into at most N tiles (default: the model's)")
    add("--low-memory", action="store_true", help="hold two layers at a time, read from disk at every use")
    add_method_options(options)
    system = f"a message before the first turn, in words or by name: {', '.join(SYSTEMS)} (default: the model's own)"
    add("--system", metavar="TEXT", type=lambda text: SYSTEMS.get(text, text), help=system)
    add("--max-new-tokens", type=int, default=128, metavar="N", help="0: prefill only (default: 128)")
    add("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy (default)")
    add("--top-k", type=int, default=0, metavar="N", help="draw from the N most probable; 0: all (default)")
    add("--top-p", type=float, default=1.0, metavar="P", help="draw from the most probable that sum to P")
    add("--seed", type=int, default=0, metavar="N", help="random seed for sampling (default: 0)")


def check_question(image: str | None, prompt: str) -> None:
    """Raise InputError for a question that is an image, for an image that is a question, and for one without a name."""
    if image == "":
        raise InputError("the name of the image is empty; to ask without an image, leave it out")
    if os.path.isfile(prompt):
        if image is None or os.path.isfile(image):
            raise InputError(f"the question is missing: {prompt} is a file")
        raise InputError(f"{prompt} is a file where the question belongs: first the image, then the question")


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


def layers_to_try(text: str) -> dict[str, str | int | None]:
    """off,auto,K as a `withdraw_option` for each, by its name in a table."""
    return {part.strip(): withdraw_option(part.strip()) for part in text.split(",")}


def methods_to_try(vlm: VLM, layers: dict[str, str | int | None], methods: list[str]) -> dict[str, Method | None]:
    """The columns of a table: what `--withdraw off,auto,K` and `--method` name. Returns the method of each by its name."""
    named: dict[str, Method | None] = {name: vlm.method(layer) for name, layer in layers.items()}
    return named | {text: vlm.method(method=text) for text in methods}


def stats_table(stats: dict[str, Any]) -> str:
    """`Answer.stats` as text: each number with and without what the method spared."""
    tokens, seconds = stats["tokens"], stats["seconds"]
    depth = f"{stats['layers']} layers"
    if stats["withdraw_layer"] is not None and stats["method"] == f"withdraw:layer={stats['withdraw_layer']}":
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
    if "reused" in stats:
        rows.insert(2, ("reused", f"{stats['reused']['tokens']} tokens, up to the end of the image, seen before"))
    return "\n".join(f"{name:8} {value}" for name, value in rows)


def saving(now: float, without: float, unit: float, name: str) -> str:
    return f"{now / unit:,.1f} {name} instead of {without / unit:,.1f} ({1 - now / without:.1%} saved)"
