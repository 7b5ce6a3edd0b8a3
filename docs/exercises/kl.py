"""The divergence of two answers

`withdrawn` and `full` are logits of the next token, (vocabulary,), of the model with the image withdrawn and of the whole
model. Make both probabilities and return

    KL( withdrawn || full ) = Σ p_withdrawn · ( ln p_withdrawn − ln p_full )

in nats. The order matters: the divergence is not the same in both directions.
"""

import numpy as np

from exercises import expect, expect_number, model
from minivtw.search import divergence


def stub(withdrawn, full):
    """withdrawn, full: logits (vocabulary,). Returns nats."""
    return float(np.abs(withdrawn - full).max())  # a distance, but not this one


def solution(withdrawn, full):
    """withdrawn, full: logits (vocabulary,). Returns nats."""
    withdrawn, full = withdrawn - withdrawn.max(), full - full.max()
    log_withdrawn = withdrawn - np.log(np.exp(withdrawn).sum())
    log_full = full - np.log(np.exp(full).sum())
    return float(np.sum(np.exp(log_withdrawn) * (log_withdrawn - log_full)))


def check(kl):
    random = np.random.default_rng(0)
    withdrawn, full = random.normal(size=(2, model().config.vocabulary)) * 3
    for larger in (0, 1000):
        with np.errstate(all="ignore"):
            found = kl(withdrawn + larger, full + larger)
        wanted, other = float(divergence(withdrawn, full)), float(divergence(full, withdrawn))
        expect_number(found)
        expect(np.isfinite(found), "logits of 1,000 overflow: subtract the largest before `exp`")
        expect(abs(found - other) > 1e-4, "that is KL( full || withdrawn ): exchange the two")
        expect(abs(found - wanted / np.log(2)) > 1e-4, "that is in bits: use the natural logarithm")
        expect(abs(found - wanted) < 1e-4, f"for two random answers it must be {wanted:.4f}, not {found:.4f}")
    return f"{wanted:.3f} nats for two random answers; in the other direction it would be {other:.3f}"
