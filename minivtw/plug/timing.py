"""What `python -m minivtw.plug` measures: prefill, decode, cache and operations of a model, with and without withdrawal."""

import functools
import statistics
import time
from typing import Any, NamedTuple

import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from ..checkpoints.checkpoint import available_memory
from ..checkpoints.hub import model_folder
from ..errors import InputError
from .anatomy import Anatomy, anatomy
from .contexts import plugged
from .shapes import SHAPES


class Run(NamedTuple):
    """One prompt and some tokens after it."""

    prefill: float  # seconds, decoder and head
    decode: float  # seconds per token
    cache_bytes: int


def load(name: str, device: str, dtype: str, attention: str) -> Any:
    """A folder, a name, or a shape of SHAPES -> the model, on the device. Raises InputError, also for lack of memory."""
    kind: Any = transformers.AutoModelForImageTextToText
    options = dict(dtype=getattr(torch, dtype), attn_implementation=attention)
    folder = None if name in SHAPES else model_folder(name)
    try:
        shape = SHAPES[name].config if folder is None else None
        config = shape() if shape else transformers.AutoConfig.from_pretrained(folder)
        with torch.device("meta"):  # costs nothing
            weights = sum(weight.numel() for weight in kind.from_config(config).parameters())
        needed, free = weights * options["dtype"].itemsize, available_memory()
        if device == "cpu" and free is not None and needed > free:
            sizes = f"{needed / 1e9:.1f} GB of memory in {dtype}, and {free / 1e9:.1f} GB are free"
            raise InputError(f"{name} needs {sizes}; try --dtype bfloat16 or a GPU")
        if folder is None:
            with torch.device(device):
                return kind.from_config(config, **options).eval()
        return kind.from_pretrained(folder, **options).to(device).eval()
    except InputError:
        raise
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise InputError(f"cannot load {name}: {str(error).splitlines()[0]}") from error


def random_prompt(model: Any, parts: Anatomy, visual: int, text: int, batch: int) -> torch.Tensor:
    """Text, then visual tokens, then the rest of the text. (batch, tokens) token ids."""
    words = min(*parts.visual_ids, parts.decoder.embed_tokens.num_embeddings)
    ids = torch.randint(words, (batch, text + visual), device=model.device)
    ids[:, text // 3 : text // 3 + visual] = parts.visual_ids[0]
    return ids


@torch.no_grad()
def once(model: Any, context: Any, ids: torch.Tensor, new_tokens: int) -> Run:
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


def measure(model: Any, contexts: list, ids: torch.Tensor, new_tokens: int, repeats: int) -> list[Run]:
    """The medians of rounds in which every context has its turn: a busy moment hits all alike. One `Run` for each."""
    rounds = [[once(model, context(), ids, new_tokens) for context in contexts] for _ in range(repeats + 1)]
    return [Run(*map(statistics.median, zip(*runs))) for runs in zip(*rounds[1:])]  # the first round warms up


@torch.no_grad()
def flops(model: Any, context: Any, ids: torch.Tensor) -> int:
    """Of one prefill, counted from what runs: matrix products, and attention without regard to its mask."""
    on_cpu = lambda query, key, value, *rest, out_shape=None, **more: sdpa_flop_count(query, key, value)
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # which PyTorch does not count by itself
    counter = FlopCounterMode(display=False, custom_mapping={attention: on_cpu})
    with context, counter:
        model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True, logits_to_keep=1)
    return counter.get_total_flops()


def prepared(chosen: Any) -> Any:
    """The model that the command was given, where it is to run. Notes device and dtype in `chosen`. Raises InputError."""
    has_cuda = torch.cuda.is_available()
    chosen.device = chosen.device or ("cuda" if has_cuda else "cpu")
    chosen.dtype = chosen.dtype or ("float32" if chosen.device == "cpu" else "bfloat16")
    if chosen.device.startswith("cuda") and not has_cuda:
        raise InputError("PyTorch finds no CUDA device here")
    if chosen.threads:
        torch.set_num_threads(chosen.threads)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    return load(chosen.model, chosen.device, chosen.dtype, chosen.attention)


def compared(chosen: Any) -> dict:
    """What the command prints as JSON. Raises InputError, and MemoryError where PyTorch has no room."""
    model = prepared(chosen)
    parts = anatomy(model)
    count, most = len(parts.layers), getattr(parts.decoder.config, "max_position_embeddings", None)
    if most and (tokens := chosen.visual + chosen.text + chosen.new_tokens) > most:
        raise InputError(f"--visual, --text and --new-tokens make {tokens:,} tokens; the model has {most:,} positions")
    plans = [(count, ()), *((layer, chosen.freeze) for layer in chosen.withdraw or (count // 2,))]
    contexts = [functools.partial(plugged, model, layer, frozen, warns=False) for layer, frozen in plans]
    for context in contexts:
        with context():  # refuses what is not understood before anything is timed
            pass
    ids = random_prompt(model, parts, chosen.visual, chosen.text, chosen.batch)
    runs = measure(model, contexts, ids, chosen.new_tokens, chosen.repeats)
    return {
        "model": chosen.model, "layers": count, "device": torch.cuda.get_device_name() if ids.is_cuda else "cpu",
        "dtype": chosen.dtype, "attention": chosen.attention, "threads": torch.get_num_threads(),
        "tokens": {"visual": chosen.visual, "text": chosen.text, "batch": chosen.batch, "generated": chosen.new_tokens},
        "rounds": chosen.repeats,
        "runs": [
            {"layer": layer, "frozen": list(frozen), **run._asdict(), "flops": flops(model, context(), ids)}
            for (layer, frozen), run, context in zip(plans, runs, contexts)
        ],
    }  # fmt: skip
