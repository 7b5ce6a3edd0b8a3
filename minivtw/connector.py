"""The connector: vision features become visual tokens of the decoder's width."""

from typing import NamedTuple

from .layers import ACTIVATIONS, Linear, mlp


class Connector(NamedTuple):
    """LLaVA 1.5's two-layer perceptron (Liu et al. 2023, arXiv 2310.03744)."""

    up: Linear  # (vision width, decoder width)
    down: Linear  # (decoder width, decoder width)
    activation: str  # a key of layers.ACTIVATIONS


def connect(connector, features):
    """features: (features, vision width). Returns visual tokens (features, decoder width)."""
    return mlp(features, connector.up, connector.down, ACTIVATIONS[connector.activation])
