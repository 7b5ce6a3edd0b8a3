"""Every vision-language family of the installed transformers, built small, under the plug: right, refused or crashed?

    python -m tests.sweep_families [--decoders] [--only NAME …] [--log FILE] [--docs]

A family is right if greedy tokens, beams, batches and second turns are those of the same model with masks: from layer K
on, text may not see visual tokens; a frozen layer returns visual rows as they came. The masks run without a cache. Images
are stood in for by the embeddings of their tokens, so the towers do not run. --decoders: LLaVA around every language
model, too. --docs: write the table of chapter 9.
"""

import argparse
import collections
import contextlib
import itertools
import json
import pathlib
import re
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import transformers as hf
from transformers.models.auto import modeling_auto

from minivtw.errors import InputError
from minivtw.plug import freeze, withdraw
from minivtw.plug.anatomy import anatomy

IMAGE, LAYERS, TOKENS, WINDOW = 90, 6, 4, 9
TOLERANCE = 1e-4  # of the largest logit
PAGE = pathlib.Path(__file__).parent.parent / "docs" / "09-in-transformers.md"
MOST_WEIGHTS = 100_000_000
SIZES = {  # what a config calls it -> how small it gets
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 128, "max_position_embeddings": 512, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "moe_intermediate_size": 16, "num_experts": 4, "num_local_experts": 4,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "q_lora_rank": 16,
    "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "first_k_dense_replace": 1,
    "shared_expert_intermediate_size": 16, "image_token_id": IMAGE, "image_token_index": IMAGE, "video_token_id": 91,
    "video_token_index": 91, "vision_start_token_id": 92, "vision_end_token_id": 93, "query_pre_attn_scalar": 8,
    "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 128, "ffn_dim": 48, "moe_num_experts": 4,
    "global_head_dim": 8, "qk_head_dim": 16, "shared_intermediate_size": 16, "n_shared_experts": 1,
    "num_dense_layers": 1, "moe_k": 2, "qk_rope_dim": 8, "embedding_size": 32, "swa_head_dim": 8, "swa_v_head_dim": 8,
    "audio_token_id": 94, "audio_token_index": 94, "index_head_dim": 8, "index_n_heads": 2, "index_topk": 512,
}  # fmt: skip
TOWER = {
    "num_hidden_layers": 1, "depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4,
    "num_heads": 4, "embed_dim": 32, "out_hidden_size": 32, "fullatt_block_indexes": [0],
    "deepstack_visual_indexes": [0], "layers": 1, "num_layers": 1, "image_size": 56, "patch_size": 14, "head_dim": 8,
    "projection_dim": 32, "text_hidden_size": 32, "num_key_value_heads": 4, "mlp_dim": 48,
}  # fmt: skip


DEPTHS = ("num_hidden_layers", "depth", "num_layers")  # which lists may have as many entries as


ROPE = {"rope_type": "default", "rope_theta": 10000.0}
GLM = {**ROPE, "partial_rotary_factor": 0.5}
OWN = {  # what some families need besides
    **dict.fromkeys(
        ("glm4v", "glm46v", "glm4v_moe", "glm_ocr"), {"rope_parameters": {**GLM, "mrope_section": [1, 1, 0]}}
    ),
    **dict.fromkeys(
        ("qwen2_vl", "qwen2_5_vl", "paddleocr_vl"), {"rope_parameters": {**ROPE, "mrope_section": [2, 1, 1]}}
    ),
    "glm5_next": {"num_key_value_heads": 4, "qk_rope_head_dim": 0}, "molmo2": {"vision_feature_layer": [0]},
    "zaya": {"num_experts_per_tok": 1},
    "deepseek_ocr2": {"rope_parameters": ROPE}, "hunyuan_vl": {"rope_parameters": ROPE},
    **dict.fromkeys(
        ("dots3_note", "kimi_k25", "deepseek_v2", "deepseek_v3", "deepseek_v32", "axk1", "axk2", "glm4_moe_lite",
         "glm_moe_dsa", "minicpm3", "sarvam_mla", "youtu"),
        {"num_key_value_heads": 4},
    ),
}  # fmt: skip


