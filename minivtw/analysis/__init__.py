"""The paper's instruments: where attention goes, and what moves into the text; tokens followed through the layers."""
