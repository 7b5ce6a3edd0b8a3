"""Answers against the right answers, as the scenes' specification says (weights/recipe/README.md)."""

import string

PUNCTUATION = str.maketrans("", "", string.punctuation)


def plain(answer: str) -> str:
    """Lower case, no punctuation, single spaces."""
    return " ".join(answer.lower().translate(PUNCTUATION).split())


def described(caption: str) -> set[tuple[str, str]]:
    """The set of (colour, shape) pairs of a caption; any figure stands for the shape `digit`."""
    pairs = set()
    for part in caption.lower().replace(" and ", ",").split(","):
        words = [word for word in plain(part).split() if word not in ("a", "an")]
        if len(words) >= 2:
            color, shape = words[:2]
            pairs.add((color, "digit" if shape in set(string.digits) else shape))
    return pairs


def score(family: str, answer: str, right: str) -> float:
    """1 for the right answer, 0 for a wrong one; a caption gets the F1 of its set of (colour, shape) pairs."""
    if family != "caption":
        return float(plain(answer) == plain(right))
    said, true = described(answer), described(right)
    return 2 * len(said & true) / max(len(said) + len(true), 1)
