"""Visual Tokens Withdrawal in the models of Hugging Face transformers: `pip install 'minivtw[transformers]'`.

`with withdraw(model, layer=16): model.generate(**inputs)` does without the image from layer 16 on; `freeze` lets visual
tokens rest in some layers; `calibrate` finds the layer. Chapter 9 of the reading course says how it works.
"""

import sys

from ..cli import interrupts
from ..errors import InputError

try:
    import torch  # noqa: F401
    import transformers  # noqa: F401
except ImportError as error:
    needs = InputError("minivtw.plug needs two packages: pip install 'minivtw[transformers]'")
    if not interrupts.is_command():
        raise needs from error
    from ..cli.terminal import refuse  # python -m minivtw.plug

    sys.exit(refuse(needs))

from .calibration import calibrate
from .contexts import freeze, withdraw, withdraw_by_default

__all__ = ["calibrate", "freeze", "withdraw", "withdraw_by_default"]
