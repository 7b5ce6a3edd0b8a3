"""Visual Tokens Withdrawal in the models of Hugging Face transformers: `pip install 'minivtw[transformers]'`.

    from minivtw.plug import withdraw

    with withdraw(model, layer=16):
        model.generate(**inputs)
"""

from ..errors import InputError

try:
    import torch  # noqa: F401
    import transformers  # noqa: F401
except ImportError as error:
    raise InputError("minivtw.plug needs two packages: pip install 'minivtw[transformers]'") from error

from .calibration import calibrate
from .hooks import freeze, withdraw

__all__ = ["calibrate", "freeze", "withdraw"]