def shrunk(config: dict, window: int | None, sizes: dict) -> dict:
    """A config's fields, smaller, and those of the configs within."""
    small = {}
    for key, value in config.items():
        if key == "per_layer_config" and value:
            small[key] = {layer: fields for layer, fields in value.items() if int(layer) < LAYERS}
        elif isinstance(value, dict) and key.endswith("_config"):
            is_tower = any(word in key for word in ("vision", "visual", "audio", "image", "vq", "perceiver", "vit"))
            small[key] = shrunk(value, window, TOWER if is_tower else sizes)
        elif isinstance(value, list) and len(value) > 2 and len(value) in (config.get(key) for key in DEPTHS):
            small[key] = value[: sizes["num_hidden_layers"]]
        elif key in sizes and (value is not None or key == "head_dim") and not isinstance(value, bool):
            few = isinstance(value, list) and not isinstance(sizes[key], list)
            small[key] = [sizes[key]] * len(value) if few else sizes[key]
        elif isinstance(value, dict):
            small[key] = shrunk_rope(value)
        else:
            small[key] = value
    if sizes is not TOWER:
        small |= {key: window for key in ("sliding_window", "attention_chunk_size") if small.get(key)}
    return small


def shrunk_rope(rope: dict) -> dict:
    """Rotary parameters for heads of eight; those of each kind of layer are within."""
    rope = {key: shrunk_rope(value) if isinstance(value, dict) else value for key, value in rope.items()}
    if "mrope_section" in rope:
        rope["mrope_section"] = [2, 1, 1]
    return rope


def built(kind: type, config: Any, attention: str) -> Any:
    """A random model of which images matter: weights as large as trained ones."""
    torch.manual_seed(0)
    try:
        model = kind._from_config(config, attn_implementation=attention).eval().float()
    except ValueError:  # a tower that knows no sdpa
        model = kind._from_config(
            config, attn_implementation={"text_config": attention, "vision_config": "eager"}
        ).eval()
    for name, weight in model.named_parameters():
        if weight.ndim > 1 and "norm" not in name:
            fan = weight[0].numel() if weight.ndim == 2 else weight.shape[-1]
            weight.data.normal_(std=1.0 if "embed_tokens" in name else fan**-0.5)
    settings = model.generation_config
    settings.eos_token_id, settings.pad_token_id, settings.suppress_tokens = None, 0, list(range(88, 128))
    return model


def families(decoders: bool) -> Iterator[tuple[str, type, Any]]:
    """(name, class, a function from a window to a small config)"""
    seen = set()
    for name, class_name in modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.items():
        kind = getattr(hf, class_name, None)
        if kind is None or class_name in seen:
            continue
        seen.add(class_name)
        base = kind.config_class
        sizes = {**SIZES, **OWN.get(name, {})}
        yield name, kind, lambda w, base=base, sizes=sizes: base.from_dict(shrunk(base().to_dict(), w, sizes))
    for name in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if decoders else ():
        text = hf.models.auto.configuration_auto.CONFIG_MAPPING[name]
        tower = dict(TOWER, model_type="clip_vision_model")
        yield (
            f"LLaVA on {name}",
            hf.LlavaForConditionalGeneration,
            lambda window, text=text, tower=tower, sizes={**SIZES, **OWN.get(name, {})}: hf.LlavaConfig(
                text_config={**shrunk(text().to_dict(), window, sizes), "model_type": text.model_type},
                vision_config=tower,
                image_token_index=IMAGE,
            ),
        )


