"""Draw a scene, or write the sets of questions that models are scored on.

    python weights/recipe/scenes.py --seed 7 scene.png        draw one scene, print questions with their answers
    python weights/recipe/scenes.py --evaluation DIR          1,600 images with a question each
    python weights/recipe/scenes.py --pairs DIR               300 images with two questions, one after the other

Both sets are images beside a `questions.jsonl`: {"image", "family", "question", "answer"} per line for --evaluation,
{"image", "turns": [[question, answer], [question, answer]]} for --pairs. They are the same on every machine: what is
printed in the end is the SHA-256 of the pixels and the lines.
"""

import argparse
import hashlib
import json
import pathlib
from collections.abc import Iterable, Iterator

import PIL
from drawing import draw
from PIL import Image
from questions import evaluation_pairs, evaluation_questions, every_question
from world import sample_scene

Entry = tuple[Image.Image, dict]  # an image, and its line of questions.jsonl without the image's name


def evaluation_set(per_family: int) -> Iterator[Entry]:
    """`per_family` questions of each family, one per image."""
    for scene, question in evaluation_questions(per_family):
        yield draw(scene), question._asdict()


def pairs_set(pairs: int) -> Iterator[Entry]:
    """Pictures with two turns of a chat each, about two objects."""
    for scene, turns in evaluation_pairs(pairs):
        yield draw(scene), {"turns": [[turn.question, turn.answer] for turn in turns]}


def fingerprint(entries: Iterable[Entry]) -> str:
    """SHA-256 over the raw pixels of each image and its line."""
    digest = hashlib.sha256()
    for picture, line in entries:
        digest.update(picture.tobytes() + json.dumps(line).encode())
    return digest.hexdigest()


def write_set(folder: pathlib.Path, entries: Iterator[Entry]) -> None:
    """Write the images and questions.jsonl into a folder; print how many, and the fingerprint."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []

    def written() -> Iterator[Entry]:
        for picture, line in entries:
            name = f"{len(lines):04d}.png"
            picture.save(folder / name)
            lines.append(json.dumps({"image": name, **line}) + "\n")
            yield picture, line

    print(f"SHA-256 {fingerprint(written())} (Pillow {PIL.__version__})")
    (folder / "questions.jsonl").write_text("".join(lines), encoding="utf-8")
    print(f"{len(lines)} images with their questions in {folder / 'questions.jsonl'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("picture", nargs="?", type=pathlib.Path, help="where to write the image of --seed")
    what.add_argument("--evaluation", type=pathlib.Path, metavar="DIR", help="write the evaluation set into DIR")
    what.add_argument("--pairs", type=pathlib.Path, metavar="DIR", help="write the chats of two turns into DIR")
    parser.add_argument("--seed", type=int, default=0, help="which scene to draw (default: 0)")
    parser.add_argument("--per-family", type=int, default=200, help="evaluation questions a family (default: 200)")
    parser.add_argument("--chats", type=int, default=300, help="chats of two turns (default: 300)")
    arguments = parser.parse_args()
    if arguments.evaluation:
        write_set(arguments.evaluation, evaluation_set(arguments.per_family))
    elif arguments.pairs:
        write_set(arguments.pairs, pairs_set(arguments.chats))
    else:
        scene = sample_scene(arguments.seed)
        draw(scene).save(arguments.picture)
        for question in every_question(scene):
            print(f"{question.family:10} {question.question} -> {question.answer}")


if __name__ == "__main__":
    main()
