"""The paper's instruments: where attention goes, what moves into the text, what is redundant."""
