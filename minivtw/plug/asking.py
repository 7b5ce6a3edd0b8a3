"""A transformers model on questions of your own: the layer, the answers with and without, and what was saved."""

from collections.abc import Iterable
from typing import Any

import torch
import transformers

from ..calibrate import curve_table
from ..checkpoints.hub import model_folder
from ..checkpoints.stored import STORED, check_storable, store
from ..cli.terminal import one_line, progress_line
from ..errors import InputError
from ..inputs.questions import digest, read_questions
from .calibration import calibrate, inputs_of
from .contexts import withdraw
from .shapes import SHAPES
from .timing import prepared


def asked(chosen: Any) -> dict[str, Any]:
    """Find K on a folder of questions, and answer each with and without the image from there on.

    Returns what `calibrate` does and, beside it, `answers`, and the shares of `flops` (None: not known) and of `cache`
    that withdrawal leaves. Stores what `calibrate` gives. Raises InputError.
    """
    if chosen.model in SHAPES:
        raise InputError(f"{chosen.model} has random weights, which no question tells anything about; name a model")
    folder = model_folder(chosen.model)
    if chosen.store:
        check_storable(folder)
    samples = read_questions(chosen.samples or folder / "samples", most=chosen.limit)
    model, processor = prepared(chosen), processor_of(folder)
    pairs = [(one.image, chosen.prompt.replace("{}", one.question)) for one in samples]
    progress = progress_line(2 * len(samples))
    found = calibrate(model, processor, pairs, chosen.threshold, progress)
    found["samples"]["sha256"] = digest(samples)
    answers, took = [], []
    for done, (one, pair) in enumerate(zip(samples, pairs), len(samples) + 1):
        inputs = inputs_of(model, processor, pair)
        plain = answered(model, processor, inputs, chosen.new_tokens)
        with withdraw(model, found["withdraw_layer"]) as told:
            said = answered(model, processor, inputs, chosen.new_tokens)
        answers.append({"image": one.image, "question": one.question, "without": plain, "with": said})
        took += told
        progress(done)
    if chosen.store:
        store(folder, found)
    counted = [(one.flops, one.flops_without) for one in took if one.flops and one.flops_without]
    flops = divided(counted) if len(counted) == len(took) else None
    cache = divided([(one.cache_bytes, one.cache_bytes_without) for one in took])
    where = str(folder / STORED) if chosen.store else None
    return {**found, "answers": answers, "flops": flops, "cache": cache, "stored": where}


def divided(pairs: Iterable[tuple[int, int]]) -> float:
    """The sum of what came first over the sum of what came second."""
    part, whole = map(sum, zip(*pairs))
    return part / whole


def processor_of(folder: Any) -> Any:
    """What turns an image and a text into a model's inputs. Raises InputError."""
    try:
        return transformers.AutoProcessor.from_pretrained(folder)
    except (OSError, ValueError, ImportError) as error:
        raise InputError(f"cannot load the processor of {folder}: {str(error).splitlines()[0]}") from error


@torch.no_grad()
def answered(model: Any, processor: Any, inputs: Any, new_tokens: int) -> str:
    """The greedy answer."""
    ids = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
    return processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def report(found: dict[str, Any]) -> str:
    """The curve, the answers that change, and what was saved, as text."""
    changed = [one for one in found["answers"] if one["without"] != one["with"]]
    lines = [curve_table(found, "nats"), ""]
    lines += [f"{one_line(one['question'])} {one_line(one['without'])} -> {one_line(one['with'])}" for one in changed]
    operations = "" if found["flops"] is None else f"{found['flops']:.0%} of the operations and "
    count = len(found["answers"])
    lines.append(
        f"{count - len(changed)} of {count} answers are the same, with {operations}{found['cache']:.0%} of the cache"
    )
    return "\n".join(
        [*lines, f"stored in {found['stored']}" if found["stored"] else "nothing stored; --store does that"]
    )
