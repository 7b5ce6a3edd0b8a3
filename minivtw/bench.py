"""How much time withdrawal saves, measured side by side: python -m minivtw.bench IMAGE PROMPT"""

import statistics
import time

from . import load
from .model.cache import KVCache
from .errors import InputError, Parser, door
from .evaluate import withdraw_list


def seconds_of(vlm, prompt, hidden, withdrawal, new_tokens):
    """(prefill, decode) seconds of one run; decode feeds the same token `new_tokens` times."""
    cache = KVCache(vlm.config.layers)
    started = time.perf_counter()
    vlm.advance(hidden, prompt.is_visual, cache, withdrawal)
    prefilled = time.perf_counter()
    for _ in range(new_tokens):
        vlm.advance(hidden[-1:], prompt.is_visual[-1:], cache, withdrawal)
    return prefilled - started, time.perf_counter() - prefilled


def measure(vlm, image, question, withdraws, repeats, new_tokens):
    """Median seconds for each withdrawal, taken in turns so that a busy moment hits all alike: {layer: (prefill, decode)}."""
    prompt = vlm.prepare(image, question)
    hidden = vlm.embed(prompt)  # (tokens, width)
    withdrawals = [vlm.withdrawal(withdraw) for withdraw in withdraws]
    taken = [[seconds_of(vlm, prompt, hidden, one, new_tokens) for one in withdrawals] for _ in range(repeats + 1)]
    by_withdrawal = zip(*taken[1:])  # the first round warms up
    return {one.layer: tuple(map(statistics.median, zip(*runs))) for one, runs in zip(withdrawals, by_withdrawal)}


def main(arguments):
    options = Parser(prog="minivtw.bench", description="Time prefill and decode with and without withdrawal, side by side.")
    options.add_argument("image", metavar="IMAGE")
    options.add_argument("prompt", metavar="PROMPT")
    options.add_argument("--model", metavar="DIR", help="a model folder (default: the embedded model)")
    options.add_argument("--withdraw", type=withdraw_list, default="off,auto", metavar="off,auto,K,…")
    options.add_argument("--repeats", type=int, default=30, metavar="N", help="rounds, of which the median counts (default: 30)")
    options.add_argument("--new-tokens", type=int, default=16, metavar="N", help="tokens to decode in each (default: 16)")
    chosen = options.parse_args(arguments)
    if chosen.repeats < 1 or chosen.new_tokens < 1:
        raise InputError("--repeats and --new-tokens must be 1 or more")
    if "adaptive" in chosen.withdraw:
        raise InputError("the benchmark times layers that are known beforehand: auto, off or a number, not adaptive")
    vlm = load(chosen.model)
    times = measure(vlm, chosen.image, chosen.prompt, [None, *chosen.withdraw], chosen.repeats, chosen.new_tokens)
    prefill_off, decode_off = times[None]
    print(f"{'K':>4} {'prefill ms':>11} {'ratio':>6} {'decode ms':>10} {'ratio':>6}")
    for layer, (prefill, decode) in times.items():
        name = "off" if layer is None else layer
        print(f"{name:>4} {1e3 * prefill:11.3f} {prefill / prefill_off:6.2f} {1e3 * decode:10.3f} {decode / decode_off:6.2f}")


if __name__ == "__main__":
    door(main)
