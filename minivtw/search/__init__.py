"""Which layer the visual tokens leave before (`layer.py`), and what each layer does with them (`schedule.py`)."""

from .layer import CRITERIA, ETA, choose_layer, divergence, kl_curve, logits_from_layer, mean_curve, run_in_full

__all__ = [
    "CRITERIA",
    "ETA",
    "choose_layer",
    "divergence",
    "kl_curve",
    "logits_from_layer",
    "mean_curve",
    "run_in_full",
]
