"""The way of a batch of turns through the model, and what is made of its answers."""

import torch
import torch.nn.functional as F
from llama import DecoderLayer, State
from model import Llava
from optimiser import HAS_BFLOAT16
from torch import Tensor
from turns import Turns


def compile_layers() -> None:
    """Compile the decoder layer, once for all layers: a K costs no compilation of its own."""
    DecoderLayer.forward = torch.compile(DecoderLayer.forward, dynamic=False)


def run_layers(model: Llava, state: State, first: int, last: int) -> State:
    """`Decoder.run` with the matrix products in bfloat16 where that is fast; the residual stream stays float32."""
    with torch.autocast("cpu", torch.bfloat16, enabled=HAS_BFLOAT16):
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
