"""Which layer the visual tokens leave before (`layer.py`), and what each layer does with them (`schedule.py`)."""
