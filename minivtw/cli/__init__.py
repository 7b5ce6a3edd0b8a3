"""What the commands share: options, one-line errors and progress, files that are written whole, Ctrl-C."""
