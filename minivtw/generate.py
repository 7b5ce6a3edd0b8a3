"""Ask one or more questions about an image: python -m minivtw.generate IMAGE PROMPT [PROMPT ...]"""

import contextlib
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
    options = Parser(prog="minivtw.generate", description="Ask a vision-language model about images, in NumPy.")
    add = options.add_argument
    add("image", nargs="?", metavar="IMAGE", help="an image in any format that Pillow reads")
    question = "the question, or several, each asked alone; <image> marks where an image goes (default: first), "
    question += "\\<image> is the word"
    add("prompts", nargs="+", metavar="PROMPT", help=question)
    add("--image", action="append", default=[], dest="images", metavar="FILE", help="one more image; repeatable")
    add_asking_options(options)
    add("--stats", action="store_true", help="print a table of what withdrawal saved, after the answer")
    add("--json", action="store_true", help="one JSON object per answer instead of text")
    add("--trace", action="store_true", help="print every intermediate array as it happens")
    chosen = options.parse_intermixed_args(arguments)
    if chosen.json and chosen.trace:
        raise InputError("--json and --trace both write to standard output; choose one")
    for prompt in chosen.prompts:
        check_question(chosen.image, prompt)
    vlm, progress = watched(load(chosen.model, chosen.low_memory, chosen.max_tiles))
    images, seen = chosen.images if chosen.image is None else [chosen.image, *chosen.images], None
    method, asking = vlm.method(chosen.withdraw, chosen.method), sampling(chosen)
    asking["stream"] = None if chosen.json or chosen.trace else progress.print_piece
    for number, prompt in enumerate(chosen.prompts):
        with progress:
            if number == 0 < len(chosen.prompts) - 1 and not chosen.trace:
                with contextlib.suppress(InputError):  # of a method that looks at the question
                    seen = vlm.see(images, None, method, chosen.system)
            if seen and seen.stands_before(prompt):
                answer = seen.ask(prompt, **asking)
            else:
                observe, system = tracer() if chosen.trace else None, chosen.system
                answer = vlm.answer(
                    images, prompt, withdraw=None, method=method, system=system, observe=observe, **asking
                )
        if chosen.json:
            print(json.dumps({"answer": answer.text, "token_ids": answer.token_ids, **answer.stats}), flush=True)
        elif chosen.trace:
            print(answer.text)
        if chosen.stats and not chosen.json:
            print(stats_table(answer.stats))


if __name__ == "__main__":
    command(main)
