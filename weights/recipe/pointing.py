"""What stage two learns besides answering: to name what a visual token shows, and to point at what a question names.

To find what a question names is what all questions have in common and what is learnt last from answers alone; a map of
64 patches teaches it better than a yes or no does. Nothing of this is left in the finished model.
"""

import pathlib
from typing import NamedTuple

import torch
import torch.nn.functional as F
from llama import State
from model import Llava
from passes import answer_logits, answer_loss, run_layers, start_state, targets_and_weights
from pool import COLOR_NAMES, KINDS
from tokenizers import Tokenizer
from torch import Tensor
from tower import patch_targets
from turns import ANY, Turns
from world import CANVAS

POINTING_LAYER = 4  # it is before this layer that the model points
WEIGHTS = {"answers": 1.0, "pointing": 3.0, "placing": 1.0, "naming": 0.3}  # of the parts of the loss


class Words(NamedTuple):
    """The token ids of the words that name what a patch shows, in the order of KINDS and COLOR_NAMES."""

    kinds: Tensor
    colors: Tensor


def words_of(tokenizer: Tokenizer) -> Words:
    ids = lambda names: torch.tensor([tokenizer.token_to_id(f"\u0120{name}") for name in names])  # " star"
    return Words(ids(KINDS), ids(COLOR_NAMES))


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

    def load_tower(self, checkpoint: pathlib.Path) -> None:
        saved = torch.load(checkpoint, weights_only=True)["model"]
        mine = "tower."
        self.tower.load_state_dict({name.removeprefix(mine): t for name, t in saved.items() if name.startswith(mine)})

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
