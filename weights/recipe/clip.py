"""CLIP's vision tower in plain PyTorch, under its published tensor names. Axes: batch, patches, width, heads."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class VisionSizes(NamedTuple):
    """Names as in a CLIP vision config."""

    image_size: int = 128
    patch_size: int = 16
    hidden_size: int = 192
    intermediate_size: int = 576
    num_hidden_layers: int = 6
    num_attention_heads: int = 6
    layer_norm_eps: float = 1e-5

    @property
    def patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2


def joined_linear(hidden: Tensor, linears: list[nn.Linear]) -> list[Tensor]:
    """Several linears of one input; as one matrix product, unless they are more than a matrix and a bias."""
    if type(linears[0]) is not nn.Linear:
        return [linear(hidden) for linear in linears]
    weight = torch.cat([linear.weight for linear in linears])
    bias = None if linears[0].bias is None else torch.cat([linear.bias for linear in linears])
    return F.linear(hidden, weight, bias).split([linear.out_features for linear in linears], dim=-1)


class VisionAttention(nn.Module):
    """Bidirectional multi-head attention."""

    def __init__(self, sizes: VisionSizes):
        super().__init__()
        self.heads = sizes.num_attention_heads
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            setattr(self, name, nn.Linear(sizes.hidden_size, sizes.hidden_size))

    def forward(self, hidden: Tensor) -> Tensor:
        projections = joined_linear(hidden, [self.q_proj, self.k_proj, self.v_proj])
        queries, keys, values = (p.unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in projections)
        mixed = F.scaled_dot_product_attention(queries, keys, values)  # (batch, heads, tokens, head_dim)
        return self.out_proj(mixed.transpose(1, 2).flatten(2))


class VisionMLP(nn.Module):
    """Two linears around quick_gelu, x sigmoid(1.702 x)."""

    def __init__(self, sizes: VisionSizes):
        super().__init__()
        self.fc1 = nn.Linear(sizes.hidden_size, sizes.intermediate_size)
        self.fc2 = nn.Linear(sizes.intermediate_size, sizes.hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = self.fc1(hidden)
        return self.fc2(hidden * torch.sigmoid(1.702 * hidden))


class VisionLayer(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, sizes: VisionSizes):
        super().__init__()
        self.self_attn = VisionAttention(sizes)
        self.layer_norm1 = nn.LayerNorm(sizes.hidden_size, eps=sizes.layer_norm_eps)
        self.mlp = VisionMLP(sizes)
        self.layer_norm2 = nn.LayerNorm(sizes.hidden_size, eps=sizes.layer_norm_eps)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden + self.self_attn(self.layer_norm1(hidden))
        return hidden + self.mlp(self.layer_norm2(hidden))


class VisionEmbeddings(nn.Module):
    """A class token, then one token a patch, each with its learned position."""

    def __init__(self, sizes: VisionSizes):
        super().__init__()
        self.patch_size = sizes.patch_size
        self.class_embedding = nn.Parameter(torch.randn(sizes.hidden_size) * 0.02)
        self.patch_embedding = nn.Conv2d(3, sizes.hidden_size, sizes.patch_size, sizes.patch_size, bias=False)
        self.position_embedding = nn.Embedding(1 + sizes.patches, sizes.hidden_size)

    def forward(self, pixels: Tensor) -> Tensor:
        patches = F.unfold(pixels, self.patch_size, stride=self.patch_size).mT  # (batch, patches, 3 x side x side)
        patches = patches @ self.patch_embedding.weight.flatten(1).T  # (batch, patches, width)
        classes = self.class_embedding.expand(len(pixels), 1, -1)
        return torch.cat([classes, patches], dim=1) + self.position_embedding.weight


class VisionModel(nn.Module):
    """pixels (batch, 3, side, side) -> features of the last layer, class token dropped, (batch, patches, width)."""

    def __init__(self, sizes: VisionSizes):
        super().__init__()
        self.embeddings = VisionEmbeddings(sizes)
        self.pre_layrnorm = nn.LayerNorm(sizes.hidden_size, eps=sizes.layer_norm_eps)  # CLIP's spelling
        layers = nn.ModuleList(VisionLayer(sizes) for _ in range(sizes.num_hidden_layers))
        self.encoder = nn.ModuleDict({"layers": layers})
        # Part of every CLIP checkpoint; LLaVA reads the features before it, so it is never trained.
        self.post_layernorm = nn.LayerNorm(sizes.hidden_size, eps=sizes.layer_norm_eps)

    def forward(self, pixels: Tensor) -> Tensor:
        hidden = self.pre_layrnorm(self.embeddings(pixels))
        for layer in self.encoder["layers"]:
            hidden = layer(hidden)
        return hidden[:, 1:]
