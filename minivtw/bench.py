"""How fast, measured side by side: python -m minivtw.bench IMAGE PROMPT, or --shape smolvlm-256m

Every round times everything once: the vision tower, the prefill and a decoded token, under each method, and the same
in transformers if it is installed; and the prefill of a second question about the image.
"""

import contextlib
import copy
import importlib.util
import json
import statistics
import time
from argparse import Namespace
from collections.abc import Iterable
from typing import Any

import numpy as np

from . import load
from .cli.options import Parser, add_model_option, layers_to_try, methods_to_try
from .cli.terminal import command
from .counting import prompt_flops, vision_flops
from .errors import InputError, counted
from .inputs.prompts import Tiled
from .methods.text import Method
from .model.cache import KVCache
from .model.tokens import EmbeddedPrompt, Tokens
from .model.vision import encode
from .seen import Beginning, Seen
from .threads import THREADS
from .timing import rounds as timing
from .timing.rounds import Measure
from .timing.shapes import SHAPES, random_model
from .vlm import VLM

WORKS = ("vision", "prefill", "decode", "question", "second question")
Methods = dict[str, Method | None]
Taken = dict[Any, list[float]]  # (work, whose, method) -> seconds of each round; and what the machine did
Counted = dict[tuple[str, str], tuple[int, int]]  # (work, method) -> FLOPs, bytes


