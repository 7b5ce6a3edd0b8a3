"""What withdrawal saves a transformers model on this machine, measured side by side: python -m minivtw.plug MODEL

MODEL is a folder or a name on the hub; or a published shape, filled with random weights, which take as long as others.
The prompt is random, too: what the decoder does takes as long whatever the image shows. The tower is not timed.

With --samples, a folder of your own questions, it finds K and shows what changes; --store keeps K with the model.
"""

import json
from typing import Any

from ..calibrate import SAMPLES
from ..cli.options import Parser
from ..cli.terminal import command
from ..errors import InputError
from ..search.layer import ETA
from . import check_packages
from .shapes import SHAPES, Shape


def table(found: dict) -> str:
    """Ratios first, then what they are ratios of."""
    columns = ("FLOPs", "prefill", "decode", "cache", "prefill s", "decode ms", "cache MB")
    lines = [f"{'withdrawn':<10} {'frozen':>6} " + " ".join(f"{name:>9}" for name in columns)]
    base = found["runs"][0]
    for run in found["runs"]:
        where = "never" if run["layer"] == found["layers"] else f"before {run['layer']}"
        ratios = [f"{run[key] / base[key]:9.3f}" for key in ("flops", "prefill", "decode", "cache_bytes")]
        measured = [f"{run['prefill']:9.4f}", f"{1e3 * run['decode']:9.2f}", f"{run['cache_bytes'] / 1e6:9.2f}"]
        lines.append(f"{where:<10} {len(run['frozen']):>6} " + " ".join(ratios + measured))
    return "\n".join(lines)


def layers(text: str) -> tuple[int, ...]:
    """Layers with commas between them -> a tuple."""
    return tuple(int(part) for part in text.split(","))


def parse(arguments: list[str]) -> Any:
    options = Parser(prog="minivtw.plug", description="Time a transformers model with and without withdrawal.")
    add = options.add_argument
    add("model", metavar="MODEL", help=f"a folder, a name on the hub, or a shape: {', '.join(SHAPES)}")
    add("--withdraw", type=layers, metavar="K,…", help="before which layers (default: half the depth)")
    add("--freeze", type=layers, default=(), metavar="LAYER,…", help="in these, visual tokens are only read, too")
    add("--visual", type=int, metavar="N", help="visual tokens of a prompt (default: the shape's, else 576)")
    add("--text", type=int, metavar="N", help="text tokens of a prompt (default: the shape's, else 64)")
    add("--batch", type=int, default=1, metavar="N", help="prompts at a time (default: 1)")
    add("--new-tokens", type=int, default=16, metavar="N", help="tokens to decode (default: 16)")
    add("--repeats", type=int, default=5, metavar="N", help="rounds, of which the median counts (default: 5)")
    add("--device", help="(default: cuda if there is one)")
    add("--dtype", choices=("float32", "float16", "bfloat16"), help="(default: float32 on a CPU, else bfloat16)")
    add("--attention", default="sdpa", choices=("sdpa", "eager", "flash_attention_2"), help="(default: sdpa)")
    add("--threads", type=int, metavar="N", help="on a CPU (default: what PyTorch takes)")
    add("--json", action="store_true", help="print one JSON object")
    add = options.add_argument_group("to find K on questions of your own instead").add_argument
    add("--samples", metavar="DIR", help="a folder with questions.jsonl and images (default: the model's samples/)")
    add("--limit", type=int, metavar="N", help=f"use the first N samples (default: {SAMPLES})")
    add("--threshold", type=float, metavar="ETA", help=f"the most KL, in nats (default: {ETA:g})")
    add("--prompt", help="what stands around a question, {} for it, where a model has no chat template")
    add("--store", action="store_true", help="store K with the model, where `withdraw` and minivtw find it")
    chosen = options.parse_args(arguments)
    its_own = {"samples": None, "limit": SAMPLES, "threshold": ETA, "prompt": "{}", "store": False}
    chosen.asks = any(getattr(chosen, name) not in (None, False) for name in its_own)
    for name, default in its_own.items():
        setattr(chosen, name, default if getattr(chosen, name) is None else getattr(chosen, name))
    if chosen.asks and (chosen.withdraw or chosen.freeze):
        raise InputError(f"--{' and --'.join(its_own)} are for finding K; --withdraw and --freeze say it")
    shape = SHAPES.get(chosen.model, Shape(None, 576, 64))
    chosen.visual = shape.visual if chosen.visual is None else chosen.visual
    chosen.text = shape.text if chosen.text is None else chosen.text
    counts = [chosen.visual, chosen.text, chosen.batch, chosen.new_tokens, chosen.repeats, chosen.threads or 1]
    if min(*counts, chosen.limit) < 1 or chosen.text < 3:
        raise InputError("the numbers of tokens, prompts, rounds and threads must be 1 or more, and --text 3 or more")
    if not 0 <= chosen.threshold < float("inf"):
        raise InputError(f"--threshold must be 0 or more, not {chosen.threshold:g}")
    return chosen


def main(arguments: list[str]) -> None:
    chosen = parse(arguments)
    check_packages()
    from .asking import asked, report
    from .timing import compared

    find, shown = (asked, report) if chosen.asks else (compared, table)
    try:
        found = find(chosen)
    except RuntimeError as error:  # on a CPU, PyTorch has no class of its own for it
        if "memory" not in str(error):
            raise
        raise MemoryError from error
    print(json.dumps(found) if chosen.json else shown(found))


if __name__ == "__main__":
    command(main)
