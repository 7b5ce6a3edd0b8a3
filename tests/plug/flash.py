"""Flash attention, which needs a GPU, by a stand-in that follows its rules on a CPU.

Its rules (transformers' integrations/flash_attention.py): a mask of (batch, keys) says which tokens are padding, None
that none are; the rest is causal by counting from the end; where one prompt's positions have a gap, several are meant.
"""

import torch


def stand_in(module, query, key, value, attention_mask, scaling=None, position_ids=None, sliding_window=None, **more):
    """As transformers.integrations.flash_attention.flash_attention_forward; (batch, heads, tokens, head_dim) each."""
    rows, keys = query.shape[2], key.shape[2]
    if attention_mask is None and position_ids is not None and len(query) == 1 and rows > 1:
        assert (position_ids.diff() == 1).all(), "flash attention would take this for several prompts"
    assert attention_mask is None or attention_mask.shape == (len(query), keys)
    assert sliding_window is None
    seen = torch.ones(rows, keys, dtype=torch.bool).tril(keys - rows)[None, None]
    if attention_mask is not None:
        seen = seen & attention_mask[:, None, None].bool()
    key, value = (part.repeat_interleave(module.num_key_value_groups, 1) for part in (key, value))
    scores = (query @ key.transpose(2, 3) * scaling).masked_fill(~seen, torch.finfo(query.dtype).min)
    return (scores.softmax(-1) @ value).transpose(1, 2), None
