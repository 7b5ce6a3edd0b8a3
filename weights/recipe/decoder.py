"""Stages two and three: the decoder learns to answer; then it learns to answer without visual tokens in deep layers.

*plain*: no token is ever withdrawn. The tower stays as it is: its features are the image. Besides answering, the model
learns to *point*: where a question says `red star`, a linear layer reads from the hidden state at `star`, after a third
of the layers, which patches show one, and where its centre is. To find what a question names is what all questions have
in common and what is learnt last from answers alone; a map of 64 patches teaches it better than a yes or no does. The
linear layer is dropped in the end.

*withdrawal*: each step picks a layer K at random and runs the layers from K on twice, with and without visual tokens.
Both readings answer for the questions, and the withdrawn one is drawn towards what the other said (self-distillation):
the first K layers learn to hand all that an answer needs to the text tokens. The layers before K are run once for both.
"""

import pathlib
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from model import DecoderLayer, Llava, State, withdraw
from optimiser import build_optimisers
from pool import COLOR_NAMES, KINDS, Pool
from runs import Run
from scenes import CANVAS
from tokenizer import tokenizer_of
from tower import normalise, patch_targets
from turns import ANY, TurnMaker, Turns

BATCH = 16  # images, each with 16 questions
MUON, ADAM = 0.01, 3e-3  # rates of the decoder and the connector
WITHDRAWAL_SHARE = 0.5  # of these rates, in the last stage
MEASURE_EVERY = 5 * 60  # seconds
# How often each K is drawn: those at which withdrawal is worth having and hard come most often.
LAYERS_DRAWN = {4: 3, 5: 8, 6: 4, 7: 2, 8: 2, 9: 1, 10: 1, 11: 1}
POINTING_LAYER = 4  # it is before this layer that the model points
WEIGHTS = {"answers": 1.0, "pointing": 3.0, "placing": 1.0, "naming": 0.3}  # of the parts of plain's loss
DISTILLATION = 2.0  # weight of the divergence against that of the answers


def compile_layers() -> None:
    """Compile the decoder layer, once for all layers: a K costs no compilation of its own."""
    DecoderLayer.forward = torch.compile(DecoderLayer.forward, dynamic=False)


def run_layers(model: Llava, state: State, first: int, last: int) -> State:
    """`Decoder.run` with the matrix products in bfloat16 (the residual stream stays float32): 1.6 times as fast."""
    with torch.autocast("cpu", torch.bfloat16):
        return model.decoder.run(state, first, last)


def start_state(model: Llava, features: Tensor, turns: Turns, visual: slice) -> State:
    embedded = model.embed(torch.from_numpy(turns.ids), features, visual)
    return model.decoder.start(embedded, torch.from_numpy(turns.positions), turns.layout)


def answer_logits(model: Llava, state: State, turns: Turns) -> Tensor:
    """The logits (answer tokens of the batch, vocabulary) that predict the tokens with a weight.

    All of a state's tokens behind the prefix stand where they stand in `turns`, however short the prefix has become.
    """
    behind = turns.layout.prefix
    predicted = torch.from_numpy(turns.weights[:, behind:] > 0)  # (batch, tokens of turns)
    hidden = state.hidden[:, state.layout.prefix :]
    return model.logits(hidden[:, :-1][predicted[:, 1:]])


def targets_and_weights(turns: Turns) -> tuple[Tensor, Tensor]:
    """Of the tokens with a weight, in the order of `answer_logits`."""
    behind = turns.layout.prefix
    weights = torch.from_numpy(turns.weights[:, behind:])
    return torch.from_numpy(turns.ids[:, behind:])[weights > 0], weights[weights > 0]