def prompts(*shapes: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """A left-padded batch; (3, 5) is three tokens of text, an image of six, five tokens."""
    draw = torch.Generator().manual_seed(len(shapes))
    text = lambda count: torch.randint(3, 85, (count,), generator=draw).tolist()
    rows = [
        list(itertools.chain(text(shape[0]), *([IMAGE] * 6 + text(more) for more in shape[1:]))) for shape in shapes
    ]
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    return {"input_ids": ids, "attention_mask": torch.tensor([[0] * (longest - len(r)) + [1] * len(r) for r in rows])}


@contextlib.contextmanager
def masked(model: Any, layer: int, frozen: tuple) -> Iterator[None]:
    """From `layer` on, no row of text sees an image; in `frozen` layers visual rows come out as they came. No cache."""
    seen: Any = None

    def mark(module: Any, args: tuple, kwargs: dict) -> None:
        nonlocal seen
        seen = kwargs["input_ids"] == IMAGE

    def forbid(module: Any, args: tuple, kwargs: dict) -> tuple:
        mask, tokens = kwargs["attention_mask"], seen.shape[1]
        if mask is None:
            mask = torch.ones(tokens, tokens, dtype=torch.bool)[None, None]
            mask = mask.tril() if getattr(module.self_attn, "is_causal", True) else mask
        hidden = seen[:, None, None, :] & ~seen[:, None, :, None]
        lowest = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
        return args, {**kwargs, "attention_mask": mask.expand(len(seen), -1, -1, -1).masked_fill(hidden, lowest)}

    def unchanged(module: Any, args: tuple, kwargs: dict, output: Any) -> Any:
        came = args[0] if args else kwargs["hidden_states"]
        made = output[0] if isinstance(output, tuple) else output
        made = torch.where(seen[..., None], came, made)
        return (made, *output[1:]) if isinstance(output, tuple) else made

    with contextlib.ExitStack() as handles:
        handles.callback(model.register_forward_pre_hook(mark, with_kwargs=True).remove)
        for index, module in enumerate(anatomy(model, IMAGE).layers):
            if index >= layer:
                handles.callback(module.register_forward_pre_hook(forbid, with_kwargs=True).remove)
            if index in frozen:
                handles.callback(module.register_forward_hook(unchanged, with_kwargs=True).remove)
        yield


def said(model: Any, inputs: dict, tokens: int = TOKENS, **options: Any) -> Any:
    options = {"do_sample": False, "max_new_tokens": tokens, "output_logits": True, **options}
    return model.generate(**inputs, return_dict_in_generate=True, **options)


def agree(ours: Any, theirs: Any) -> bool:
    """The same tokens, and the same logits where these are given step by step."""
    if not torch.equal(ours.sequences, theirs.sequences):
        return False
    pairs = zip(ours.logits, theirs.logits)
    return all(float((a - b).abs().max()) <= TOLERANCE * float(b.abs().max()) for a, b in pairs)


def cases(model: Any, layer: int, frozen: tuple, tokens: int) -> Iterator[tuple[str, bool]]:
    """(case, whether it is right) of one method. tokens: how many to compare; one where only the prompt can be."""
    enter = lambda: freeze(model, frozen, layer, IMAGE) if frozen else withdraw(model, layer, IMAGE)
    one, batch, text = prompts((3, 2, 5)), prompts((7,), (3, 5), (2, 4, 5)), prompts((2, 6))
    for name, inputs, options in (("single", one, {}), ("batch", batch, {}), ("beams", one, {"num_beams": 3})):
        with enter():  # first, for the masks have no lines for what the plug refuses
            found = said(model, inputs, tokens, **options)
        with masked(model, layer, frozen):
            expected = said(model, inputs, tokens, use_cache=False, **options)
        if options:  # logits come by beam
            yield name, torch.equal(found.sequences, expected.sequences)
        else:
            yield name, agree(found, expected)
    if tokens == 1:
        return
    with enter():
        first = said(model, one)
        ids = torch.cat([first.sequences, text["input_ids"]], 1)
        longer = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        cache = "cache" if "cache" in first else "past_key_values"
        second = said(model, {**longer, cache: first[cache]})
    with masked(model, layer, frozen):
        yield "second turn", agree(second, said(model, longer, use_cache=False))


def verdict(kind: type, config: Any) -> dict[str, str]:
    """For withdrawal and for freezing: right, refused (why), WRONG (where), crashed (why), or not built (why)."""
    found: dict[str, list] = {"withdraw": [], "freeze": []}
    tried: list[str] = []
    methods = [("withdraw", WINDOW, layer, ()) for layer in (0, 3, LAYERS - 1)]
    methods += [("withdraw", 512, 3, ()), ("freeze", 512, LAYERS, (1, 4)), ("freeze", 512, 4, (0, 3))]
    methods += [("freeze", WINDOW, 4, (1, 2))]
    try:
        with torch.device("meta"):  # which costs nothing
            model = kind(config(512))
    except Exception as error:  # not this project's
        return dict.fromkeys(found, f"not built: {type(error).__name__}: {one_line(error)}")
    try:
        anatomy(model, IMAGE)
    except InputError as error:
        return dict.fromkeys(found, f"refused: {error}")
    if (count := sum(weight.numel() for weight in model.parameters())) > MOST_WEIGHTS:
        return dict.fromkeys(found, f"not built: {count / 1e6:.0f} million weights when small")
    for attention, (method, window, layer, frozen) in itertools.product(("sdpa", "eager"), methods):
        try:
            model = built(kind, config(window), attention)
            cached, whole = said(model, prompts((3, 2, 5))), said(model, prompts((3, 2, 5)), use_cache=False)
        except Exception as error:  # not this project's
            if "does not support an attention implementation" in str(error) and attention == "sdpa":
                continue
            return dict.fromkeys(found, f"not built: {type(error).__name__}: {one_line(error)}")
        tried.append(method)
        where = f"{attention}, K = {layer}{f', frozen {frozen}' if frozen else ''}, window {window}"
        try:
            tokens = TOKENS if agree(cached, whole) else 1  # whole prompts seen from both sides change as they grow
            right = cases(model, layer, frozen, tokens)
            found[method] += [f"WRONG: {case}, {where}" for case, is_right in right if not is_right]
        except InputError as error:
            found[method].append(f"refused: {error}")
        except Exception as error:
            found[method].append(f"crashed: {type(error).__name__}: {one_line(error)} ({where})")
    return {method: summary(texts, tried.count(method)) for method, texts in found.items()}


def summary(texts: list[str], count: int) -> str:
    """The worst of what was found for a method."""
    for word in ("WRONG", "crashed"):
        if bad := [text for text in texts if text.startswith(word)]:
            return bad[0]
    return "right" if not texts else texts[0] if len(texts) == count else f"right, or {texts[0]}"


def table(found: dict[str, dict[str, str]]) -> str:
    """Markdown: which families are right, refused and why, or could not be built."""
    kinds: dict[str, list[str]] = collections.defaultdict(list)
    for name, verdicts in found.items():
        text, frozen = verdicts["withdraw"], verdicts["freeze"]
        word = text.split(":")[0]
        if word == "right" and frozen.startswith("refused"):
            word = "right, but cannot be frozen"
        elif word == "right" and "refused" in frozen:
            word = "right; layers with a window cannot be frozen for longer conversations"
        why = (
            re.sub(r"^refused: \w+ (is not understood: )?(is not supported: )?", ": ", text)
            if word == "refused"
            else ""
        )
        kinds[word].append(name + why)
    rows = [
        f"| {word} | {len(names)} | {'; '.join(names) if word == 'refused' else ', '.join(names)} |"
        for word, names in kinds.items()
    ]
    head = f"transformers {hf.__version__}: {len(found)} of {len(list(families(False)))} families\n\n| | | |\n| --- | ---: | --- |\n"
    return head + "\n".join(sorted(rows)) + "\n"


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]


