"""Visual Tokens Withdrawal in the models of Hugging Face transformers: `pip install 'minivtw[transformers]'`.

`with withdraw(model, layer=16): model.generate(**inputs)` does without the image from layer 16 on; `freeze` lets some
layers only read visual tokens; `calibrate` finds the layer. Chapter 9 of the reading course says how it works.
"""

from typing import TYPE_CHECKING, Any

from ..errors import InputError

if TYPE_CHECKING:
    from .calibration import calibrate
    from .contexts import freeze, withdraw, withdraw_by_default

__all__ = ["calibrate", "freeze", "withdraw", "withdraw_by_default"]


def __getattr__(name: str) -> Any:
    """What is imported from here when it is needed: the help of `python -m minivtw.plug` needs no torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    check_packages()
    from . import calibration, contexts

    return getattr(calibration if name == "calibrate" else contexts, name)


def check_packages() -> None:
    """Raise InputError where PyTorch or transformers is missing."""
    try:
        import torch  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        raise InputError("minivtw.plug needs two packages: pip install 'minivtw[transformers]'") from error
