"""The commands, listed: python -m minivtw; `python -m minivtw generate …` and `minivtw generate …` run one of them."""

import importlib
from collections.abc import Callable

from .cli.terminal import command
from .errors import InputError

COMMANDS = {
    "generate": "ask a question about an image",
    "chat": "talk about images",
    "step": "step through an answer, from the image to the next token",
    "explore": "open a page on which the model runs while you watch",
    "report": "write one page about one answer: attention, layers, cache",
    "calibrate": "find the layer before which the visual tokens can leave",
    "evaluate": "score a model on questions, under one method or another",
    "bench": "time prefill and decode, under one method or another",
    "doctor": "say what a model is and what an image will take, before it is asked",
    "fetch": "bring a model that is too large for the repository into your cache",
    "plug": "time a model of Hugging Face transformers with and without withdrawal",
}


def main(arguments: list[str]) -> None:
    if not arguments or arguments[0] in ("-h", "--help"):
        print("minivtw COMMAND … (or python -m minivtw.COMMAND …); each has --help\n")
        print("\n".join(f"  {name:10} {what}" for name, what in COMMANDS.items()))
        return
    if arguments[0] not in COMMANDS:
        raise InputError(f"there is no command {arguments[0]!r}; there are {', '.join(COMMANDS)}")
    found(arguments[0])(arguments[1:])


def found(name: str) -> Callable[[list[str]], None]:
    """The `main` of one of COMMANDS; that of a folder stands in its `__main__.py`."""
    module = importlib.import_module(f"minivtw.{name}")
    return (importlib.import_module(f"minivtw.{name}.__main__") if hasattr(module, "__path__") else module).main


def run() -> None:
    """The entry of the `minivtw` command."""
    command(main)


if __name__ == "__main__":
    run()
