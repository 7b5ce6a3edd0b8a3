"""What an answer will take, before it is asked for: operations from the sizes, seconds from what this machine does."""

import statistics
import time
from typing import NamedTuple

import numpy as np

from ..counting import cache_bytes, plain_run, prompt_flops, vision_flops
from ..model.decoder import DecoderConfig
from ..model.tokens import LayerCount
from ..model.vision import VisionConfig


class Machine(NamedTuple):
    """How fast this machine is at the two things that a model does."""

    flops: float  # a second, in a product of matrices: reading a prompt
    bytes: float  # a second, of a matrix that one vector goes through: decoding a token


class Expectation(NamedTuple):
    """What one picture and one question take."""

    see: float  # seconds of the vision tower
    prefill: float  # seconds until the first token
    token: float  # seconds for each further token
    cache: int  # bytes of keys and values of the prompt


def measure_machine(width: int = 1024) -> Machine:
    """Time one product of each kind, for about half a second in all."""
    prompt, weight = np.ones((512, width), np.float32), np.ones((width, 4 * width), np.float32)
    seconds = typical(lambda: prompt @ weight)
    flops = 2 * 512 * width * 4 * width / seconds
    large = np.ones((4096, 8192), np.float32)  # 134 MB: more than any cache of a processor holds
    token = np.ones((1, 4096), np.float32)
    return Machine(flops, large.nbytes / typical(lambda: token @ large))


def typical(work, rounds=9):
    """Seconds of the middle one of several rounds."""
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def expect(
    decoder: DecoderConfig, vision: VisionConfig | None, tiles: int, tokens: int, machine: Machine
) -> Expectation:
    """What a prompt of `tokens` with `tiles` takes if no token is spared. Norms and activations are not counted."""
    cache = cache_bytes(decoder, [tokens] * decoder.layers)
    weights = (
        prompt_flops(decoder, [LayerCount(1, 1, 0, 0)] * decoder.layers) / 2
    )  # each is multiplied and added once a token
    return Expectation(
        see=tiles * vision_flops(vision) / machine.flops if vision else 0.0,
        prefill=prompt_flops(decoder, plain_run(decoder, tokens)) / machine.flops,
        token=(4 * weights + cache) / machine.bytes,
        cache=cache,
    )
