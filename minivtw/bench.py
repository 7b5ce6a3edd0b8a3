"""How much time a method saves, measured side by side: python -m minivtw.bench IMAGE PROMPT"""

import statistics
import time

from . import load
from .cli import Parser, add_model_option, command, methods_to_try
from .errors import InputError
from .model.cache import KVCache


def seconds_of(vlm, prompt, hidden, tower, method, new_tokens):
    """(prefill, decode) seconds of one run; decode feeds the same token `new_tokens` times."""
    cache = KVCache(vlm.config)
    started = time.perf_counter()
    vlm.advance(hidden, prompt.is_visual, cache, method, tower=tower)
    prefilled = time.perf_counter()
    for _ in range(new_tokens):
        vlm.advance(hidden[-1:], prompt.is_visual[-1:], cache, method)
    return prefilled - started, time.perf_counter() - prefilled


def measure(vlm, image, question, methods, repeats, new_tokens):
    """Median seconds for each method, taken in turns so that a busy moment hits all alike: {name: (prefill, decode)}."""
    prompt, tower = vlm.prepare(image, question), vlm.tower()
    hidden = vlm.embed(prompt, tower=tower)  # (tokens, width)
    taken = [
        [seconds_of(vlm, prompt, hidden, tower, method, new_tokens) for method in methods.values()]
        for _ in range(repeats + 1)
    ]
    by_method = zip(*taken[1:])  # the first round warms up
    return {name: tuple(map(statistics.median, zip(*runs))) for name, runs in zip(methods, by_method)}


def main(arguments):
    options = Parser(prog="minivtw.bench", description="Time prefill and decode under one method or another, side by side.")
    options.add_argument("image", metavar="IMAGE")
    options.add_argument("prompt", metavar="PROMPT")
    add_model_option(options)
    options.add_argument("--withdraw", default="off,auto", metavar="off,auto,K,…")
    options.add_argument("--method", nargs="+", metavar="NAME:parameters", help="other methods to time beside them")
    options.add_argument("--repeats", type=int, default=30, metavar="N", help="rounds, of which the median counts (default: 30)")
    options.add_argument("--new-tokens", type=int, default=16, metavar="N", help="tokens to decode in each (default: 16)")
    chosen = options.parse_args(arguments)
    if chosen.repeats < 1 or chosen.new_tokens < 1:
        raise InputError("--repeats and --new-tokens must be 1 or more")
    vlm = load(chosen.model)
    methods = {"off": None} | methods_to_try(vlm, chosen.withdraw, chosen.method)
    times = measure(vlm, chosen.image, chosen.prompt, methods, chosen.repeats, chosen.new_tokens)
    prefill_off, decode_off = times["off"]
    width = max(map(len, times))
    print(f"{'method':>{width}} {'prefill ms':>11} {'ratio':>6} {'decode ms':>10} {'ratio':>6}")
    for name, (prefill, decode) in times.items():
        print(f"{name:>{width}} {1e3 * prefill:11.3f} {prefill / prefill_off:6.2f} {1e3 * decode:10.3f} {decode / decode_off:6.2f}")


if __name__ == "__main__":
    command(main)
