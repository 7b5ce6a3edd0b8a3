"""The live page and the report: requests, drawing, and the files that a browser gets."""
