"""Renew what chapter 1 says of stepping, and the editor's configuration: python docs/stepping.py

The table of stops, with what is seen at each, and the session with `minivtw.step` are recorded by running them.
"""

import argparse
import json
import os
import pathlib
import re
import subprocess
import sys

import minivtw
from minivtw.cli.stops import STOPS, Stop
from minivtw.step import Guide, in_plain_steps

ROOT = pathlib.Path(__file__).parent.parent
CHAPTER = ROOT / "docs" / "01-from-picture-to-answer.md"
LAUNCH = ROOT / ".vscode" / "launch.json"
QUESTION = ("docs/pictures/scene.png", "What color is the star?")
TYPED = ["", "", "", "", "", "p tokens", "s", "s", "s", "s", "p tokens.hidden[~tokens.is_visual]", "q"]
SHOWN = "--- 6 of 13"  # from here on the session is in the chapter


class Recorder(Guide):
    """A guide that writes down what is to be seen at every stop, and goes on by itself."""

    def arrive(self, stop: Stop, frame) -> None:
        self.reached = self.stops.index(stop) + 1
        self.seen[stop] = [(code, minivtw.page.printing.part(self.value(code, frame))) for code in stop.look]
        self.arm()

    def interaction(self, *_) -> None:
        self.set_continue()


def seen() -> tuple[int, dict[Stop, list[tuple[str, str]]]]:
    """The layer before which the image leaves, and the stop -> [(expression, what it shows)]."""
    os.chdir(ROOT)
    vlm = minivtw.load()
    layer = vlm.method().withdraw_layer
    recorder = Recorder(list(STOPS), layer, vlm.config.layers)
    recorder.seen = {}
    with in_plain_steps():
        recorder.lead(vlm.answer, *QUESTION)
    return layer, recorder.seen


def table(layer: int, shown: dict[Stop, list[tuple[str, str]]]) -> str:
    """The stops as breakpoints."""
    rows = ["| type | look at |", "| --- | --- |"]
    for stop, values in shown.items():
        looks = "; ".join(f"`{code}`: {value}" for code, value in values)
        rows.append(f"| `b {stop.breakpoint(layer)}` | {looks} |")
    return "\n".join(rows)


def session() -> str:
    """What `minivtw.step` prints from the sixth stop on, with what was typed."""
    ran = subprocess.run(
        [sys.executable, "-m", "minivtw.step", *QUESTION], input="\n".join([*TYPED, ""]), cwd=ROOT, check=True,
        capture_output=True, encoding="utf-8", env=os.environ | {"PYTHONIOENCODING": "utf-8"},
    )  # fmt: skip
    pieces = ran.stdout.replace(str(ROOT) + "/", "").split("(step) ")
    text = pieces[0] + "".join(f"(step) {typed}\n{piece}" for typed, piece in zip(TYPED, pieces[1:]))
    lines = [line.rstrip() for line in text[text.index(SHOWN) :].splitlines()]
    return "```text\n" + re.sub(r"\n{3,}", "\n\n", "\n".join(lines)) + "\n```"


def launch() -> str:
    """An editor's configurations: the question, and the guide in its terminal."""
    shared = {"type": "debugpy", "request": "launch", "cwd": "${workspaceFolder}", "env": {"OMP_NUM_THREADS": "1"}}
    question = {"args": list(QUESTION), "justMyCode": True}
    configurations = [
        {
            "name": "Answer a question (set the breakpoints of chapter 1)",
            "module": "minivtw.generate",
            **question,
            **shared,
        },
        {
            "name": "Trace every array",
            "module": "minivtw.generate",
            **question,
            **shared,
            "args": [*QUESTION, "--trace"],
        },
    ]
    return json.dumps({"version": "0.2.0", "configurations": configurations}, indent=2) + "\n"


def renewed(page: str) -> str:
    """The chapter's text with everything recorded anew."""
    for name, text in (("session", session()), ("tour", table(*seen()))):
        page = re.sub(
            rf"(<!-- {name} -->\n).*?(<!-- end -->)", lambda found: found[1] + text + "\n" + found[2], page, flags=re.S
        )
    return page


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    CHAPTER.write_text(renewed(CHAPTER.read_text(encoding="utf-8")), encoding="utf-8")
    LAUNCH.parent.mkdir(exist_ok=True)
    LAUNCH.write_text(launch(), encoding="utf-8")