def answer_loss(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    return (F.cross_entropy(logits, targets, reduction="none") * weights).sum() / weights.sum()


def divergence(withdrawn: Tensor, whole: Tensor) -> Tensor:
    """KL(whole || withdrawn) of next-token distributions, mean over the answer tokens."""
    return F.kl_div(withdrawn.log_softmax(-1), whole.log_softmax(-1), log_target=True, reduction="batchmean")


class Words(NamedTuple):
    """The token ids of the words that name what a patch shows, in the order of KINDS and COLOR_NAMES."""

    kinds: Tensor
    colors: Tensor


def naming_loss(model: Llava, features: Tensor, things: Tensor, words: Words) -> Tensor:
    """How badly the visual tokens, read as words by the tied head, name the kind and colour of their objects.

    LLaVA aligns its connector to the language model's words first; here the words are learnt beside it. Once a visual
    token of a red star lies near the words `red` and `star`, a question finds it by attending to what is alike.
    """
    targets = patch_targets(things, round(features.shape[1] ** 0.5))
    owned = targets["owned"] > 0  # (batch, patches)
    visual = model.multi_modal_projector(features)[owned]  # (owned patches, width)
    named = model.logits(visual)  # (owned patches, vocabulary)
    kinds, colors = named[:, words.kinds], named[:, words.colors]
    return F.cross_entropy(kinds, targets["kind"][owned]) + F.cross_entropy(colors, targets["color"][owned])


class PointingLlava(Llava):
    """The model with the layer by which it points: hidden (..., width) -> logits of the patches, and a place (x, y)."""

    def __init__(self):
        super().__init__()
        self.pointer = torch.nn.Linear(self.text.hidden_size, self.vision.patches + 2)
        torch.nn.init.constant_(self.pointer.bias[: self.vision.patches], -2.5)  # few patches show what is named

    def point(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        return self.pointer(F.rms_norm(hidden, hidden.shape[-1:])).split((self.vision.patches, 2), dim=-1)


def is_named(kinds: Tensor, colors: Tensor, nouns: Tensor) -> Tensor:
    """Which things (or patches) each noun phrase names: twice (batch, things) -> (nouns, things)."""
    rows, _, kind, color = nouns.unbind(1)  # each (nouns,)
    of_kind = (kind[:, None] == ANY) | (kind[:, None] == kinds[rows])
    return of_kind & ((color[:, None] == ANY) | (color[:, None] == colors[rows]))


def pointing_loss(model: PointingLlava, state: State, turns: Turns, things: Tensor) -> tuple[Tensor, Tensor]:
    """How far the noun phrases of a batch are from pointing at the patches that show what they name, and how far from
    the place of its centre, where they name one thing."""
    nouns = torch.from_numpy(turns.nouns)
    rows, tokens = nouns[:, 0], nouns[:, 1]
    map_logits, places = model.point(state.hidden[rows, tokens])
    patches = patch_targets(things, model.vision.image_size // model.vision.patch_size)
    shown = is_named(patches["kind"], patches["color"], nouns) & (patches["owned"][rows] > 0)  # (nouns, patches)
    named = is_named(things[..., 0], things[..., 1], nouns) & (things[rows, :, 0] >= 0)  # (nouns, things)
    centers = things[rows, named.int().argmax(1), 2:4] / (CANVAS / 2) - 1  # (nouns, 2), of the first thing named
    alone = named.sum(1) == 1
    pointing = F.binary_cross_entropy_with_logits(map_logits, shown.float())
    return pointing, F.smooth_l1_loss(places[alone], centers[alone], beta=0.1)


def plain_loss(
    model: PointingLlava, features: Tensor, turns: Turns, things: Tensor, visual: slice, words: Words
) -> dict[str, Tensor]:
    state = run_layers(model, start_state(model, features, turns, visual), 0, POINTING_LAYER)
    losses = dict(zip(("pointing", "placing"), pointing_loss(model, state, turns, things)))
    state = run_layers(model, state, POINTING_LAYER, model.text.num_hidden_layers)
    losses["answers"] = answer_loss(answer_logits(model, state, turns), *targets_and_weights(turns))
    losses["naming"] = naming_loss(model, features, things, words)
    losses["loss"] = sum(weight * losses[name] for name, weight in WEIGHTS.items())
    return losses


def withdrawal_loss(model: Llava, features: Tensor, turns: Turns, visual: slice, layer: int) -> dict[str, Tensor]:
    """The answers with and without visual tokens from `layer` on, and how far the two are apart."""
    last = model.text.num_hidden_layers
    at_layer = run_layers(model, start_state(model, features, turns, visual), 0, layer)
    whole = answer_logits(model, run_layers(model, at_layer, layer, last), turns)
    withdrawn = answer_logits(model, run_layers(model, withdraw(at_layer, visual), layer, last), turns)
    solution = targets_and_weights(turns)
    losses = {"whole": answer_loss(whole, *solution), "withdrawn": answer_loss(withdrawn, *solution)}
    losses["kl"] = divergence(withdrawn, whole.detach())
    losses["loss"] = 0.5 * losses["whole"] + 0.5 * losses["withdrawn"] + DISTILLATION * losses["kl"]
    return losses


def load_model(checkpoint: pathlib.Path) -> Llava:
    """The model of a checkpoint of these stages, without the layer by which it pointed."""
    saved = torch.load(checkpoint, weights_only=True)["model"]
    model = Llava()
    model.load_state_dict({name: tensor for name, tensor in saved.items() if not name.startswith("pointer.")})
    return model


def load_tower(model: Llava, checkpoint: pathlib.Path) -> None:
    saved = torch.load(checkpoint, weights_only=True)["model"]
    mine = "tower."
    model.tower.load_state_dict({name.removeprefix(mine): t for name, t in saved.items() if name.startswith(mine)})


def train_decoder(run: Run, pool: Pool, stage: str) -> None:
    """Train stage `plain` (from the tower's checkpoint) or `withdrawal` (from plain's) until the time is up."""
    from score import Examination  # here, because scoring uses this file's way through the model

    folder = run.checkpoint.parent
    maker = TurnMaker(tokenizer_of(folder))
    if stage == "plain":
        model = PointingLlava()
        load_tower(model, folder / "tower.pt")
    else:
        model = load_model(folder / "plain.pt")
    model.tower.requires_grad_(False)
    share = 1.0 if stage == "plain" else WITHDRAWAL_SHARE
    optimisers = build_optimisers(model, MUON * share, ADAM * share)
    run.resume(model, optimisers)
    token_ids = lambda names: torch.tensor([maker.tokenizer.token_to_id(f"\u0120{name}") for name in names])  # " star"
    words = Words(token_ids(KINDS), token_ids(COLOR_NAMES))
    compile_layers()
    see = torch.compile(model.tower, dynamic=False)
    rng = np.random.default_rng([run.step, 6, run.worker])
    examination = Examination(maker, per_family=100)
    drawn, odds = list(LAYERS_DRAWN), np.array([*LAYERS_DRAWN.values()]) / sum(LAYERS_DRAWN.values())
    next_measure = run.seconds + MEASURE_EVERY
    while run.progress < 1:
        pixels, things = pool.sample(rng, BATCH // run.workers)
        turns = maker.lessons(things, rng)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            features = see(normalise(torch.from_numpy(pixels)))
        if stage == "plain":
            losses = plain_loss(model, features, turns, torch.from_numpy(things), maker.prefix.visual, words)
        else:
            losses = withdrawal_loss(model, features, turns, maker.prefix.visual, int(rng.choice(drawn, p=odds)))
        run.update(losses["loss"], model, optimisers)
        if run.step % 50 == 0:
            run.log("  ".join(f"{name} {loss.item():.4f}" for name, loss in losses.items()))
        if run.worker == 0 and (run.seconds > next_measure or run.progress >= 1):
            next_measure = run.seconds + MEASURE_EVERY
            run.log(examination.report(model, (None,) if stage == "plain" else (None, 5)))
            run.restart_clock()
    run.save(model, optimisers)
