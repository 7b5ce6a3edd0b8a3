"""Score a checkpoint on held-out scenes, with and without visual tokens in the deep layers.

    python weights/recipe/score.py withdrawal --per-family 200 --withdraw off,4,5,6,8

Quick, because it asks with the answer in view: an answer is right when every token of it is the likeliest one after the
true tokens before, which for a wrong answer is just as wrong, and for a right one just as right, as in generation. Only
captions differ: here they must be right to the word. `python -m minivtw.evaluate` is the scorer that generates.
"""

import argparse
import pathlib

import numpy as np
import torch
from drawing import draw
from llama import withdraw
from model import Llava, load_checkpoint
from passes import divergence, start_state
from pool import model_pixels
from questions import FAMILIES, evaluation_questions
from tokenizer import tokenizer_of
from tower import normalise
from turns import TurnMaker

BATCH = 50


class Examination:
    """The evaluation set, drawn once: features are made at each report, because the tower may have changed."""

    def __init__(self, maker: TurnMaker, per_family: int):
        self.maker = maker
        self.pixels: dict[str, torch.Tensor] = {}  # family -> (questions, side, side, 3) uint8
        self.questions: dict[str, list] = {name: [] for name in FAMILIES}
        pictures: dict[str, list] = {name: [] for name in FAMILIES}
        for scene, question in evaluation_questions(per_family):
            pictures[question.family].append(model_pixels(draw(scene)))
            self.questions[question.family].append(question)
        self.pixels = {name: torch.from_numpy(np.stack(listed)) for name, listed in pictures.items()}

    @torch.no_grad()
    @torch.compiler.set_stance("force_eager")  # every family has a length of its own
    def score(self, model: Llava, layers: tuple[int | None, ...]) -> dict[int | None, dict[str, dict[str, float]]]:
        """For each K (None: no withdrawal) and family: `right`, `same` as without withdrawal, and `kl`, as means."""
        scores: dict = {layer: {name: {} for name in FAMILIES} for layer in layers}
        for name, questions in self.questions.items():
            parts: dict = {layer: [] for layer in layers}
            for start in range(0, len(questions), BATCH):
                asked = questions[start : start + BATCH]
                pixels = self.pixels[name][start : start + BATCH]
                for layer, columns in self._examine(model, pixels, asked, layers).items():
                    parts[layer].append(columns)
            for layer, columns in parts.items():
                right, same, kl = np.concatenate(columns, axis=1).mean(1)
                scores[layer][name] = {"right": right, "same": same, "kl": kl}
        return scores

    def _examine(self, model: Llava, pixels: torch.Tensor, questions: list, layers: tuple) -> dict:
        """For each K of the layers an array (3, questions): right, same, kl."""
        length = max(len(self.maker.encode((question,)).ids) for question in questions)
        turns = self.maker.pack([[[(question,)]] for question in questions], (length,))
        begin = start_state(model, model.tower(normalise(pixels)), turns, self.maker.prefix.visual)
        behind, last = turns.layout.prefix, model.text.num_hidden_layers
        answers = torch.from_numpy(turns.weights[:, behind + 1 :] > 0)  # (questions, length - 1)
        tokens = torch.from_numpy(turns.ids[:, behind + 1 :])

        def read(layer: int | None) -> torch.Tensor:
            """Logits (questions, length - 1, vocabulary)."""
            state = model.decoder.run(begin, 0, last if layer is None else layer)
            if layer is not None:
                state = model.decoder.run(withdraw(state, self.maker.prefix.visual), layer, last)
            return model.logits(state.hidden[:, state.layout.prefix : -1])

        whole, columns = read(None), {}
        said = whole.argmax(-1)
        for layer in layers:
            logits = whole if layer is None else read(layer)
            right = ((logits.argmax(-1) == tokens) | ~answers).all(1)
            same = ((logits.argmax(-1) == said) | ~answers).all(1)
            kl = [divergence(mine[where], full[where]).item() for mine, full, where in zip(logits, whole, answers)]
            columns[layer] = np.array([right.numpy(), same.numpy(), kl])
        return columns

    def report(self, model: Llava, layers: tuple[int | None, ...]) -> str:
        """One line a K."""
        lines = []
        for layer, families in self.score(model, layers).items():
            mean = {what: np.mean([scores[what] for scores in families.values()]) for what in ("right", "same", "kl")}
            each = "  ".join(f"{name} {100 * scores['right']:.1f}" for name, scores in families.items())
            apart = "" if layer is None else f"  same {100 * mean['same']:.1f}  kl {mean['kl']:.5f}"
            lines.append(f"K {'off' if layer is None else layer}: mean {100 * mean['right']:.2f}  {each}{apart}")
        return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("plain", "withdrawal", "places"))
    parser.add_argument("--runs", type=pathlib.Path, default=pathlib.Path(__file__).parent / "runs")
    parser.add_argument("--per-family", type=int, default=200)
    parser.add_argument("--withdraw", default="off,4,5,6,8", help="layers, with commas (default: off,4,5,6,8)")
    arguments = parser.parse_args()
    layers = tuple(None if layer == "off" else int(layer) for layer in arguments.withdraw.split(","))
    examination = Examination(TurnMaker(tokenizer_of(arguments.runs)), arguments.per_family)
    print(examination.report(load_checkpoint(arguments.runs / f"{arguments.stage}.pt"), layers))


if __name__ == "__main__":
    main()
