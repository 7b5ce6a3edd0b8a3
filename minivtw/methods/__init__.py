"""Which tokens go on, and which of them a layer works on.

`withdrawal.py` is the paper's method and what stands beside it; `shelf.py` and `before.py` are its published relatives;
`sharing.py` lets tokens follow others; `looking.py`: what a method may ask of tokens; `text.py`: methods as text.
"""

from .shelf import METHODS, method_of
from .text import Method, spec_of
from .withdrawal import adaptive, freeze, own_positions, random_tokens, renumber, then, withdraw

__all__ = [
    "METHODS", "Method", "adaptive", "freeze", "method_of", "own_positions", "random_tokens", "renumber", "spec_of", "then",
    "withdraw",
]  # fmt: skip
