"""The decoder's stages: it learns to answer; to answer without visual tokens in deep layers; places and second turns.

*plain*: no token is ever withdrawn. The tower stays as it is: its features are the image. Besides answering, the model
learns to name and to point (pointing.py).

*withdrawal*: each step picks a layer K at random and runs the layers from K on twice, with and without visual tokens.
Both readings answer for the questions, and the withdrawn one is drawn towards what the other said (self-distillation):
the first K layers learn to hand all that an answer needs to the text tokens. The layers before K are run once for both.

*places*: the same, from an exported model on, with more to ask: places, chats of several turns, counts in crowds. In
some steps the reading that is withdrawn at K has lost half of its visual tokens, at random, before an earlier layer.
"""

import pathlib
from typing import NamedTuple

import numpy as np
import torch
from lessons import GROUPS, PLACES_GROUPS
from llama import State, keep, withdraw
from model import Llava, load_checkpoint, load_exported
from optimiser import HAS_BFLOAT16, build_optimisers
from passes import (
    answer_logits,
    answer_loss,
    compile_layers,
    divergence,
    run_layers,
    start_state,
    targets_and_weights,
)
from pointing import PointingLlava, plain_loss, words_of
from pool import Pool
from runs import Run
from score import Examination
from tokenizer import exported_tokenizer, tokenizer_of
from torch import Tensor
from tower import normalise
from turns import TurnMaker, Turns

EMBEDDED = pathlib.Path(__file__).parents[1] / "minivtw-tiny"
MUON, ADAM = 0.01, 3e-3  # rates of the decoder and the connector
MEASURE_EVERY = 5 * 60  # seconds
# How often each K is drawn: those at which withdrawal is worth having and hard come most often.
LAYERS_DRAWN = {4: 3, 5: 8, 6: 4, 7: 2, 8: 2, 9: 1, 10: 1, 11: 1}
HALVED_BEFORE = 4  # the last layer before which half of the visual tokens may be dropped
DISTILLATION = 2.0  # weight of the divergence against that of the answers


class Stage(NamedTuple):
    batch: int  # images, each with the questions of its lessons
    rate: float  # the share of MUON and ADAM at which it begins
    halved: float  # the share of steps in which half of the visual tokens are dropped first


STAGES = {
    "plain": Stage(batch=16, rate=1.0, halved=0.0),
    "withdrawal": Stage(batch=16, rate=0.5, halved=0.0),
    "places": Stage(batch=8, rate=0.2, halved=0.25),
}


class Reduction(NamedTuple):
    """What a step takes from one of its two readings."""

    halved_before: int | None  # the layer before which half of the visual tokens are dropped, at random
    withdrawn_before: int  # the layer before which those that are left are withdrawn


def draw_reduction(rng: np.random.Generator, halved: float) -> Reduction:
    odds = np.array([*LAYERS_DRAWN.values()]) / sum(LAYERS_DRAWN.values())
    layer = int(rng.choice(list(LAYERS_DRAWN), p=odds))
    return Reduction(int(rng.integers(min(layer, HALVED_BEFORE + 1))) if rng.random() < halved else None, layer)


def halve(state: State, visual: slice) -> tuple[State, slice]:
    """Half of the visual tokens go on, the same ones in every picture; and the run in which they stand now."""
    chosen = torch.randperm(visual.stop - visual.start)[: (visual.stop - visual.start) // 2].sort().values
    before, behind = torch.arange(visual.start), torch.arange(visual.stop, state.layout.prefix)
    halved = keep(state, torch.cat([before, visual.start + chosen, behind]))
    return halved, slice(visual.start, visual.start + len(chosen))


def reduced_loss(
    model: Llava, features: Tensor, turns: Turns, visual: slice, reduction: Reduction
) -> dict[str, Tensor]:
    """The answers with all visual tokens and with fewer, and how far the two are apart."""
    last, layer = model.text.num_hidden_layers, reduction.withdrawn_before
    parting = layer if reduction.halved_before is None else reduction.halved_before  # until here both are one
    shared = run_layers(model, start_state(model, features, turns, visual), 0, parting)
    whole = answer_logits(model, run_layers(model, shared, parting, last), turns)
    if parting < layer:
        shared, visual = halve(shared, visual)
        shared = run_layers(model, shared, parting, layer)
    withdrawn = answer_logits(model, run_layers(model, withdraw(shared, visual), layer, last), turns)
    solution = targets_and_weights(turns)
    losses = {"whole": answer_loss(whole, *solution), "withdrawn": answer_loss(withdrawn, *solution)}
    losses["kl"] = divergence(withdrawn, whole.detach())
    losses["loss"] = 0.5 * losses["whole"] + 0.5 * losses["withdrawn"] + DISTILLATION * losses["kl"]
    return losses


def beginning(folder: pathlib.Path, stage: str) -> tuple[Llava, TurnMaker]:
    """The model that a stage starts from, and what makes its batches."""
    if stage == "places":
        tokenizer = exported_tokenizer(EMBEDDED)
        tokenizer.save(str(folder / "tokenizer.json"))  # what `export.py` and `score.py` go by
        return load_exported(EMBEDDED), TurnMaker(tokenizer, groups=PLACES_GROUPS)
    maker = TurnMaker(tokenizer_of(folder), groups=GROUPS)
    if stage == "withdrawal":
        return load_checkpoint(folder / "plain.pt"), maker
    model = PointingLlava()
    model.load_tower(folder / "tower.pt")
    return model, maker


def train_decoder(run: Run, pool: Pool, stage: str) -> None:
    """Train one of the STAGES until the time is up."""
    chosen = STAGES[stage]
    model, maker = beginning(run.checkpoint.parent, stage)
    model.tower.requires_grad_(False)
    optimisers = build_optimisers(model, MUON * chosen.rate, ADAM * chosen.rate)
    run.resume(model, optimisers)
    words, visual = words_of(maker.tokenizer), maker.prefix.visual
    compile_layers()
    see = torch.compile(model.tower, dynamic=False)
    rng = np.random.default_rng([run.step, 6, run.worker])
    examination = Examination(maker, per_family=50)
    next_measure = run.seconds + MEASURE_EVERY
    while run.progress < 1:
        if run.step % 100 == 0:
            pool.refresh()
        pixels, things = pool.sample(rng, chosen.batch // run.workers)
        turns = maker.lessons(things, rng)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=HAS_BFLOAT16):
            features = see(normalise(torch.from_numpy(pixels)))
        if stage == "plain":
            losses = plain_loss(model, features, turns, torch.from_numpy(things), visual, words)
        else:
            losses = reduced_loss(model, features, turns, visual, draw_reduction(rng, chosen.halved))
        run.update(losses["loss"], model, optimisers)
        if run.step % 50 == 0:
            run.log("  ".join(f"{name} {loss.item():.4f}" for name, loss in losses.items()))
        if run.worker == 0 and (run.seconds > next_measure or run.progress >= 1):
            next_measure = run.seconds + MEASURE_EVERY
            run.log(examination.report(model, (None,) if stage == "plain" else (None, 5)))
            run.restart_clock()
    run.save(model, optimisers)
