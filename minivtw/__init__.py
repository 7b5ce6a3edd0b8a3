"""A vision-language model in NumPy that drops its visual tokens partway through the decoder (arXiv 2405.05803)."""

from .cli import interrupts  # noqa: F401  first: Ctrl-C may come while the rest is imported
from .errors import InputError
from .loading import load
from .model.tokens import Tokens
from .page.printing import in_one_line  # noqa: F401  becomes the repr of all of these
from .vlm import VLM, Answer, Chat

__all__ = ["VLM", "Answer", "Chat", "InputError", "Tokens", "load"]
__version__ = "0.2.0"
