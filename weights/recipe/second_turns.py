"""Score the second turns of a model: each asks about another object than the first turn, which it follows.

    python weights/recipe/scenes.py --pairs PAIRS
    python weights/recipe/second_turns.py PAIRS --model weights/minivtw-tiny --withdraw off,6

Each K has chats of its own: the answer that stands in the conversation is the one that the model gave.
"""

import argparse
import json
import pathlib

import minivtw
from minivtw.analysis.scoring import normalised


def right_turns(vlm, pair: dict, folder: pathlib.Path, layer: int | None) -> list[bool]:
    """Whether each turn of one chat was answered rightly."""
    chat, image, right = minivtw.Chat(vlm, layer), folder / pair["image"], []
    for question, answer in pair["turns"]:
        said = chat.ask(question, image, max_new_tokens=32).text
        right.append(normalised(said) == normalised(answer))
        image = None  # it stays in the conversation
    return right


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", type=pathlib.Path, help="the folder that scenes.py --pairs wrote")
    parser.add_argument("--model", type=pathlib.Path, help="a model folder (default: the embedded model)")
    parser.add_argument("--withdraw", default="off,6", help="layers, with commas (default: off,6)")
    arguments = parser.parse_args()
    vlm = minivtw.load(arguments.model)
    lines = (arguments.pairs / "questions.jsonl").read_text(encoding="utf-8").splitlines()
    print("withdrawn before   first turn   second turn")
    for name in arguments.withdraw.split(","):
        layer = None if name == "off" else int(name)
        turns = [right_turns(vlm, json.loads(line), arguments.pairs, layer) for line in lines]
        first, second = (100 * sum(right) / len(right) for right in zip(*turns))
        print(f"{name:16} {first:11.1f} % {second:11.1f} %   of {len(lines)} chats")


if __name__ == "__main__":
    main()
