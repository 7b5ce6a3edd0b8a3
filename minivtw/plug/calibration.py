"""Which layer, for a transformers model: the paper's search (Lin et al. 2024, section 3.3), its beginnings shared.

What a candidate K does before layer K is what the model does anyway. So one pass with nothing withdrawn keeps the
input of every layer; from there, the candidates that have withdrawn already go through each layer as one batch.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn

from ..errors import InputError
from ..inputs.opening import open_image
from ..search.layer import ETA, choose_layer, divergence
from .anatomy import Anatomy, VisualIds, anatomy
from .calls import belongs_to_tokens, hidden_states, part_of
from .contexts import plugged
from .rows import Rows, all_keys, narrow_mask, rows_of, take


def calibrate(
    model: nn.Module,
    processor: Any,
    samples: Iterable,
    eta: float = ETA,
    progress: Callable[[int], object] = lambda done: None,
    visual_ids: VisualIds = None,
) -> dict:
    """The first layer before which withdrawal changes the next token by at most `eta`: KL(withdrawn || full), in nats.

    samples: pairs of an image (a path, a Pillow image, or a list of them) and a question, or mappings of ready inputs,
    which need no processor; visual_ids: as for `withdraw`. Returns what minivtw's withdrawal.json holds: `withdraw_layer`, and in `curve` each K's
    mean over the samples. Raises InputError for what is not understood, and where no layer is quiet enough.
    """
    curves = []
    for done, sample in enumerate(samples, 1):
        curves.append(kl_curve(model, inputs_of(model, processor, sample), visual_ids))
        progress(done)
    if not curves:
        raise InputError("calibration needs samples: pairs of an image and a question")
    curve, count = np.mean(curves, axis=0), {"count": len(curves)}
    layer = choose_layer(curve, "kl", eta)
    return {"withdraw_layer": layer, "criterion": "kl", "threshold": eta, "curve": curve.tolist(), "samples": count}


def inputs_of(model: Any, processor: Any, sample: Any) -> Mapping[str, Any]:
    """A sample as the model takes it: tensors where the model is, in its dtype."""
    if not isinstance(sample, Mapping):
        try:
            images, question = sample
        except (TypeError, ValueError):
            raise InputError(
                f"a sample must be an image and a question, or the model's inputs, not {sample!r}"
            ) from None
        if processor is None:
            raise InputError("samples of an image and a question need the model's processor")
        images = images if isinstance(images, list | tuple) else [images]
        sample = prompt(processor, [open_image(image) for image in images], question)
    return transformers.BatchFeature(dict(sample)).to(model.device, model.dtype)


def prompt(processor: Any, images: list, question: str) -> Any:
    """What a processor makes of images and a question, in its chat layout; without one, the question is the prompt."""
    tokenizer = getattr(processor, "tokenizer", None)
    template = getattr(processor, "chat_template", None) or getattr(tokenizer, "chat_template", None)
    try:
        if template is None:
            return processor(images=images, text=question, return_tensors="pt")
        content = [*({"type": "image", "image": image} for image in images), {"type": "text", "text": question}]
        turn = [{"role": "user", "content": content}]
        options = dict(tokenize=True, return_dict=True, return_tensors="pt")
        return processor.apply_chat_template(turn, template, add_generation_prompt=True, **options)
    except (TypeError, ValueError) as error:
        raise InputError(f"the processor {type(processor).__name__} cannot take a sample: {error}") from error


@torch.no_grad()
def kl_curve(model: Any, inputs: Mapping[str, Any], visual_ids: VisualIds = None) -> np.ndarray:
    """For each K from 0 to layers - 1: KL(withdrawn || full) of a prompt's next token. (layers,) float64, nats."""
    parts = anatomy(model, visual_ids)
    visual = parts.visual(inputs["input_ids"])  # (1, tokens)
    if len(visual) != 1 or not visual.any() or visual[0, -1]:
        raise InputError("a calibration sample must be one prompt with an image that ends with text")
    with plugged(model, len(parts.layers), (), visual_ids):  # refuses a model within a context
        full, entering = run_in_full(model, parts, inputs)
    rows = rows_of(~visual)
    hidden: Any = None
    memo: dict[Any, Any] = {}
    for layer, (states, kwargs) in zip(parts.layers, entering):
        joins = take(states, rows)  # (1, rows, width): the candidate that withdraws here
        hidden = joins if hidden is None else torch.cat([hidden, joins.to(hidden.device)])  # (candidates, rows, width)
        output = layer(hidden, **narrowed(kwargs, rows, memo))
        hidden = output[0] if isinstance(output, tuple) else output
    logits = head(model, parts, hidden[:, -1:])  # (layers, vocabulary)
    return divergence(*(scores.double().cpu().numpy() for scores in (logits, full)))


def run_in_full(model: Any, parts: Anatomy, inputs: Mapping[str, Any]) -> tuple[torch.Tensor, list[tuple]]:
    """One pass with nothing withdrawn: the last token's logits, (1, vocabulary); each layer's states and arguments."""
    entering: list[tuple] = []
    outputs: list[Any] = []
    keep = lambda layer, args, kwargs: entering.append((hidden_states(args, kwargs), kwargs))
    handles = [layer.register_forward_pre_hook(keep, with_kwargs=True) for layer in parts.layers]
    handles.append(parts.layers[-1].register_forward_hook(lambda layer, args, output: outputs.append(output)))
    try:
        can_skip = "logits_to_keep" in inspect.signature(model.forward).parameters
        full = model(**inputs, **({"logits_to_keep": 1} if can_skip else {}), use_cache=False).logits[:, -1]
    finally:
        for handle in handles:
            handle.remove()
    last = outputs[0][0] if isinstance(outputs[0], tuple) else outputs[0]
    if (head(model, parts, last[:, -1:]) - full).abs().max() > 1e-2 * full.abs().max():
        raise InputError(f"{parts.name} cannot be calibrated: its logits are more than a norm and a matrix")
    return full, entering


def head(model: Any, parts: Anatomy, hidden: torch.Tensor) -> torch.Tensor:
    """(candidates, 1, width) -> their logits, (candidates, vocabulary)."""
    return model.get_output_embeddings()(parts.decoder.norm(hidden))[:, 0]


def narrowed(kwargs: dict[str, Any], rows: Rows, memo: dict[Any, Any]) -> dict[str, Any]:
    """A layer's arguments, its states apart, for the rows that stay; layers of one kind share what is made."""
    changed = {name: value for name, value in kwargs.items() if name != "hidden_states"}
    mask = kwargs.get("attention_mask")
    if mask is not None:
        if id(mask) not in memo:
            text = all_keys(1, 0, rows.index.device).grown(rows, 0, mask.shape[-1])
            memo[id(mask)] = narrow_mask(mask, rows, text, mask.shape[-1])
        changed["attention_mask"] = memo[id(mask)]
    for name, value in kwargs.items():
        if belongs_to_tokens(name):
            changed[name] = memo.setdefault((name, id(value)), part_of(value, rows, name))
    return changed
