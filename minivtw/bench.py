"""How fast, measured side by side: python -m minivtw.bench IMAGE PROMPT, or --shape smolvlm-256m

Every round times everything once: the vision tower, the prefill and a decoded token, under each method, and the same
in transformers if it is installed.
"""

import importlib.util
import json
import statistics
import time

import numpy as np

from . import load
from .cli.options import Parser, add_model_option, methods_to_try
from .cli.terminal import command
from .counting import prompt_flops, vision_flops
from .errors import InputError
from .model.blocks import THREADS
from .model.cache import KVCache
from .model.tokens import EmbeddedPrompt
from .model.vision import encode
from .timing import rounds as timing
from .timing.shapes import SHAPES, random_model, visual_tokens

WORKS = ("vision", "prefill", "decode", "question")


def random_prompt(vlm, shape, tiles, tokens):
    """Pixels and an embedded prompt of the asked sizes: a little text, the tiles' visual tokens, and more text."""
    random, config = np.random.default_rng(0), vlm.config
    visual = tiles * visual_tokens(shape)
    if tokens is None:
        tokens = visual + 60
    if not visual < tokens - 1 < config.max_positions:
        raise InputError(
            f"--tokens must be from {visual + 2} to {config.max_positions}: {tiles} tiles make {visual} of them"
        )
    size = vlm.parts.vision.encoder.config.image_size
    pixels = random.standard_normal((tiles, 3, size, size), np.float32)
    hidden = random.standard_normal((tokens, config.width), np.float32)
    first = min(20, tokens - visual - 1)
    places = np.arange(tokens)
    return pixels, EmbeddedPrompt(hidden, (first <= places) & (places < first + visual))


def see(vlm, pixels):
    """Seconds for the tower on all tiles, and the last tile's features."""
    started = time.perf_counter()
    for tile in pixels:
        features = encode(vlm.parts.vision.encoder, tile)
    return time.perf_counter() - started, features


def read(vlm, asked, method, new_tokens):
    """(prefill seconds, seconds for one decoded token, the prompt's last logits, its `Tokens`)."""
    cache, newest = KVCache(vlm.config), EmbeddedPrompt(asked.hidden[:1], np.zeros(1, bool))
    started = time.perf_counter()
    logits, tokens = vlm.advance(asked, cache, method)
    prefilled = time.perf_counter()
    for _ in range(new_tokens):
        vlm.advance(newest, cache, method)
    decoded = time.perf_counter() - prefilled
    return prefilled - started, decoded / new_tokens, logits, tokens


def measures(vlm, twin, pixels, asked, methods, new_tokens):
    """What a round calls: functions that return seconds by (work, whose, method)."""

    def ours(name, method):
        prefill, decode, _, _ = read(vlm, asked, method, new_tokens)
        return {("prefill", "ours", name): prefill, ("decode", "ours", name): decode}

    def theirs():
        prefill, decode, _ = twin.read(asked.hidden, new_tokens)
        return {("prefill", "theirs", "off"): prefill, ("decode", "theirs", "off"): decode}

    calls = [timing.Ceilings()]
    if pixels is not None:
        calls.append(lambda: {("vision", "ours", "off"): see(vlm, pixels)[0]})
        if twin:
            calls.append(lambda: {("vision", "theirs", "off"): twin.see(pixels)[0]})
    if twin:
        calls.append(theirs)
    return calls + [lambda name=name, method=method: ours(name, method) for name, method in methods.items()]


def operations(vlm, pixels, asked, methods):
    """{(work, method): (FLOPs, bytes that must be read at least once: weights, and in decode the cache)}."""
    counted, config = {}, vlm.config
    if pixels is not None:
        encoder = vlm.parts.vision.encoder
        tower = sum(nbytes(layer) for layer in encoder.layers[: encoder.config.used_layers])
        counted["vision", "off"] = len(pixels) * vision_flops(encoder.config), len(pixels) * tower
    weights = sum(map(nbytes, vlm.decoder.layers)) + 4 * config.width * config.vocabulary
    for name, method in methods.items():
        cache, newest = KVCache(config), EmbeddedPrompt(asked.hidden[:1], np.zeros(1, bool))
        _, prompt = vlm.advance(asked, cache, method)
        counted["prefill", name] = prompt_flops(config, prompt.ran), weights
        _, token = vlm.advance(newest, cache, method)
        counted["decode", name] = prompt_flops(config, token.ran), weights + cache.nbytes
    return counted


