"""One page about one answer, to open with a double click: python -m minivtw.report IMAGE PROMPT -o report.html"""

import os
import pathlib

import numpy as np

from . import load
from .analysis.migration import last_states, with_answer
from .analysis.page import Run, Story, page
from .analysis.settling import GROUPS, even_shares, image_maps, settling
from .checkpoints.checkpoint import read_json
from .model.decoder import logits
from .errors import InputError, Parser, door
from .checkpoints.fields import Fields
from .generate import withdraw_option
from .inputs.images import open_image
from .model.layers import softmax
from .search import ETA, Asked, kl_curve

LONGEST_ANSWER = 32  # tokens; each is a map a layer
READINGS = 3  # tokens shown of what a layer would say
REPEATS = 5  # of each timed answer; the fastest counts


def observed(vlm, asked, answer, layer):
    """A `Run`: prompt and answer once through the decoder, the image leaving before `layer`."""
    forced, decoder = with_answer(vlm.decoder, asked, answer), vlm.decoder
    readings = []
    for states in last_states(decoder, forced, layer, len(answer)):  # (layers + 1, width)
        probabilities = softmax(logits(decoder, states))  # (layers + 1, vocabulary)
        likeliest = np.argsort(-probabilities, axis=1)[:, :READINGS]
        readings.append(
            [
                [[token_text(vlm, int(i)), round(float(row[i]), 4)] for i in best]
                for row, best in zip(probabilities, likeliest)
            ]
        )
    return Run(image_maps(decoder, forced, layer, len(answer)), settling(decoder, asked, layer), readings)


def token_text(vlm, token):
    """A token as people would write it."""
    return vlm.tokenizer.decode([token], skip_special_tokens=False)


def timed(vlm, image, question, withdraws):
    """The greedy answer of each withdrawal, with the seconds of its fastest run; taken in turns."""
    rounds = [
        [vlm.answer(image, question, withdraw=withdraw, max_new_tokens=LONGEST_ANSWER) for withdraw in withdraws]
        for _ in range(REPEATS)
    ]
    for results in zip(*rounds):
        fastest = {phase: min(result.stats["seconds"][phase] for result in results) for phase in ("prefill", "decode")}
        results[0].stats["seconds"].update(fastest)
    return rounds[0]


def stored_eta(folder):
    """The KL threshold by which a model's stored layer was found; the paper's where none is stored."""
    if not (folder / "withdrawal.json").exists():
        return ETA
    stored = Fields(read_json(folder, "withdrawal.json"), f"{folder}/withdrawal.json")
    is_divergence = stored.raw("criterion") in ("kl", "answer") and stored.raw("threshold")
    return stored.number("threshold") if is_divergence else ETA


def tell(vlm, image, question, withdraw="auto"):
    """Ask, observe and measure: everything that `page` shows. Raises InputError."""
    picture = open_image(image)
    if not vlm.parts.vision:
        raise InputError(
            f"{vlm.folder} is a language model that sees nothing; there is no image whose leaving could be shown"
        )
    withdrawn, full = timed(vlm, picture, question, (withdraw, None))
    layer = withdrawn.stats["withdraw_layer"]
    prompt = vlm.prepare(picture, question)
    asked = Asked(vlm.embed(prompt), prompt.is_visual)
    return Story(
        model=withdrawn.stats["model"],
        picture=picture,
        question=question,
        answers={"withdrawn": withdrawn.text, "full": full.text},
        layer=layer,
        tokens=[token_text(vlm, token) for token in withdrawn.token_ids],
        runs={
            "withdrawn": observed(vlm, asked, withdrawn.token_ids, layer),
            "full": observed(vlm, asked, withdrawn.token_ids, None),
        },
        even=float(even_shares(asked.is_visual)[GROUPS.index("visual")]),
        tiles=prompt.tiles,
        curve=kl_curve(vlm.decoder, asked),
        worst=kl_curve(vlm.decoder, asked, LONGEST_ANSWER, vlm.stop_ids),
        eta=stored_eta(vlm.folder),
        stats={"withdrawn": withdrawn.stats, "full": full.stats},
    )


def main(arguments):
    options = Parser(
        prog="minivtw.report", description="Write one page that shows where the image leaves, and why it can."
    )
    options.add_argument("image", metavar="IMAGE", help="a picture in any format that Pillow reads")
    options.add_argument("prompt", metavar="PROMPT", help="the question")
    options.add_argument(
        "-o", "--output", default="report.html", metavar="FILE", help="the page (default: report.html)"
    )
    options.add_argument("--model", metavar="DIR", help="a model folder (default: the embedded model)")
    options.add_argument(
        "--withdraw", type=withdraw_option, default="auto", metavar="auto|adaptive|off|K",
        help="the layer before which the visual tokens leave; auto (default): the one stored with the model",
    )  # fmt: skip
    chosen = options.parse_args(arguments)
    output = pathlib.Path(chosen.output)
    if output.is_dir() or not output.parent.is_dir():  # before the work, not after it
        raise InputError(f"cannot write {output}: {'it is a folder' if output.is_dir() else 'there is no such folder'}")
    html = page(tell(load(chosen.model), chosen.image, chosen.prompt, chosen.withdraw))
    partial = output.with_name(f".{output.name}.partial")
    try:
        partial.write_text(html, encoding="utf-8")
        os.replace(partial, output)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise InputError(f"cannot write {output}: {error.strerror}") from error
    print(f"{output}: {len(html) / 1000:.0f} kB")


if __name__ == "__main__":
    door(main)
