"""What the commands share: options, one-line errors and progress, Ctrl-C."""