def main(arguments: list[str]) -> int:
    options = argparse.ArgumentParser(prog="tests.sweep_families", description=__doc__.splitlines()[0])
    options.add_argument("--decoders", action="store_true", help="LLaVA around every language model, too")
    options.add_argument("--only", nargs="+", metavar="NAME", help="these families")
    options.add_argument("--log", type=pathlib.Path, metavar="FILE", help="what was found; an interrupted run resumes")
    options.add_argument("--docs", action="store_true", help="write the table of chapter 9")
    chosen = options.parse_args(arguments)
    torch.set_num_threads(1)
    hf.logging.set_verbosity(50)
    warnings.simplefilter("ignore")
    logged = chosen.log is not None and chosen.log.exists()
    known = json.loads(chosen.log.read_text(encoding="utf-8")) if logged else {}
    found, counts = {}, collections.Counter()
    for name, kind, config in families(chosen.decoders or bool(chosen.only)):
        if chosen.only and name not in chosen.only:
            continue
        found[name] = known[name] if name in known else verdict(kind, config)
        if chosen.log:
            chosen.log.write_text(json.dumps({**known, **found}, indent=1), encoding="utf-8")
        for method, text in found[name].items():
            counts[method, text.split(":")[0].split(",")[0]] += 1
        print(f"{name:<28} {found[name]['withdraw']:<60} | {found[name]['freeze']}", flush=True)
    for (method, word), count in sorted(counts.items()):
        print(f"{method:<10} {word:<10} {count}")
    if chosen.docs:
        page = PAGE.read_text(encoding="utf-8")
        before, after = page.split("<!-- families -->\n")[0], page.split("<!-- end of families -->")[1]
        made = f"{before}<!-- families -->\n{table(found)}<!-- end of families -->{after}"
        PAGE.write_text(made, encoding="utf-8")
    return int(any(word in ("WRONG", "crashed") for _, word in counts))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
