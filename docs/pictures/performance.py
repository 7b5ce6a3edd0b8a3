"""Draw performance.svg: where a vision layer's time goes, as the formulas are written and as they are computed, and
with the result of a benchmark also roofline.svg:

OPENBLAS_NUM_THREADS=1 python docs/pictures/performance.py
python -m minivtw.bench --shape smolvlm-256m --tokens 1148 --withdraw off --json > bench.json && python docs/pictures/performance.py bench.json

One layer of SigLIP-B/16 on one tile of 512 pixels, on one thread; processor seconds, so that other jobs on the machine
count little. Every part is timed in turns, before and after, and the median counts.
"""

import json
import math
import pathlib
import statistics
import sys
import time

import numpy as np
from drawing import options

from minivtw.checkpoints.clip import vision
from minivtw.model.attention import attention, attention_probabilities, split_heads
from minivtw.model.layers import gelu_tanh, layer_norm, linear
from minivtw.timing.shapes import SIGLIP_512, RandomWeights

HERE, ROUNDS = pathlib.Path(__file__).parent, 9
COLORS = {"products": "#4a86c5", "attention": "#d98a3d", "activation": "#b5413b", "norms": "#4f9d72"}
STYLE = (
    "text { font: 13px system-ui, sans-serif; fill: #1d232b } .small { font-size: 11px } text.in { fill: #fff; font-size: 11px } "
    ".title { font-size: 16px; font-weight: 600 } "
    ".grid { stroke: #9aa5b1; opacity: .35 } .mid { text-anchor: middle } .end { text-anchor: end } "
    "@media (prefers-color-scheme: dark) { text { fill: #e6eaef } }"
)


def plain_gelu(x):
    return 0.5 * x * (1 + np.tanh(np.float32(np.sqrt(2 / np.pi)) * (x + np.float32(0.044715) * x**3)))


def plain_norm(x, norm, eps):
    centred = x - np.mean(x, axis=-1, keepdims=True)
    return centred / np.sqrt(np.mean(centred * centred, axis=-1, keepdims=True) + eps) * norm.weight + norm.bias


def plain_attention(queries, keys, values):
    return attention_probabilities(queries, keys) @ values


def parts():
    """(part, before, after) for everything that a layer does."""
    config, random = SIGLIP_512._replace(layers=1), np.random.default_rng(1)
    norm, qkv, output, _, up, down = vision(config, RandomWeights(), "").layers[0]
    sizes = config.width, config.mlp_width
    hidden, inner = (random.standard_normal((config.patches, size), np.float32) for size in sizes)
    heads = split_heads(linear(hidden, qkv), 3 * config.heads).reshape(3, config.heads, config.patches, -1)
    products = [(hidden, qkv), (hidden, output), (hidden, up), (inner, down)]
    return [
        ("products", lambda: [x @ one.weight + one.bias for x, one in products], lambda: [linear(x, one) for x, one in products]),
        ("attention", lambda: plain_attention(*heads), lambda: attention(*heads)),
        ("activation", lambda: plain_gelu(inner), lambda: [gelu_tanh(inner[rows : rows + 256]) for rows in range(0, 1024, 256)]),
        ("norms", lambda: [plain_norm(hidden, norm, 1e-6) for _ in range(2)], lambda: [layer_norm(hidden, norm, 1e-6) for _ in range(2)]),
    ]  # fmt: skip


def measure(parts_of_layer):
    """{part: (milliseconds before, after)}."""
    taken = {}
    for turn in range(ROUNDS + 1):
        for name, *ways in parts_of_layer:
            for way in range(2):
                started = time.process_time()
                ways[way]()
                if turn:
                    taken.setdefault((name, way), []).append(1e3 * (time.process_time() - started))
    return {name: tuple(statistics.median(taken[name, way]) for way in range(2)) for name, *_ in parts_of_layer}


def svg(title, height, *body):
    """A whole drawing, its title above it and read by screen readers."""
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 -26 590 {height + 26}" width="590" role="img" aria-label="{title}">'
    return f'{head}<style>{STYLE}</style><text class="title" x="12" y="-8">{title}</text>{"".join(body)}</svg>\n'


