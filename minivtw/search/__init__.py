"""Which layer the visual tokens leave before (`layer.py`), and what each layer does with them (`schedule.py`)."""

from .layer import CRITERIA, ETA, attention_curve, choose, divergence, kl_curve, mean_curve, tail, walk

__all__ = ["CRITERIA", "ETA", "attention_curve", "choose", "divergence", "kl_curve", "mean_curve", "tail", "walk"]
