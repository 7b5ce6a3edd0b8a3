"""How long it takes: rounds that are taken in turns, ceilings, and PyTorch beside."""
