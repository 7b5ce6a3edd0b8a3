"""Softmax with the causal mask

`scores` has a row for each query and a column for each key: how well the query fits the key. Turn every row into shares
that sum to 1, `exp(score)` over the sum of them all. A query sees the keys up to its own place and none after it: query i
sees keys 0 … i, and every other share is 0. Scores may be as large as 1,000, and `exp(1000)` is more than a float holds:
subtract the row's largest score first, which changes no share.
"""

import numpy as np

from exercises import expect, expect_array
from minivtw.model.layers import softmax


def stub(scores):
    """scores: (tokens, tokens). Returns shares (tokens, tokens); row i sums to 1 over the keys 0 to i."""
    shares = np.exp(scores)  # and the mask? and the sums?
    return shares


def solution(scores):
    """scores: (tokens, tokens). Returns shares (tokens, tokens); row i sums to 1 over the keys 0 to i."""
    visible = np.tril(np.ones(scores.shape, bool))
    scores = np.where(visible, scores, -np.inf)
    exponentials = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


def check(causal_softmax):
    scores = np.random.default_rng(0).normal(size=(5, 5)).astype(np.float32)
    visible = np.tril(np.ones((5, 5), bool))
    with np.errstate(all="ignore"):
        shares, large = causal_softmax(scores.copy()), causal_softmax(400 * scores)
    expect(np.shape(shares) == (5, 5), f"the shares must have the shape of the scores, (5, 5), not {np.shape(shares)}")
    ahead = shares[~visible].max()
    expect(ahead == 0, f"a query looks at a key after it: the largest share above the diagonal is {ahead:.2g}")
    sums = shares.sum(axis=-1)
    expect(
        np.allclose(sums, 1, atol=1e-5),
        f"the shares of row {abs(sums - 1).argmax()} sum to {sums[abs(sums - 1).argmax()]:.3g}, not 1: what is masked must not count in the sum, either",
    )
    expected = softmax(np.where(visible, scores, -np.inf))
    expect_array(shares, expected.astype(shares.dtype), "the array of shares", 1e-5)
    expect(np.isfinite(large).all(), "large scores overflow: subtract each row's largest score before `exp`")
    return "every row sums to 1, and no query looks ahead"
