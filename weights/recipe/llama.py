"""A Llama decoder that can leave tokens behind, in plain PyTorch, under its published tensor names.

Only what training needs is here: no cache, no generation. Axes: batch, tokens, width, heads, kv_heads, head_dim.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from clip import joined_linear
from torch import Tensor, nn


class TextSizes(NamedTuple):
    """Names as in a Llama config."""

    vocab_size: int = 512
    hidden_size: int = 128
    intermediate_size: int = 320
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    num_key_value_heads: int = 2
    head_dim: int = 32
    rope_theta: float = 10_000.0
    rms_norm_eps: float = 1e-5
    max_position_embeddings: int = 4096


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + self.eps) * self.weight


def rotary_angles(positions: Tensor, sizes: TextSizes) -> tuple[Tensor, Tensor]:
    """Cosines and sines for positions (batch, tokens), each (batch, 1, tokens, head_dim)."""
    exponents = torch.arange(0, sizes.head_dim, 2) / sizes.head_dim
    angles = positions[:, None, :, None] * sizes.rope_theta**-exponents
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def rotate(heads: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Rotary positions in the half-rotation layout (RoFormer, as laid out in Hugging Face Llama)."""
    first, second = heads.chunk(2, dim=-1)
    return heads * cosines + torch.cat([-second, first], dim=-1) * sines


class Layout(NamedTuple):
    """How a sequence is laid out: a prefix, then groups of turns behind it, each group (turns, tokens of a turn).

    A turn sees the prefix and itself, never another turn: it is what the only turn of a chat would be. So one image
    serves many questions, none of which can copy from the answers of the others.
    """

    prefix: int
    turns: tuple[tuple[int, int], ...]


class DecoderAttention(nn.Module):
    """Grouped-query attention, causal within the prefix and within each turn."""

    def __init__(self, sizes: TextSizes):
        super().__init__()
        self.head_dim, self.kv_heads = sizes.head_dim, sizes.num_key_value_heads
        self.group = sizes.num_attention_heads // sizes.num_key_value_heads
        queries, keys = sizes.num_attention_heads * sizes.head_dim, sizes.num_key_value_heads * sizes.head_dim
        self.q_proj = nn.Linear(sizes.hidden_size, queries, bias=False)
        self.k_proj = nn.Linear(sizes.hidden_size, keys, bias=False)
        self.v_proj = nn.Linear(sizes.hidden_size, keys, bias=False)
        self.o_proj = nn.Linear(queries, sizes.hidden_size, bias=False)

    def forward(self, hidden: Tensor, cosines: Tensor, sines: Tensor, layout: Layout) -> Tensor:
        projections = joined_linear(hidden, [self.q_proj, self.k_proj, self.v_proj])
        queries, keys, values = (p.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for p in projections)
        queries, keys = rotate(queries, cosines, sines), rotate(keys, cosines, sines)
        queries = queries.unflatten(1, (self.kv_heads, self.group)) * self.head_dim**-0.5
        before = keys[:, :, : layout.prefix], values[:, :, : layout.prefix]
        mixed = [self.attend(queries[..., : layout.prefix, :], None, *before, 1)]
        start = layout.prefix
        for turns, length in layout.turns:
            run = slice(start, start + turns * length)
            mixed.append(self.attend(queries[..., run, :], before, keys[:, :, run], values[:, :, run], turns))
            start = run.stop
        return self.o_proj(torch.cat(mixed, dim=1))

    def attend(
        self, queries: Tensor, before: tuple[Tensor, Tensor] | None, keys: Tensor, values: Tensor, turns: int
    ) -> Tensor:
        """Turns of one length, each over the keys and values `before` (all of them) and over itself (causally).

        queries (batch, kv_heads, group, turns x length, head_dim), keys and values the same without `group`
        -> (batch, turns x length, heads x head_dim)
        """
        queries = queries.unflatten(3, (turns, -1)).transpose(2, 3)  # (batch, kv_heads, turns, group, length, head_dim)
        keys, values = keys.unflatten(2, (turns, -1)), values.unflatten(2, (turns, -1))
        length = keys.shape[3]
        causal = torch.ones(length, length, dtype=torch.bool).tril().repeat(self.group, 1)  # (group x length, length)
        scores = (queries.flatten(3, 4) @ keys.mT).masked_fill(~causal, -1e9)
        if before is None:
            mixed = scores.softmax(-1) @ values
        else:
            earlier = (queries.flatten(2, 4) @ before[0].mT).unflatten(2, (turns, -1))
            earlier, own = torch.cat([earlier, scores], dim=-1).softmax(-1).split([earlier.shape[-1], length], dim=-1)
            mixed = (earlier.flatten(2, 3) @ before[1]).unflatten(2, (turns, -1)) + own @ values
        mixed = mixed.unflatten(3, (self.group, length))  # (batch, kv_heads, turns, group, length, head_dim)
        return mixed.permute(0, 2, 4, 1, 3, 5).flatten(3, 5).flatten(1, 2)


