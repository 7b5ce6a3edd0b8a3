"""A key/value cache by hand

Decoding brings one token at a time. `store` is a list that is empty at first; `query`, `key` and `value` are the new
token's, each (head_dim,). Put key and value into the store, and return what attention gives the new token: the values of
all tokens so far, itself included, weighted by the softmax of `query · key / sqrt(head_dim)`. No key is computed twice.
"""

import numpy as np

from exercises import expect, expect_array
from minivtw.model.attention import attention_probabilities
from minivtw.model.layers import softmax


def stub(store, query, key, value):
    """store: a list that this function adds to. Returns (head_dim,)."""
    keys = np.array([key])  # of this token alone; and those before it?
    values = np.array([value])
    return softmax(keys @ query / np.sqrt(len(query))) @ values


def solution(store, query, key, value):
    """store: a list that this function adds to. Returns (head_dim,)."""
    store.append((key, value))
    keys = np.array([key for key, _ in store])
    values = np.array([value for _, value in store])
    return softmax(keys @ query / np.sqrt(len(query))) @ values


def check(attend):
    queries, keys, values = np.random.default_rng(0).normal(size=(3, 6, 32)).astype(np.float32)
    store = []
    found = [attend(store, *token) for token in zip(queries, keys, values)]
    expect(len(store), "the store is still empty after six tokens: nothing is there for those to come")
    expect(
        all(np.shape(one) == (32,) for one in found),
        f"it must return (head_dim,), here (32,), not {np.shape(found[0])}",
    )
    expected = attention_probabilities(queries[None], keys[None], np.arange(6) + 1)[0] @ values
    without = attention_probabilities(queries[None, 1:], keys[None], np.arange(5) + 1)[0] @ values
    expect(not np.allclose(found[1:], without, atol=1e-4), "a token does not see itself: store it before you look")
    expect_array(np.array(found), expected, "what the tokens get, (tokens, head_dim),")
    before = len(store)
    attend(store, queries[0], keys[0], values[0])
    expect(before < 7 and len(store) > before, "the store must gain something with every token")
    return "six tokens, one after the other, get what they would get all at once"
