"""Ask a question about a picture: python -m minivtw.generate IMAGE PROMPT"""

import json
from collections.abc import Callable

import numpy as np

from . import load
from .cli.options import Parser, add_asking_options, check_question, sampling, stats_table
from .cli.terminal import command, watched
from .errors import InputError


def tracer() -> Callable[[str, np.ndarray], None]:
    """An `observe` that prints each array's name, shape and norm, and a line where tokens leave."""
    before, is_prefill = 0, True  # keys in the layer before; what follows the prompt goes one token at a time

    def observe(name: str, array: np.ndarray) -> None:
        nonlocal before, is_prefill
        if is_prefill and name.startswith("decoder.layers") and name.endswith("attention"):
            if array.shape[-1] < before:
                print(f"--- tokens withdrawn: {before} -> {array.shape[-1]} ---", flush=True)
            before = array.shape[-1]
        is_prefill = is_prefill and name != "decoder.logits"
        print(f"{name:32} {str(array.shape):20} norm {np.linalg.norm(array):.5g}", flush=True)

    return observe


def main(arguments: list[str]) -> None:
    options = Parser(prog="minivtw.generate", description="Ask a vision-language model about pictures, in NumPy.")
    add = options.add_argument
    add("image", nargs="?", metavar="IMAGE", help="a picture in any format that Pillow reads")
    add("prompt", metavar="PROMPT", help="the question; <image> marks where a picture goes (default: first)")
    add("--image", action="append", default=[], dest="images", metavar="FILE", help="one more picture; repeatable")
    add_asking_options(options)
    add("--stats", action="store_true", help="print a table of what withdrawal saved, after the answer")
    add("--json", action="store_true", help="one JSON object instead of text")
    add("--trace", action="store_true", help="print every intermediate array as it happens")
    chosen = options.parse_intermixed_args(arguments)
    if chosen.json and chosen.trace:
        raise InputError("--json and --trace both write to standard output; choose one")
    check_question(chosen.image, chosen.prompt)
    vlm, progress = watched(load(chosen.model, chosen.low_memory, chosen.max_tiles))
    with progress:
        answer = vlm.answer(
            chosen.images if chosen.image is None else [chosen.image, *chosen.images],
            chosen.prompt,
            withdraw=chosen.withdraw,
            method=chosen.method,
            system=chosen.system,
            observe=tracer() if chosen.trace else None,
            stream=None if chosen.json or chosen.trace else progress.print_piece,
            **sampling(chosen),
        )
    if chosen.json:
        print(json.dumps({"answer": answer.text, "token_ids": answer.token_ids, **answer.stats}))
    elif chosen.trace:
        print(answer.text)
    if chosen.stats and not chosen.json:
        print(stats_table(answer.stats))


if __name__ == "__main__":
    command(main)