def add_the_whole(taken, counted, methods):
    """Beside the phases their sum: a picture and a question, up to the second token of the answer."""
    for name, whose in [*((name, "ours") for name in methods), ("off", "theirs")]:
        if ("prefill", whose, name) in taken:
            phases = taken["vision", whose, "off"], taken["prefill", whose, name], taken["decode", whose, name]
            taken["question", whose, name] = [sum(phase) for phase in zip(*phases)]
    for name in methods:
        phases = counted["vision", "off"], counted["prefill", name], counted["decode", name]
        counted["question", name] = tuple(sum(numbers) for numbers in zip(*phases))


def nbytes(weights):
    """Bytes of the arrays in a layer's weights."""
    return sum(map(nbytes, weights)) if isinstance(weights, tuple) else 0 if weights is None else weights.nbytes


def row(work, name, taken, counted):
    """One line of the result: medians and quartiles of seconds, ratios, and how near to the machine's ceiling."""
    ours, theirs = taken[work, "ours", name], taken.get((work, "theirs", "off"))
    low, seconds, high = timing.quartiles(ours)
    flops, read_bytes = counted[work, name]
    result = dict(work=work, method=name, seconds=seconds, quartiles=[low, high], flops=flops, bytes=read_bytes)
    if theirs:
        result["transformers_seconds"] = statistics.median(theirs)
        result["transformers_quartiles"] = list(timing.quartiles(theirs)[::2])
        result["times_transformers"] = statistics.median(there / here for there, here in zip(theirs, ours))
    if work == "decode":
        speeds = [read_bytes / one / stream for one, stream in zip(ours, taken["stream"])]
    else:
        speeds = [flops / one / sgemm for one, sgemm in zip(ours, taken["sgemm"])]
    result["of_ceiling"] = statistics.median(speeds)
    if work == "prefill" and flops < counted[work, "off"][0]:
        saved = statistics.median(1 - one / plain for one, plain in zip(ours, taken[work, "ours", "off"]))
        result["seconds_saved"], result["flops_saved"] = saved, 1 - flops / counted[work, "off"][0]
    return result


def table(rows):
    """The rows as text, ratios first."""
    names = [one["work"] if one["method"] == "off" else f"{one['work']}, {one['method']}" for one in rows]
    width = max(map(len, names))
    lines = [f"x transformers  {'work':{width}} {'ms (quartiles)':>22} {'transformers ms':>22}   of the machine"]
    for name, one in zip(names, rows):
        ratio = f"{one['times_transformers']:.2f}" if "times_transformers" in one else ""
        theirs = milliseconds(one, "transformers_") if ratio else ""
        ceiling = f"{one['of_ceiling']:.0%} of {'streaming' if one['work'] == 'decode' else 'sgemm'}"
        line = f"{ratio:>14}  {name:{width}} {milliseconds(one):>22} {theirs:>22}   {ceiling}"
        if "flops_saved" in one:
            line += f"; saves {one['seconds_saved']:.0%} of the seconds, {one['flops_saved']:.0%} of the FLOPs"
        lines.append(line)
    return "\n".join(lines)


def milliseconds(one, prefix=""):
    low, high = one[f"{prefix}quartiles"]
    return f"{1e3 * one[f'{prefix}seconds']:.1f} ({1e3 * low:.1f}-{1e3 * high:.1f})"