class DecoderMLP(nn.Module):
    """SwiGLU."""

    def __init__(self, sizes: TextSizes):
        super().__init__()
        self.gate_proj = nn.Linear(sizes.hidden_size, sizes.intermediate_size, bias=False)
        self.up_proj = nn.Linear(sizes.hidden_size, sizes.intermediate_size, bias=False)
        self.down_proj = nn.Linear(sizes.intermediate_size, sizes.hidden_size, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        gate, up = joined_linear(hidden, [self.gate_proj, self.up_proj])
        return self.down_proj(F.silu(gate) * up)


class DecoderLayer(nn.Module):
    def __init__(self, sizes: TextSizes):
        super().__init__()
        self.self_attn = DecoderAttention(sizes)
        self.mlp = DecoderMLP(sizes)
        self.input_layernorm = RMSNorm(sizes.hidden_size, sizes.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(sizes.hidden_size, sizes.rms_norm_eps)

    def forward(self, hidden: Tensor, cosines: Tensor, sines: Tensor, layout: Layout) -> Tensor:
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), cosines, sines, layout)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class State(NamedTuple):
    """What goes from layer to layer: hidden (batch, tokens, width), the rotary angles of its positions, its layout."""

    hidden: Tensor
    cosines: Tensor
    sines: Tensor
    layout: Layout


class Decoder(nn.Module):
    """Llama, without the head."""

    def __init__(self, sizes: TextSizes):
        super().__init__()
        self.sizes = sizes
        self.embed_tokens = nn.Embedding(sizes.vocab_size, sizes.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(sizes) for _ in range(sizes.num_hidden_layers))
        self.norm = RMSNorm(sizes.hidden_size, sizes.rms_norm_eps)

    def start(self, embedded: Tensor, positions: Tensor, layout: Layout) -> State:
        """embedded (batch, tokens, width) at `positions` (tokens) -> the state before layer 0."""
        return State(embedded, *rotary_angles(positions[None], self.sizes), layout)

    def run(self, state: State, first: int, last: int) -> State:
        """The state after the layers first ... last - 1."""
        for layer in self.layers[first:last]:
            state = state._replace(hidden=layer(*state))
        return state


def keep(state: State, tokens: Tensor) -> State:
    """Only these tokens of the prefix go on, and the turns behind it; all keep their positions."""
    behind = torch.arange(state.layout.prefix, state.hidden.shape[1])
    going = torch.cat([tokens, behind])
    layout = state.layout._replace(prefix=len(tokens))
    return State(state.hidden[:, going], state.cosines[:, :, going], state.sines[:, :, going], layout)


def withdraw(state: State, visual: slice) -> State:
    """Visual Tokens Withdrawal (arXiv 2405.05803): the run `visual` of the prefix leaves."""
    return keep(state, torch.cat([torch.arange(visual.start), torch.arange(visual.stop, state.layout.prefix)]))
