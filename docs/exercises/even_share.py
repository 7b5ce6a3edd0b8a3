"""What would uniform attention give?

A share means little without a baseline. Suppose every token looked at all that it may see, itself and what came before,
at each alike. Which share of the attention of the text after the image would go to visual tokens? Token i sees i + 1
tokens; count the visual ones among them.
"""

import numpy as np

from exercises import SCENE, expect, expect_number, model


def stub(is_visual):
    """is_visual: (tokens,) booleans. Returns a share from 0 to 1."""
    return float(is_visual.mean())  # as if every token saw the whole prompt


def solution(is_visual):
    """is_visual: (tokens,) booleans. Returns a share from 0 to 1."""
    seen = np.arange(len(is_visual)) + 1
    visual_seen = np.cumsum(is_visual)
    after_image = ~is_visual & (visual_seen > 0)
    return float((visual_seen / seen)[after_image].mean())


def check(even_share):
    is_visual = model().prepare(SCENE, "What color is the star?").is_visual
    small = np.array([False, True, True, False, False])
    for marks, wanted in ((small, (2 / 4 + 2 / 5) / 2), (is_visual, None)):
        found = even_share(marks)
        expect_number(found)
        if wanted is None:
            looks = np.tril(np.ones((len(marks), len(marks)))) / (np.arange(len(marks)) + 1)[:, None]
            wanted = looks[np.flatnonzero(~marks)[4:]][:, marks].sum(axis=-1).mean()
        said = "visual tokens 1 and 2 of 5, so text tokens 3 and 4 give 2/4 and 2/5" if marks is small else "the prompt"
        expect(abs(found - wanted) < 1e-6, f"for {said} it must be {wanted:.4f}, not {found:.4f}")
    return f"{wanted:.0%} for this prompt; in most layers the text looks at the image less than that"
