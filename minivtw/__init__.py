"""A vision-language model in NumPy that withdraws its visual tokens half way (arXiv 2405.05803)."""

from .errors import InputError
from .vlm import VLM, Chat, Result, load
from .methods import Withdrawal

__all__ = ["Chat", "InputError", "Result", "VLM", "Withdrawal", "load"]
__version__ = "0.1.0"
