"""Talk about images: python -m minivtw.chat [IMAGE ...]

Each line is a question; the cache stays between them. `/image FILE` shows one more image with the next question;
`/undo` takes the last question and its answer back, and shows its images with the next one.
"""

import contextlib
import copy
import sys
from collections.abc import Iterator
from typing import Any

from . import load
from .cli.options import Parser, add_asking_options, sampling, stats_table
from .cli.terminal import Progress, command, say, watched
from .errors import InputError
from .inputs.opening import open_image
from .vlm import Chat

HELP = "one question per line; /image FILE: show an image with the next one; /undo: take the last one back; /help: these words; end with /quit or Ctrl-D"


def lines() -> Iterator[str]:
    """What the user types, line by line; a person at a terminal is shown a prompt."""
    while True:
        if sys.stdin.isatty():
            print("> ", end="", flush=True)
        line = sys.stdin.readline()
        if not line or line.strip() == "/quit":
            return
        yield line.strip()


def converse(chat: Chat, images: list, options: dict[str, Any], with_stats: bool, progress: Progress) -> None:
    """Answer every line. What cannot be used is reported, an image then left out, and the conversation goes on."""
    before: tuple[Chat, list] | None = None  # the conversation before the last turn, and the images of that
    for line in lines():
        try:
            said, *rest = line.split(maxsplit=1) or [""]
            if line == "/help":
                print(HELP)
            elif line == "/undo":
                if before is None:
                    raise InputError("there is no turn to take back; only the last one can be")
                chat, images, before = before[0], [*before[1], *images], None
            elif said == "/image":
                images = [*images, open_image("".join(rest))]
            elif said.startswith("/"):
                raise InputError(f"there is no command {said}; /help names them")
            elif line:
                earlier = copy.copy(chat), images
                with progress:
                    answer = chat.ask(line, images, stream=progress.print_piece, **options)
                images, before = [], earlier
                if with_stats:
                    print(stats_table(answer.stats))
        except InputError as error:
            with contextlib.suppress(InputError):  # of words that could not be asked without an image either
                if images and not line.startswith("/") and chat.prepare(line):
                    images, error = [], InputError(f"{error}; the next question goes without an image")
            say(f"error: {error}")


def main(arguments: list[str]) -> None:
    options = Parser(prog="minivtw.chat", description="Talk with a vision-language model about images, in NumPy.")
    options.epilog = "Where a model's turns are plain words (LLaVA 1.5: USER:, ASSISTANT:), a line can forge them."
    options.add_argument("images", nargs="*", metavar="IMAGE", help="images to talk about from the first question on")
    add_asking_options(options)
    options.add_argument("--stats", action="store_true", help="a table after every answer: what withdrawal saved")
    chosen = options.parse_args(arguments)
    images = [open_image(image) for image in chosen.images]
    vlm, progress = watched(load(chosen.model, chosen.low_memory, chosen.max_tiles))
    chat = Chat(vlm, chosen.withdraw, chosen.method, chosen.system)
    if sys.stdin.isatty():
        print(HELP)
    converse(chat, images, sampling(chosen), chosen.stats, progress)


if __name__ == "__main__":
    command(main)
