"""Write the calibration samples of the embedded model: 20 pictures with a question each, seeds met nowhere else.

    python weights/recipe/samples.py weights/minivtw-tiny/samples
    python weights/recipe/samples.py samples --count 140 --first 95000000 --without place

`python -m minivtw.calibrate` looks for K on them. The pictures are stored at the model's own size, resized as its image
processor would, so that the model sees the same pixels as in the full picture.
"""

import argparse
import itertools
import json
import pathlib

import numpy as np
from drawing import draw
from PIL import Image
from pool import model_pixels
from questions import FAMILIES, even_answers, has_answer
from world import evaluation_seed, sample_scene

SAMPLES = 20
FIRST = 90_000_000  # far behind the scenes of the evaluation set


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path, help="the folder to write")
    parser.add_argument("--count", type=int, default=SAMPLES, help=f"how many (default: {SAMPLES})")
    parser.add_argument(
        "--first", type=int, default=FIRST, help="the seed to look from for scenes that have a question"
    )
    parser.add_argument("--without", help="a family of questions to leave out")
    chosen = parser.parse_args()
    folder = chosen.folder
    folder.mkdir(parents=True, exist_ok=True)
    lines, index, drawn = [], chosen.first, np.random.default_rng(4)
    families = [(name, family) for name, family in FAMILIES.items() if name != chosen.without]
    for number, (name, family) in zip(range(chosen.count), itertools.cycle(families)):
        answers = even_answers(name)
        wanted = str(drawn.choice(answers)) if answers else None
        while True:
            scene = sample_scene(evaluation_seed(index))
            index += 1
            rng = np.random.default_rng([scene.seed, 4])
            questions = [question for question in family(scene.things, rng) if has_answer(question, wanted)]
            if questions:
                break
        question = questions[rng.integers(len(questions))]
        picture = f"{number:02d}-{name}.png"
        Image.fromarray(model_pixels(draw(scene))).save(folder / picture, optimize=True)
        lines.append(json.dumps({"image": picture, **question._asdict()}) + "\n")
    (folder / "questions.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