def random_prompt(vlm: VLM, shape: str, tiles: int, tokens: int | None) -> tuple[np.ndarray, EmbeddedPrompt]:
    """Pixels and an embedded prompt of these sizes: a little text, the tiles' visual tokens, and more text."""
    random, config = np.random.default_rng(0), vlm.config
    tower, side, _ = SHAPES[shape]
    visual = tiles * (tower.features // side**2)
    if tokens is None:
        tokens = visual + 60
    if not visual < tokens - 1 < config.max_positions:
        raise InputError(
            f"--tokens must be from {visual + 2} to {config.max_positions}: {counted(tiles, 'tile')} make {visual} of them"
        )
    pixels = random.standard_normal((tiles, 3, tower.image_size, tower.image_size), np.float32)
    hidden = random.standard_normal((tokens, config.width), np.float32)
    first = min(20, tokens - visual - 1)
    places = np.arange(tokens)
    return pixels, EmbeddedPrompt(hidden, (first <= places) & (places < first + visual))


def see(vlm: VLM, pixels: np.ndarray) -> tuple[float, np.ndarray]:
    """Seconds for the tower on all tiles, and the last tile's features."""
    assert vlm.parts.vision  # there are pixels
    started = time.perf_counter()
    for tile in pixels:
        features = encode(vlm.parts.vision.encoder, tile)
    return time.perf_counter() - started, features


def read(
    vlm: VLM, prompt: EmbeddedPrompt, method: Method | None, new_tokens: int
) -> tuple[float, float, np.ndarray, Tokens, Tokens]:
    """(prefill seconds, seconds for one decoded token, the prompt's last logits, its `Tokens`, those of the last token)."""
    cache, newest = KVCache(vlm.config), EmbeddedPrompt(prompt.hidden[:1], np.zeros(1, bool))
    started = time.perf_counter()
    logits, tokens = vlm.advance(prompt, cache, method)
    prefilled = time.perf_counter()
    for _ in range(new_tokens):
        _, said = vlm.advance(newest, cache, method)
    decoded = time.perf_counter() - prefilled
    return prefilled - started, decoded / new_tokens, logits, tokens, said


def seen_under(vlm: VLM, prompt: EmbeddedPrompt, methods: Methods) -> dict[str, Seen]:
    """What every method that does not look at the question leaves of the prompt up to the end of the image."""
    end, seen = int(np.flatnonzero(prompt.is_visual)[-1]) + 1, dict[str, Seen]()
    shared = prompt._replace(hidden=prompt.hidden[:end], is_visual=prompt.is_visual[:end])
    beginning = Beginning(np.zeros(end, np.int64), shared.is_visual, shared, Tiled(None, [], ()), "", None)
    for name, method in methods.items():
        with contextlib.suppress(InputError):
            seen[name] = Seen(vlm, beginning, method)
    return seen


def ask_again(vlm: VLM, seen: Seen, prompt: EmbeddedPrompt) -> tuple[float, Tokens]:
    """Seconds for the prefill of what follows the image, after what is kept of that; and its `Tokens`."""
    rest = EmbeddedPrompt(prompt.hidden[len(seen.token_ids) :], prompt.is_visual[len(seen.token_ids) :])
    started = time.perf_counter()
    _, tokens = vlm.advance(rest, copy.deepcopy(seen.cache), seen.method)
    return time.perf_counter() - started, tokens


def measures(
    vlm: VLM,
    twin: Any,
    pixels: np.ndarray | None,
    prompt: EmbeddedPrompt,
    methods: Methods,
    seen: dict[str, Seen],
    new_tokens: int,
) -> list[Measure]:
    """What a round calls: functions that return seconds by (work, whose, method)."""

    def ours(name: str, method: Method | None) -> dict[Any, float]:
        prefill, decode, *_ = read(vlm, prompt, method, new_tokens)
        taken: dict[Any, float] = {("prefill", "ours", name): prefill, ("decode", "ours", name): decode}
        if name in seen:
            taken["second question", "ours", name] = ask_again(vlm, seen[name], prompt)[0]
        return taken

    def theirs() -> dict[Any, float]:
        prefill, decode, _ = twin.read(prompt.hidden, new_tokens)
        return {("prefill", "theirs", "off"): prefill, ("decode", "theirs", "off"): decode}

    calls: list[Measure] = [timing.Ceilings()]
    if pixels is not None:
        calls.append(lambda: {("vision", "ours", "off"): see(vlm, pixels)[0]})
        if twin:
            calls.append(lambda: {("vision", "theirs", "off"): twin.see(pixels)[0]})
    if twin:
        calls.append(theirs)
    return calls + [lambda name=name, method=method: ours(name, method) for name, method in methods.items()]


def operations(
    vlm: VLM, pixels: np.ndarray | None, prompt: EmbeddedPrompt, methods: Methods, seen: dict[str, Seen]
) -> Counted:
    """{(work, method): (FLOPs, bytes that must be read at least once: weights, and in decode the cache)}."""
    config, counted = vlm.config, Counted()
    if pixels is not None and vlm.parts.vision:
        encoder = vlm.parts.vision.encoder
        tower = sum(nbytes(layer) for layer in encoder.layers[: encoder.config.used_layers])
        counted["vision", "off"] = len(pixels) * vision_flops(encoder.config), len(pixels) * tower
    weights = sum(map(nbytes, vlm.decoder.layers)) + 4 * config.width * config.vocabulary
    for name, method in methods.items():
        *_, tokens, said = read(vlm, prompt, method, 1)
        counted["prefill", name] = prompt_flops(config, tokens.ran), weights
        counted["decode", name] = prompt_flops(config, said.ran), weights + said.cache.nbytes
        if name in seen:
            again = prompt_flops(config, ask_again(vlm, seen[name], prompt)[1].ran)
            counted["second question", name] = again, weights + seen[name].cache.nbytes
    return counted


def add_question(taken: Taken, counted: Counted, methods: Iterable[str]) -> None:
    """Beside the phases their sum: an image and a question, up to the second token of the answer."""
    for name, whose in [*((name, "ours") for name in methods), ("off", "theirs")]:
        if ("prefill", whose, name) in taken:
            phases = taken["vision", whose, "off"], taken["prefill", whose, name], taken["decode", whose, name]
            taken["question", whose, name] = [sum(phase) for phase in zip(*phases)]
    for name in methods:
        flops, read_bytes = zip(counted["vision", "off"], counted["prefill", name], counted["decode", name])
        counted["question", name] = sum(flops), sum(read_bytes)


def nbytes(weights: Any) -> int:
    """Bytes of the arrays in a layer's weights."""
    return sum(map(nbytes, weights)) if isinstance(weights, tuple) else 0 if weights is None else weights.nbytes


def result_row(work: str, name: str, taken: Taken, counted: Counted) -> dict[str, Any]:
    """One line of the result: medians and quartiles of seconds, ratios, and how near to the machine's ceiling."""
    ours, theirs = taken[work, "ours", name], taken.get((work, "theirs", "off"))
    low, seconds, high = timing.quartiles(ours)
    flops, read_bytes = counted[work, name]
    result: dict[str, Any] = dict(
        work=work, method=name, seconds=seconds, quartiles=[low, high], flops=flops, bytes=read_bytes
    )
    if theirs:
        result["transformers_seconds"] = statistics.median(theirs)
        result["transformers_quartiles"] = list(timing.quartiles(theirs)[::2])
        result["times_transformers"] = statistics.median(there / here for there, here in zip(theirs, ours))
    if work == "decode":
        speeds = [read_bytes / one / stream for one, stream in zip(ours, taken["stream"])]
    else:
        speeds = [flops / one / sgemm for one, sgemm in zip(ours, taken["sgemm"])]
    result["of_ceiling"] = statistics.median(speeds)
    if work == "second question":
        whole = zip(taken["vision", "ours", "off"], taken["prefill", "ours", name], ours)
        result["times_whole"] = statistics.median((vision + prefill) / again for vision, prefill, again in whole)
    if work == "prefill" and flops < counted[work, "off"][0]:
        saved = statistics.median(1 - one / plain for one, plain in zip(ours, taken[work, "ours", "off"]))
        result["seconds_saved"], result["flops_saved"] = saved, 1 - flops / counted[work, "off"][0]
    return result


def results_table(rows: list[dict[str, Any]]) -> str:
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
        if "times_whole" in one:
            line += f"; {one['times_whole']:.1f} x as fast as vision and prefill"
        lines.append(line)
    return "\n".join(lines)


def milliseconds(one: dict[str, Any], prefix: str = "") -> str:
    low, high = one[f"{prefix}quartiles"]
    return f"{1e3 * one[f'{prefix}seconds']:.1f} ({1e3 * low:.1f}-{1e3 * high:.1f})"


def check_arguments(chosen: Namespace) -> None:
    if min(chosen.repeats, chosen.new_tokens, chosen.tiles or 1) < 1 or chosen.repeats > 10**6:
        raise InputError("--repeats, --new-tokens and --tiles must be 1 or more, and --repeats at most a million")
    if chosen.shape and (chosen.image or chosen.model):
        raise InputError("a shape has random weights and pixels; it takes no image and no --model")
    if not chosen.shape and not chosen.prompt:
        raise InputError("give an image and a question, or a --shape")
    if not chosen.shape and (chosen.tiles or chosen.tokens):
        raise InputError("--tiles and --tokens are sizes of a --shape; an image and a question have theirs")


def prepared(chosen: Namespace) -> tuple[VLM, np.ndarray | None, EmbeddedPrompt]:
    """The model, pixels (tiles, 3, height, width) or None, and the `EmbeddedPrompt`."""
    if chosen.shape:
        vlm = random_model(chosen.shape)
        return vlm, *random_prompt(vlm, chosen.shape, chosen.tiles or 1, chosen.tokens)
    vlm = load(chosen.model)
    prompt = vlm.prepare(chosen.image, chosen.prompt)
    return vlm, prompt.tiles, vlm.embed(prompt)


def main(arguments: list[str]) -> None:
    what = "Time vision, prefill, decode and a second question, side by side with transformers."
    options = Parser(prog="minivtw.bench", description=what)
    add = options.add_argument
    add("image", nargs="?", metavar="IMAGE")
    add("prompt", nargs="?", metavar="PROMPT")
    add_model_option(options)
    add("--shape", choices=SHAPES, help="random weights of a published size instead of a model and an image")
    add("--tiles", type=int, metavar="N", help="tiles of a shape's image (default: 1)")
    add("--tokens", type=int, metavar="N", help="tokens of a shape's prompt (default: the visual ones + 60)")
    add("--withdraw", type=layers_to_try, default="off,auto", metavar="off,auto,K,…", help="layers to time")
    add("--method", nargs="+", default=[], metavar="NAME:parameters", help="other methods to time beside them")
    add("--repeats", type=int, default=20, metavar="N", help="rounds, of which the median counts (default: 20)")
    add("--new-tokens", type=int, default=16, metavar="N", help="tokens to decode in each (default: 16)")
    add("--alone", action="store_true", help="without transformers, even if it is installed")
    add("--json", action="store_true", help="one JSON object instead of text")
    chosen = options.parse_args(arguments)
    check_arguments(chosen)
    vlm, pixels, prompt = prepared(chosen)
    methods = {"off": None} | methods_to_try(vlm, chosen.withdraw, chosen.method)
    twin = None
    if not chosen.alone and all(map(importlib.util.find_spec, ("torch", "transformers"))):
        from .timing.torch_twin import Twin

        twin = Twin(vlm, THREADS)
    seen = {} if pixels is None or prompt.is_visual[-1] else seen_under(vlm, prompt, methods)
    before, calls = timing.load_average(), measures(vlm, twin, pixels, prompt, methods, seen, chosen.new_tokens)
    taken, counted = timing.rounds(calls, chosen.repeats), operations(vlm, pixels, prompt, methods, seen)
    if pixels is not None:
        add_question(taken, counted, methods)
    works = [(work, name) for work in WORKS for name in methods if (work, "ours", name) in taken]
    result = {
        "machine": timing.machine(),
        "beside": twin.name if twin else None,
        "load_average": [before, timing.load_average()],
        "model": chosen.shape or str(vlm.folder),
        "tiles": 0 if pixels is None else len(pixels),
        "tokens": len(prompt.hidden),
        "visual": int(prompt.is_visual.sum()),
        "rounds": chosen.repeats,
        "sgemm_flops": statistics.median(taken["sgemm"]),
        "stream_bytes": statistics.median(taken["stream"]),
        "rows": [result_row(work, name, taken, counted) for work, name in works],
    }
    print(json.dumps(result) if chosen.json else result_text(result))


def result_text(result: dict[str, Any]) -> str:
    lines = [result["machine"], *([result["beside"]] if result["beside"] else [])]
    loads = ", then ".join(f"{load:.1f}" for load in result["load_average"] if load is not None)
    lines.append(
        f"a product of 2048 x 2048 matrices: {result['sgemm_flops'] / 1e9:.0f} GFLOP/s; "
        f"a read of 256 MB: {result['stream_bytes'] / 1e9:.1f} GB/s; load average {loads or 'unknown'}"
    )
    sizes = f"{counted(result['tiles'], 'tile')}, {result['tokens']} tokens, {result['visual']} of them visual"
    lines.append(f"{result['model']}: {sizes}; medians of {result['rounds']} rounds")
    return "\n".join([*lines, "", results_table(result["rows"])])


if __name__ == "__main__":
    command(main)
