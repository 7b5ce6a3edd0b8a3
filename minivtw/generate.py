"""Ask a question about a picture: python -m minivtw.generate IMAGE PROMPT"""

import json
import sys
from argparse import ArgumentTypeError

import numpy as np

from . import load
from .errors import InputError, Parser, door


def withdraw_option(text):
    """auto, adaptive, off or a layer, as `VLM.answer` takes it."""
    if text in ("auto", "adaptive", "off"):
        return None if text == "off" else text
    try:
        return int(text)
    except ValueError:
        raise ArgumentTypeError(f"takes adaptive, auto, off or a layer, not {text}") from None


def parser():
    options = Parser(prog="minivtw.generate", description="Ask a vision-language model about pictures, in NumPy.")
    options.add_argument("image", nargs="?", metavar="IMAGE", help="a picture in any format that Pillow reads")
    options.add_argument("prompt", metavar="PROMPT", help="the question; <image> marks where a picture goes (default: first)")
    options.add_argument("--image", action="append", default=[], dest="images", metavar="FILE", help="one more picture; repeatable")
    add_model_options(options)
    add_sampling_options(options)
    options.add_argument("--stats", action="store_true", help="a table after the answer: what withdrawal saved")
    options.add_argument("--json", action="store_true", help="one JSON object instead of text")
    options.add_argument("--trace", action="store_true", help="print every intermediate array as it happens")
    return options


def add_model_options(options):
    """Which model, and how much of it: for every door that holds a conversation."""
    options.add_argument(
        "--model", metavar="MODEL",
        help="a model folder, or a name on the Hugging Face hub (default: the embedded model)",
    )  # fmt: skip
    options.add_argument(
        "--withdraw", type=withdraw_option, default="auto", metavar="auto|adaptive|off|K",
        help="the layer before which the visual tokens leave; auto (default): the one stored with the model; "
        "adaptive: where the attention has left this image",
    )  # fmt: skip
    options.add_argument("--max-tiles", type=int, metavar="N", help="cut a picture into at most N tiles (default: the model's)")
    options.add_argument("--low-memory", action="store_true", help="hold one layer at a time, read from disk at every use")


def add_sampling_options(options):
    """How tokens are chosen, and how many."""
    options.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="0: prefill only (default: 128)")
    options.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy (default)")
    options.add_argument("--top-k", type=int, default=0, metavar="N", help="draw from the N most probable; 0: all (default)")
    options.add_argument("--top-p", type=float, default=1.0, metavar="P", help="draw from the most probable that sum to P")
    options.add_argument("--seed", type=int, default=0, metavar="N", help="of the drawing (default: 0)")


def sampling(chosen):
    """The parsed sampling options, as `Chat.ask` takes them."""
    return {name: getattr(chosen, name) for name in ("max_new_tokens", "temperature", "top_k", "top_p", "seed")}


def stats_table(stats):
    """`Result.stats` as text: each number with and without withdrawal."""
    tokens, seconds = stats["tokens"], stats["seconds"]
    depth = f"{stats['layers']} layers"
    if stats["withdraw_layer"] is not None:
        depth += f", visual tokens withdrawn before layer {stats['withdraw_layer']}"
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


def saving(now, without, unit, name):
    return f"{now / unit:,.1f} {name} instead of {without / unit:,.1f} ({1 - now / without:.1%} saved)"


def tracer():
    """An `observe` that prints each array's name, shape and norm, and a line where the visual tokens leave."""
    before = 0  # tokens in the layer before

    def observe(name, array):
        nonlocal before
        if name == "decoder.embeddings":
            before = len(array)
        if name.startswith("decoder.layers") and name.endswith("attention"):
            entering = array.shape[1]
            if entering < before:
                print(f"--- visual tokens withdrawn: {before} -> {entering} tokens ---", flush=True)
            before = entering
        if name == "decoder.logits":
            before = 1  # what follows is decoded one token at a time
        print(f"{name:32} {str(array.shape):20} norm {np.linalg.norm(array):.5g}", flush=True)

    return observe


def main(arguments):
    chosen = parser().parse_intermixed_args(arguments)
    if chosen.json and chosen.trace:
        raise InputError("--json and --trace both write to standard output; choose one")
    streams = not (chosen.json or chosen.trace)
    result = load(chosen.model, chosen.low_memory, chosen.max_tiles).answer(
        [chosen.image, *chosen.images] if chosen.image else chosen.images,
        chosen.prompt,
        withdraw=chosen.withdraw,
        observe=tracer() if chosen.trace else None,
        stream=Printer() if streams else None,
        **sampling(chosen),
    )
    if chosen.json:
        print(json.dumps({"answer": result.text, "token_ids": result.token_ids, **result.stats}))
        return
    print("" if streams else result.text)
    if chosen.stats:
        print(stats_table(result.stats))


class Printer:
    """Prints an answer's pieces as they come, without the space that most begin with."""

    def __init__(self):
        self._started = False

    def __call__(self, piece):
        piece = piece if self._started else piece.lstrip()
        self._started = self._started or bool(piece)
        sys.stdout.write(piece)
        sys.stdout.flush()


if __name__ == "__main__":
    door(main)
