"""How much faster `evaluate` asks four questions about each of 12 scenes than `answer` asks each afresh:

OMP_NUM_THREADS=1 python -m tests.bench_evaluate [ROUNDS]
"""

import pathlib
import statistics
import sys
import tempfile
import time

import minivtw
from minivtw.evaluate import evaluate
from minivtw.inputs.questions import Question

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "weights" / "recipe"))

from drawing import draw
from questions import every_question
from world import sample_scene

SCENES = 12


def four_questions(folder):
    """Questions with answers of one word, four about each scene."""
    for seed in range(SCENES):
        scene, path = sample_scene(seed), f"{folder}/{seed}.png"
        draw(scene).save(path)
        short = [asked for asked in every_question(scene) if len(asked.answer.split()) == 1]
        for asked in short[:: max(1, len(short) // 4)][:4]:
            yield Question(path, asked.question, asked.family, asked.answer)


def ratio(vlm, questions, methods):
    """Seconds of `answer`, for every question and method, over those of `evaluate`."""
    started = time.perf_counter()
    for asked in questions:
        for method in methods.values():
            vlm.answer(asked.image, asked.question, withdraw=None, method=method)
    between = time.perf_counter()
    evaluate(vlm, questions, methods)
    return (between - started) / (time.perf_counter() - between)


def main(rounds=10):
    vlm = minivtw.load()
    off, both = {"off": None}, {"off": None, "auto": vlm.method("auto")}
    with tempfile.TemporaryDirectory() as folder:
        questions = list(four_questions(folder))
        for methods in (off, both):
            ratios = [ratio(vlm, questions, methods) for _ in range(int(rounds))]
            print(
                f"{' and '.join(methods)}: {statistics.median(ratios):.2f} times as fast, from {min(ratios):.2f} to {max(ratios):.2f}"
            )


if __name__ == "__main__":
    main(*sys.argv[1:])
