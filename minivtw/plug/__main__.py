"""What withdrawal saves a transformers model on this machine, measured side by side: python -m minivtw.plug MODEL

MODEL is a folder or a name on the hub; or a published shape, filled with random weights, which take as long as others.
The prompt is random, too: what the decoder does takes as long whatever the picture shows. The tower is not timed.
"""

import contextlib
import json
import statistics
import time
from typing import NamedTuple

import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from ..errors import InputError, Parser, door
from .anatomy import anatomy
from .hooks import freeze, withdraw

TOWER = dict(num_hidden_layers=1, hidden_size=64, intermediate_size=64, num_attention_heads=1, image_size=28, patch_size=14)
QWEN_TOWER = dict(depth=1, hidden_size=64, num_heads=1, intermediate_size=64, fullatt_block_indexes=[0])


def smolvlm_256m():
    text = dict(
        model_type="llama", hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, rope_parameters={"rope_type": "default", "rope_theta": 1e5}, max_position_embeddings=8192,
        vocab_size=49280, tie_word_embeddings=True,
    )  # fmt: skip
    return transformers.SmolVLMConfig(text_config=text, vision_config=TOWER, image_token_id=49190, pad_token_id=2, tie_word_embeddings=True)


def llava_7b():
    text = dict(model_type="llama", max_position_embeddings=4096, vocab_size=32064)  # the rest is Llama 2's, the default
    return transformers.LlavaConfig(text_config=text, vision_config={**TOWER, "model_type": "clip_vision_model"}, image_token_index=32000)


def qwen_7b():
    text = dict(
        hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4,
        max_position_embeddings=128000, vocab_size=152064,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    )  # fmt: skip
    return transformers.Qwen2_5_VLConfig(text_config=text, vision_config={**QWEN_TOWER, "out_hidden_size": 3584}, image_token_id=151655)


class Shape(NamedTuple):
    """A published decoder, and how many tokens a usual prompt has: sixteen tiles and an overview; one square; one photo."""

    config: callable
    visual: int
    text: int


SHAPES = {
    "smolvlm-256m": Shape(smolvlm_256m, 1088, 60),
    "llava-1.5-7b": Shape(llava_7b, 576, 64),
    "qwen2.5-vl-7b": Shape(qwen_7b, 1296, 64),
}


class Run(NamedTuple):
    """One prompt and some tokens after it."""

    prefill: float  # seconds, decoder and head
    decode: float  # seconds a token
    cache_bytes: int


def load(name, device, dtype, attention):
    """A folder, a name on the hub, or a shape of SHAPES -> the model, on the device."""
    kind, options = transformers.AutoModelForImageTextToText, dict(dtype=getattr(torch, dtype), attn_implementation=attention)
    try:
        if name in SHAPES:
            with torch.device(device):
                return kind.from_config(SHAPES[name].config(), **options).eval()
        return kind.from_pretrained(name, **options).to(device).eval()
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise InputError(f"cannot load {name}: {str(error).splitlines()[0]}") from error


def random_prompt(model, parts, visual, text, batch):
    """Text, then visual tokens, then the rest of the text. (batch, tokens) token ids."""
    words = min(*parts.visual_ids, parts.decoder.embed_tokens.num_embeddings)
    ids = torch.randint(words, (batch, text + visual), device=model.device)
    ids[:, text // 3 : text // 3 + visual] = parts.visual_ids[0]
    return ids


@torch.no_grad()
def once(model, context, ids, new_tokens):
    """Time one `Run`. ids: (batch, tokens)."""
    wait = torch.cuda.synchronize if ids.is_cuda else lambda: None
    with context:
        wait()
        started = time.perf_counter()
        output = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True, logits_to_keep=1)
        wait()
        prefilled = time.perf_counter()
        name = "cache" if "cache" in output else "past_key_values"
        cache, token = output[name], ids[:, -1:]
        for step in range(1, new_tokens + 1):
            mask = torch.ones(len(ids), ids.shape[1] + step, dtype=ids.dtype, device=ids.device)
            model(input_ids=token, attention_mask=mask, **{name: cache}, use_cache=True)
        wait()
        ended = time.perf_counter()
    held = sum(part.numel() * part.element_size() for layer in cache.layers for part in (layer.keys, layer.values))
    return Run(prefilled - started, (ended - prefilled) / new_tokens, held)


def measure(model, contexts, ids, new_tokens, repeats):
    """The medians of rounds in which every context has its turn: a busy moment hits all alike. One `Run` for each."""
    rounds = [[once(model, make(), ids, new_tokens) for make in contexts] for _ in range(repeats + 1)][1:]  # the first warms up
    return [Run(*(statistics.median(values) for values in zip(*runs))) for runs in zip(*rounds)]


@torch.no_grad()
def flops(model, context, ids):
    """Of one prefill, counted from what runs: matrix products, and attention without regard to its mask."""
    on_cpu = lambda query, key, value, *rest, out_shape=None, **more: sdpa_flop_count(query, key, value)
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: on_cpu})
    with context, counter:
        model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True, logits_to_keep=1)
    return counter.get_total_flops()


