"""The model in plain PyTorch: CLIP's vision tower, LLaVA's connector, a Llama decoder that can withdraw visual tokens.

Modules are nested so that `Llava().state_dict()` already has the tensor names of a LLaVA checkpoint, and the numbers
equal those of `transformers.LlavaForConditionalGeneration`. Only what training needs is here: no cache, no generation.
Axes: batch, tokens, patches, width, heads, kv_heads, head_dim, vocabulary.
"""

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


class Connector(nn.Module):
    """LLaVA's projector: features (batch, patches, vision width) -> visual tokens (batch, patches, text width)."""

    def __init__(self, vision: VisionSizes, text: TextSizes):
        super().__init__()
        self.linear_1 = nn.Linear(vision.hidden_size, text.hidden_size)
        self.linear_2 = nn.Linear(text.hidden_size, text.hidden_size)

    def forward(self, features: Tensor) -> Tensor:
        return self.linear_2(F.gelu(self.linear_1(features)))


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


def withdraw(state: State, visual: slice) -> State:
    """Visual Tokens Withdrawal: the run `visual` of the prefix leaves, the others keep their positions."""
    layout = state.layout._replace(prefix=state.layout.prefix - (visual.stop - visual.start))
    cosines, sines = without(state.cosines, visual, 2), without(state.sines, visual, 2)
    return State(without(state.hidden, visual, 1), cosines, sines, layout)


def without(tensor: Tensor, run: slice, axis: int) -> Tensor:
    """The tensor less a run of its entries along one axis."""
    after = tensor.shape[axis] - run.stop
    return torch.cat([tensor.narrow(axis, 0, run.start), tensor.narrow(axis, run.stop, after)], dim=axis)


class Llava(nn.Module):
    """Tower, connector and decoder under the tensor names of a LLaVA checkpoint; the head is tied to the embedding."""

    def __init__(self, vision: VisionSizes = VisionSizes(), text: TextSizes = TextSizes()):
        super().__init__()
        self.vision, self.text = vision, text
        self.vision_tower = nn.ModuleDict({"vision_model": VisionModel(vision)})
        self.multi_modal_projector = Connector(vision, text)
        self.language_model = nn.ModuleDict({"model": Decoder(text)})
        self.apply(initialise)
        initialise_residual(self.decoder)

    @property
    def tower(self) -> VisionModel:
        return self.vision_tower["vision_model"]

    @property
    def decoder(self) -> Decoder:
        return self.language_model["model"]

    def embed(self, token_ids: Tensor, features: Tensor, visual: slice) -> Tensor:
        """Token embeddings (batch, tokens, width), with the visual tokens of `features` at the run `visual`."""
        words, image = self.decoder.embed_tokens(token_ids), self.multi_modal_projector(features)
        return torch.cat([words[:, : visual.start], image, words[:, visual.stop :]], dim=1)

    def logits(self, hidden: Tensor) -> Tensor:
        """Of the last layer's output (batch, tokens, width): (batch, tokens, vocabulary)."""
        return self.decoder.norm(hidden) @ self.decoder.embed_tokens.weight.T


def initialise(module: nn.Module) -> None:
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        fan_in = module.weight[0].numel()
        nn.init.normal_(module.weight, std=fan_in**-0.5 * 0.7)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)


def initialise_residual(decoder: Decoder) -> None:
    """Let words be loud and layers silent at first, so that what a token is stays readable in the residual stream.

    Embeddings have the size 1 that every norm restores; what layers add starts at zero. The head is tied to these
    embeddings, so the last norm brings the logits back to a moderate size.
    """
    nn.init.normal_(decoder.embed_tokens.weight)
    nn.init.constant_(decoder.norm.weight, 0.05)
    for layer in decoder.layers:
        nn.init.zeros_(layer.self_attn.o_proj.weight)
        nn.init.zeros_(layer.mlp.down_proj.weight)