def parser():
    options = Parser(
        prog="minivtw.bench", description="Time vision, prefill and decode, side by side with transformers."
    )
    options.add_argument("image", nargs="?", metavar="IMAGE")
    options.add_argument("prompt", nargs="?", metavar="PROMPT")
    add_model_option(options)
    options.add_argument(
        "--shape", choices=SHAPES, help="random weights of a published size instead of a model and a picture"
    )
    options.add_argument("--tiles", type=int, metavar="N", help="tiles of a shape's picture (default: 1)")
    options.add_argument("--tokens", type=int, metavar="N", help="of a shape's prompt, visual ones among them")
    options.add_argument("--withdraw", default="off,auto", metavar="off,auto,K,…")
    options.add_argument("--method", nargs="+", metavar="NAME:parameters", help="other methods to time beside them")
    options.add_argument(
        "--repeats", type=int, default=20, metavar="N", help="rounds, of which the median counts (default: 20)"
    )
    options.add_argument(
        "--new-tokens", type=int, default=16, metavar="N", help="tokens to decode in each (default: 16)"
    )
    options.add_argument("--alone", action="store_true", help="without transformers, even if it is installed")
    options.add_argument("--json", action="store_true", help="one JSON object instead of text")
    return options


def check_arguments(chosen):
    if min(chosen.repeats, chosen.new_tokens, chosen.tiles or 1) < 1:
        raise InputError("--repeats, --new-tokens and --tiles must be 1 or more")
    if chosen.shape and (chosen.image or chosen.model):
        raise InputError("a shape has random weights and pixels; it takes no picture and no --model")
    if not chosen.shape and not chosen.prompt:
        raise InputError("give a picture and a question, or a --shape")
    if not chosen.shape and (chosen.tiles or chosen.tokens):
        raise InputError("--tiles and --tokens are sizes of a --shape; a picture and a question have theirs")


def prepared(chosen):
    """The model, pixels (tiles, 3, height, width) or None, and the `EmbeddedPrompt`."""
    if chosen.shape:
        vlm = random_model(chosen.shape)
        return vlm, *random_prompt(vlm, chosen.shape, chosen.tiles or 1, chosen.tokens)
    vlm = load(chosen.model)
    prompt = vlm.prepare(chosen.image, chosen.prompt)
    return vlm, prompt.tiles, vlm.embed(prompt)


def main(arguments):
    chosen = parser().parse_args(arguments)
    check_arguments(chosen)
    vlm, pixels, asked = prepared(chosen)
    methods = {"off": None} | methods_to_try(vlm, chosen.withdraw, chosen.method)
    twin = None
    if not chosen.alone and all(map(importlib.util.find_spec, ("torch", "transformers"))):
        from .timing.torch_twin import Twin

        twin = Twin(vlm, THREADS)
    before, calls = timing.load_average(), measures(vlm, twin, pixels, asked, methods, chosen.new_tokens)
    taken, counted = timing.rounds(calls, chosen.repeats), operations(vlm, pixels, asked, methods)
    if pixels is not None:
        add_the_whole(taken, counted, methods)
    works = [(work, name) for work in WORKS for name in methods if (work, "ours", name) in taken]
    result = {
        "machine": timing.machine(),
        "beside": twin.name if twin else None,
        "load_average": [before, timing.load_average()],
        "model": chosen.shape or str(vlm.folder),
        "tiles": 0 if pixels is None else len(pixels),
        "tokens": len(asked.hidden),
        "visual": int(asked.is_visual.sum()),
        "rounds": chosen.repeats,
        "sgemm_flops": statistics.median(taken["sgemm"]),
        "stream_bytes": statistics.median(taken["stream"]),
        "rows": [row(work, name, taken, counted) for work, name in works],
    }
    print(json.dumps(result) if chosen.json else text(result))


def text(result):
    return "\n".join(
        [
            result["machine"],
            *([result["beside"]] if result["beside"] else []),
            f"a product of 2048 x 2048 matrices: {result['sgemm_flops'] / 1e9:.0f} GFLOP/s; "
            f"a read of 256 MB: {result['stream_bytes'] / 1e9:.1f} GB/s; load average {result['load_average']}",
            f"{result['model']}: {result['tiles']} tiles, {result['tokens']} tokens, {result['visual']} of them visual; "
            f"medians of {result['rounds']} rounds",
            "",
            table(result["rows"]),
        ]
    )


if __name__ == "__main__":
    command(main)