def table(found):
    """Ratios first, then what they are ratios of."""
    lines = [f"{'withdrawn':<12} {'frozen':<8} {'FLOPs':>6} {'prefill':>8} {'decode':>7} {'cache':>6}   {'prefill s':>9} {'decode ms':>9} {'cache MB':>9}"]
    base = found["runs"][0]
    for run in found["runs"]:
        ratios = [run[key] / base[key] for key in ("flops", "prefill", "decode", "cache_bytes")]
        where = "never" if run["layer"] == found["layers"] else f"before {run['layer']}"
        lines.append(
            f"{where:<12} {len(run['frozen']) or '':<8} {ratios[0]:6.3f} {ratios[1]:8.3f} {ratios[2]:7.3f} {ratios[3]:6.3f}"
            f"   {run['prefill']:9.4f} {1e3 * run['decode']:9.2f} {run['cache_bytes'] / 1e6:9.2f}"
        )
    return "\n".join(lines)


def layers(text):
    """"3,4,5" -> a tuple of layers."""
    return tuple(int(part) for part in text.split(","))


def parse(arguments):
    options = Parser(prog="minivtw.plug", description="Time a transformers model with and without withdrawal, side by side.")
    options.add_argument("model", metavar="MODEL", help=f"a folder, a name on the hub, or a shape: {', '.join(SHAPES)}")
    options.add_argument("--withdraw", type=layers, metavar="K,…", help="before which layers (default: half the depth)")
    options.add_argument("--freeze", type=layers, default=(), metavar="LAYER,…", help="let visual tokens rest in these, too")
    options.add_argument("--visual", type=int, metavar="N", help="visual tokens of a prompt (default: the shape's, else 576)")
    options.add_argument("--text", type=int, metavar="N", help="text tokens of a prompt (default: the shape's, else 64)")
    options.add_argument("--batch", type=int, default=1, metavar="N", help="prompts at a time (default: 1)")
    options.add_argument("--new-tokens", type=int, default=16, metavar="N", help="tokens to decode (default: 16)")
    options.add_argument("--repeats", type=int, default=5, metavar="N", help="rounds, of which the median counts (default: 5)")
    options.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default: cuda if there is one)")
    options.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="(default: float32 on a CPU, else bfloat16)")
    options.add_argument("--attention", default="sdpa", choices=("sdpa", "eager", "flash_attention_2"), help="(default: sdpa)")
    options.add_argument("--threads", type=int, metavar="N", help="on a CPU (default: what PyTorch takes)")
    options.add_argument("--json", action="store_true", help="print one JSON object")
    chosen = options.parse_args(arguments)
    shape = SHAPES.get(chosen.model, Shape(None, 576, 64))
    chosen.visual = shape.visual if chosen.visual is None else chosen.visual
    chosen.text = shape.text if chosen.text is None else chosen.text
    chosen.dtype = chosen.dtype or ("float32" if chosen.device == "cpu" else "bfloat16")
    counts = [chosen.visual, chosen.text, chosen.batch, chosen.new_tokens, chosen.repeats, chosen.threads or 1]
    if min(counts) < 1 or chosen.text < 3:
        raise InputError("--visual, --batch, --new-tokens, --repeats and --threads must be 1 or more, and --text 3 or more")
    if chosen.device.startswith("cuda") and not torch.cuda.is_available():
        raise InputError("PyTorch finds no CUDA device here")
    return chosen


def main(arguments):
    chosen = parse(arguments)
    if chosen.threads:
        torch.set_num_threads(chosen.threads)
    transformers.utils.logging.disable_progress_bar()
    model = load(chosen.model, chosen.device, chosen.dtype, chosen.attention)
    parts = anatomy(model)
    count = len(parts.layers)
    plans = [(count, ()), *((layer, chosen.freeze) for layer in chosen.withdraw or (count // 2,))]
    make = lambda layer, frozen: lambda: freeze(model, frozen, layer) if frozen else withdraw(model, layer)
    contexts = [contextlib.nullcontext, *(make(*plan) for plan in plans[1:])]
    for context in contexts:
        with context():  # refuses what is not understood before anything is timed
            pass
    ids = random_prompt(model, parts, chosen.visual, chosen.text, chosen.batch)
    runs = measure(model, contexts, ids, chosen.new_tokens, chosen.repeats)
    found = {
        "model": chosen.model, "layers": count, "device": torch.cuda.get_device_name() if ids.is_cuda else "cpu",
        "dtype": chosen.dtype, "attention": chosen.attention, "threads": torch.get_num_threads(),
        "tokens": {"visual": chosen.visual, "text": chosen.text, "batch": chosen.batch, "generated": chosen.new_tokens},
        "rounds": chosen.repeats,
        "runs": [
            {"layer": layer, "frozen": list(frozen), **run._asdict(), "flops": flops(model, context(), ids)}
            for (layer, frozen), run, context in zip(plans, runs, contexts)
        ],
    }  # fmt: skip
    print(json.dumps(found) if chosen.json else table(found))


if __name__ == "__main__":
    door(main)
