"""How much the shared prefix saves: python -m tests.bench_search

The naive search below is the published one, kept plain: it is what `minivtw.search` must agree with. This command runs
both on the embedded model and on a decoder of SmolLM2-135M's size (30 layers, random weights), and prints a table.
"""

import time

import numpy as np

import minivtw
from minivtw.counting import layer_flops, plain_run, prompt_flops
from minivtw.methods.withdrawal import withdraw
from minivtw.model.cache import KVCache
from minivtw.model.decoder import DecoderConfig, forward, logits
from minivtw.model.tokens import LayerCount, arriving
from minivtw.search.layer import divergence, kl_curve

from .random_models import random_decoder, random_prompt

SMOLLM2 = DecoderConfig(
    vocabulary=49152, width=576, layers=30, heads=9, kv_heads=3, head_dim=64, mlp_width=1536,
    rms_norm_eps=1e-5, rope_theta=1e5, max_positions=8192, tied_head=True,
)  # fmt: skip


def naive_kl_curve(decoder, asked):
    """The published search: the whole model again for every candidate. (layers,) nats."""
    layers = decoder.config.layers

    def next_logits(method):
        hidden = forward(decoder, arriving(asked, KVCache(decoder.config)), method).hidden
        return logits(decoder, hidden[-1:])[0]  # (vocabulary,)

    full = next_logits(None)
    return np.array([divergence(next_logits(withdraw(layer)), full) for layer in range(layers)])


def search_flops(config: DecoderConfig, tokens: int, staying: int) -> int:
    """FLOPs of `kl_curve` for a prompt of `tokens`, `staying` of them text: the naive search less the beginnings."""
    beginnings = sum(layer * layer_flops(config, plain_run(config, tokens)[0]) for layer in range(config.layers))
    return naive_flops(config, tokens, staying) - beginnings


def naive_flops(config: DecoderConfig, tokens: int, staying: int) -> int:
    """FLOPs of the published search: one prefill without withdrawal, and one from the bottom for every candidate."""
    plain, text = plain_run(config, tokens), LayerCount(staying, staying, staying, 0)
    runs = [plain[:layer] + [text] * (config.layers - layer) for layer in range(config.layers)]
    return sum(prompt_flops(config, run) for run in [plain, *runs])


def seconds(search, decoder, asked):
    """The faster of two runs, and what it found."""
    taken = []
    for _ in range(2):
        started = time.perf_counter()
        curve = search(decoder, asked)
        taken.append(time.perf_counter() - started)
    return min(taken), curve


def row(name, decoder, asked):
    """One line of the table."""
    config, tokens, text = decoder.config, len(asked.hidden), int((~asked.is_visual).sum())
    shared_seconds, shared = seconds(kl_curve, decoder, asked)
    naive_seconds, naive = seconds(naive_kl_curve, decoder, asked)
    assert np.abs(shared - naive).max() < 1e-6
    naive_counted, counted = naive_flops(config, tokens, text), search_flops(config, tokens, text)
    return (
        f"| {name} | {config.layers} | {tokens} ({text}) | {naive_counted / 1e9:.2f} | {counted / 1e9:.2f} "
        f"| {naive_counted / counted:.1f} | {naive_seconds:.2f} | {shared_seconds:.2f} "
        f"| {naive_seconds / shared_seconds:.1f} |"
    )


def main():
    print("| decoder | layers | tokens (text) | GFLOP naive | shared | ratio | seconds naive | shared | ratio |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    vlm = minivtw.load()
    prompt = vlm.prepare(next(iter((vlm.folder / "samples").glob("*.png"))), "What color is the star?")
    print(row(vlm.folder.name, vlm.decoder, vlm.embed(prompt)), flush=True)
    decoder = random_decoder(SMOLLM2)
    for visual in (64, 832):  # one tile of SmolVLM's; thirteen, of a picture of 3:4
        is_visual = [False] * 4 + [True] * visual + [False] * 20
        print(row("SmolLM2-135M's size", decoder, random_prompt(decoder, is_visual)), flush=True)


if __name__ == "__main__":
    main()
