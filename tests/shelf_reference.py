"""The shelf written a second time, in plain PyTorch over transformers' layers, apart from minivtw: from the papers and
the authors' code. Needs torch and transformers; `test_shelf_live.py` compares.
"""

from types import SimpleNamespace

import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb


def attend(block, hidden, angles):
    """A layer's probabilities (heads, tokens, tokens) and its rotated keys (kv_heads, tokens, head_dim)."""
    attention, normed, tokens = block.self_attn, block.input_layernorm(hidden), hidden.shape[1]
    queries, keys = (
        projection(normed).view(1, tokens, -1, attention.head_dim).transpose(1, 2)
        for projection in (attention.q_proj, attention.k_proj)
    )
    queries, keys = apply_rotary_pos_emb(queries, keys, *angles)
    repeated = keys.repeat_interleave(queries.shape[1] // keys.shape[1], 1)
    scores = queries @ repeated.transpose(2, 3) / attention.head_dim**0.5
    mask = torch.full((tokens, tokens), -torch.inf).triu(1)
    return (scores + mask).softmax(-1)[0], keys[0]


@torch.no_grad()
def carry(model, embeddings, is_visual, rule, renumbered_from=99):
    """A prompt through transformers' layers; rule(index, state) says which visual tokens stay, or None.

    Returns the places of the visual tokens that enter each layer, and the last token's logits.
    """
    decoder, kept = model.model.model.language_model, []
    state = SimpleNamespace(decoder=decoder, hidden=torch.tensor(embeddings)[None], visual=torch.tensor(is_visual))
    state.places = state.positions = torch.arange(len(embeddings))
    for index, block in enumerate(decoder.layers):
        state.angles = decoder.rotary_emb(state.hidden, state.positions[None])
        chosen = rule(index, state)  # indices of visual tokens
        if chosen is not None:
            stays = torch.cat([torch.where(~state.visual)[0], chosen]).sort().values
            state.hidden, state.visual = state.hidden[:, stays], state.visual[stays]
            state.places, state.positions = state.places[stays], state.positions[stays]
        if index >= renumbered_from:
            state.positions = torch.arange(len(state.positions))
        kept.append(state.places[state.visual].tolist())
        state.angles = decoder.rotary_emb(state.hidden, state.positions[None])
        state.attention, state.keys = attend(block, state.hidden, state.angles)
        tokens = state.hidden.shape[1]
        mask = torch.full((1, 1, tokens, tokens), -torch.inf).triu(1)
        state.hidden = block(state.hidden, attention_mask=mask, position_embeddings=state.angles)
    return kept, model.model.lm_head(decoder.norm(state.hidden[:, -1]))[0].numpy()


def most(scores, state, count):
    """The `count` visual tokens with the highest scores; scores: of all tokens."""
    visual = torch.where(state.visual)[0]
    return visual[scores[visual].topk(count).indices]


def fastv(seen):
    def rule(index, state):
        if index == 2:
            return most(state.attention.mean(0)[-1], state, round(seen.visual * 0.3))

    return rule, 99


def pyramiddrop(seen):
    def rule(index, state):
        if index in (1, 3, 4):
            stage = [1, 3, 4].index(index)
            scores = attend(state.decoder.layers[index], state.hidden, state.angles)[0].mean(0)[-1]
            return most(scores, state, int(seen.visual * 0.6 ** (stage + 1)))

    return rule, 1


def sparsevlm(seen):
    def rule(index, state):
        if index == 0:
            text = torch.arange(torch.where(state.visual)[0][-1] + 1, len(state.visual))
            likeness = (state.hidden[0][state.visual] @ state.hidden[0][text].T).softmax(1).mean(0)
            state.raters = state.places[text[likeness > likeness.mean()]]
        if index in (2, 4):
            rows = torch.isin(state.places, state.raters)
            scores = state.attention.mean(0)[rows].mean(0)
            return most(scores, state, round(seen.visual * 0.5 ** (1 + (index == 4))))

    return rule, 99


def dart(seen):
    def rule(index, state):
        if index != 2:
            return None
        norms = state.keys.abs().sum((0, 2))
        visual, states = torch.where(state.visual)[0], state.decoder.norm(state.hidden)[0]
        text = torch.arange(visual[-1] + 1, len(state.visual))
        pivots = [*visual[norms[visual].topk(3).indices].tolist(), *text[norms[text].topk(3).indices].tolist()]
        chosen = pivots[:3]
        for pivot in pivots:  # each adds as many: 3 + 6 * 3 of 36 tokens
            rest = torch.tensor([place for place in visual.tolist() if place not in chosen])
            likeness = torch.nn.functional.cosine_similarity(states[pivot][None], states[rest], dim=-1)
            chosen += rest[(-likeness).topk(3).indices].tolist()
        return torch.tensor(chosen)

    return rule, 99


def divprune(seen):
    def rule(index, state):
        if index:
            return None
        visual = torch.where(state.visual)[0]
        rows = state.hidden[0][visual]
        rows = rows / rows.norm(dim=1, keepdim=True)
        distances, chosen = 1 - rows @ rows.T, []
        for _ in range(round(seen.visual * 0.4)):
            scores = distances[chosen].min(0).values if chosen else distances.topk(2, 0, largest=False).values[1]
            chosen.append(int(scores.argmax()))
        return visual[chosen]

    return rule, 0


def tower_scores(seen):
    """How much each feature was looked at in the last layer used: by the class token or, without one, on average."""
    attention = torch.tensor(seen.arrays[f"vision.layers.{seen.used - 1}.attention"])[0].mean(0)
    return attention[0, 1:] if seen.class_token else attention.mean(0)


def fastervlm(seen):
    def rule(index, state):
        if index == 0:
            return torch.where(state.visual)[0][tower_scores(seen).topk(round(seen.visual * 0.4)).indices]

    return rule, 0


def visionzip(seen):
    """16 of 36 tokens: 12 dominant and 4 contextual ones, into which the other 20 are merged, behind the connector."""

    def rule(index, state):
        if index:
            return None
        visual = torch.where(state.visual)[0]
        dominant = tower_scores(seen).topk(12).indices
        entering = torch.tensor(seen.arrays[f"vision.layers.{seen.used - 2}.hidden"])
        layer = seen.tower.encoder.layers[seen.used - 1]
        keys = layer.self_attn.k_proj(layer.layer_norm1(entering))[0]
        keys = keys.view(len(keys), layer.self_attn.num_heads, -1).mean(1)[int(seen.class_token) :]
        rest = torch.tensor([token for token in range(seen.visual) if token not in dominant])
        targets, metric = torch.arange(0, len(rest), len(rest) // 4)[:4], keys / keys.norm(dim=-1, keepdim=True)
        merged = torch.tensor([number for number in range(len(rest)) if number not in targets])
        nearest = (metric[rest[merged]] @ metric[rest[targets]].T).argmax(1)
        before = state.hidden.clone()
        for number, target in enumerate(targets):
            if (nearest == number).any():
                added = before[0, visual[rest[merged[nearest == number]]]].mean(0)
                state.hidden[0, visual[rest[target]]] += added
        return visual[torch.cat([dominant, rest[targets]])]

    return rule, 0


RULES = {rule.__name__: rule for rule in (fastv, pyramiddrop, sparsevlm, dart, divprune, fastervlm, visionzip)}