def draw(milliseconds):
    scale = 560 / max(sum(pair[way] for pair in milliseconds.values()) for way in range(2))
    body = []
    for way, title in enumerate(("as the formulas are written", "as they are computed")):
        x, y = 12, 30 + 74 * way
        total = sum(pair[way] for pair in milliseconds.values())
        body.append(f'<text x="{x}" y="{y - 8}">{title}: {total:.0f} ms</text>')
        for name, pair in milliseconds.items():
            length = pair[way] * scale
            body.append(
                f'<rect x="{x:.1f}" y="{y}" width="{length:.1f}" height="30" fill="{COLORS[name]}"><title>{name}: {pair[way]:.1f} ms</title></rect>'
            )
            label = f"{name} {pair[way]:.0f} ms"
            if length > 6.5 * len(label) + 8:  # else the legend says it
                body.append(f'<text class="in" x="{x + 6:.1f}" y="{y + 19}">{label}</text>')
            x += length
    legend = "".join(
        f'<rect x="{12 + 145 * place}" y="158" width="11" height="11" fill="{color}"/><text class="small" x="{28 + 145 * place}" y="168">'
        f"{name} {milliseconds[name][0]:.0f} → {milliseconds[name][1]:.0f}</text>"
        for place, (name, color) in enumerate(COLORS.items())
    )
    return svg("Where the milliseconds of one vision layer go", 180, *body, legend)


def roofline(result):
    """FLOP/s over FLOPs a byte: the roof that memory and arithmetic make, and each work of a benchmark under it."""
    compute, stream = result["sgemm_flops"], result["stream_bytes"]
    place = lambda intensity, speed: (70 + 110 * (math.log10(intensity) + 1), 252 - 92 * (math.log10(speed) - 9))
    corner = place(compute / stream, compute)
    (left, low), (right, _) = place(0.1, 0.1 * stream), place(4000, compute)
    body = []
    for power in range(-1, 4):
        x, _ = place(10**power, 1e9)
        body.append(
            f'<path d="M{x:.0f} 30 V262" class="grid"/><text x="{x:.0f}" y="280" class="mid">{10**power:g}</text>'
        )
    for power in range(9, 12):
        _, y = place(1, 10**power)
        body.append(f'<path d="M{left:.0f} {y:.0f} H{right:.0f}" class="grid"/>')
        body.append(f'<text x="62" y="{y + 4:.0f}" class="end">{10 ** (power - 9)}</text>')
    roof = f"M{left:.0f} {low:.0f} L{corner[0]:.0f} {corner[1]:.0f} L{right:.0f} {corner[1]:.0f}"
    body.append(f'<path d="{roof}" fill="none" stroke="#66707c" stroke-width="2"/>')
    rights = 0
    for one in result["rows"]:
        intensity, speed = one["flops"] / one["bytes"], one["flops"] / one["seconds"]
        x, y = place(intensity, speed)
        name = one["work"] if one["method"] == "off" else f"{one['work']}, {one['method']}"
        label = f"{name}: {speed / 1e9:.3g} at {intensity:.3g}"
        body.append(f'<circle cx="{x:.0f}" cy="{y:.0f}" r="5" fill="{COLORS["attention"]}"/>')
        end = "end" if x > 300 else "start"
        rights += x > 300
        body.append(
            f'<text x="{x + (5 if end == "end" else 12):.0f}" y="{y + (8 + 18 * rights if x > 300 else 5):.0f}" class="{end}">{label}</text>'
        )
    body.append(
        f'<text x="{right:.0f}" y="{corner[1] - 8:.0f}" class="end">a large product: {compute / 1e9:.0f} GFLOP/s</text>'
    )
    x, y = place(1, stream)
    body.append(f'<text x="{x + 12:.0f}" y="{y + 14:.0f}">reading memory: {stream / 1e9:.1f} GB/s</text>')
    body.append(
        f'<text x="{right:.0f}" y="298" class="end">FLOPs for each byte that is read</text><text x="62" y="24">GFLOP/s</text>'
    )
    return svg("Prefill is bound by arithmetic, decoding by reading memory", 306, *body)


if __name__ == "__main__":
    parser = options(__doc__)
    parser.add_argument("bench", nargs="?", metavar="bench.json", type=pathlib.Path)
    if benchmark := parser.parse_args().bench:
        drawing = roofline(json.loads(benchmark.read_text(encoding="utf-8")))
        (HERE / "roofline.svg").write_text(drawing, encoding="utf-8")
        sys.exit()
    milliseconds = measure(parts())
    print({name: [round(one, 1) for one in pair] for name, pair in milliseconds.items()})
    (HERE / "performance.svg").write_text(draw(milliseconds), encoding="utf-8")
