"""Which tokens go on, and which of them a layer works on.

`withdrawal.py` is the paper's method and what stands beside it; `shelf.py` and `before.py` are its published relatives;
`looking.py` is what they may ask of the tokens; `text.py` reads, writes and checks methods.
"""
