"""One page about one answer, to open with a double click: python -m minivtw.report IMAGE PROMPT -o report.html"""

import numpy as np

from . import load
from .analysis.migration import last_states, with_answer
from .analysis.page import Run, Story, page
from .analysis.settling import GROUPS, even_shares, image_maps, settling
from .before import with_tower
from .checkpoints.stored import stored_search
from .cli import Parser, add_method_options, add_model_option, check_writable, command, write_whole
from .errors import InputError
from .inputs.images import open_image
from .model.decoder import logits
from .model.layers import softmax
from .model.tokens import EmbeddedPrompt
from .search import ETA, kl_curve

LONGEST_ANSWER = 32  # tokens; each is a map a layer
READINGS = 3  # tokens shown of what a layer would say
REPEATS = 5  # of each timed answer; the fastest counts


def observed(vlm, prompt, answer, method):
    """A `Run`: prompt and answer once through the decoder, under a method."""
    forced, decoder = with_answer(vlm.decoder, prompt, answer), vlm.decoder
    readings = []
    for states in last_states(decoder, forced, method, len(answer)):  # (layers + 1, width)
        probabilities = softmax(logits(decoder, states))  # (layers + 1, vocabulary)
        likeliest = np.argsort(-probabilities, axis=1)[:, :READINGS]
        readings.append(
            [
                [[token_text(vlm, int(i)), round(float(row[i]), 4)] for i in best]
                for row, best in zip(probabilities, likeliest)
            ]
        )
    return Run(image_maps(decoder, forced, method, len(answer)), settling(decoder, prompt, method), readings)


def token_text(vlm, token):
    """A token as people would write it."""
    return vlm.tokenizer.decode([token], skip_special_tokens=False)


def timed(vlm, image, question, methods):
    """The greedy answer under each method, with the seconds of its fastest run; taken in turns."""
    rounds = [
        [vlm.answer(image, question, withdraw=None, method=method, max_new_tokens=LONGEST_ANSWER) for method in methods]
        for _ in range(REPEATS)
    ]
    for answers in zip(*rounds):
        fastest = {phase: min(answer.stats["seconds"][phase] for answer in answers) for phase in ("prefill", "decode")}
        answers[0].stats["seconds"].update(fastest)
    return rounds[0]


def stored_eta(folder):
    """The KL threshold by which a model's stored layer was found; the paper's where none is stored."""
    stored = stored_search(folder)
    is_divergence = stored.get("criterion") in ("kl", "answer") and isinstance(stored.get("threshold"), int | float)
    return stored["threshold"] if is_divergence and stored["threshold"] > 0 else ETA


def tell(vlm, image, question, method):
    """Ask, observe and measure: everything that `page` shows. Raises InputError."""
    picture = open_image(image)
    if not vlm.parts.vision:
        raise InputError(f"{vlm.folder} is a language model that sees nothing; there is no image whose leaving could be shown")
    withdrawn, full = timed(vlm, picture, question, (method, None))
    prepared = vlm.prepare(picture, question)
    tower = vlm.tower()
    prompt = EmbeddedPrompt(vlm.embed(prepared, tower=tower), prepared.is_visual)
    entered, text = withdrawn.stats["prefill"]["entered"], withdrawn.stats["tokens"]["text"]
    return Story(
        model=withdrawn.stats["model"],
        picture=picture,
        question=question,
        answers={"withdrawn": withdrawn.text, "full": full.text},
        method=withdrawn.stats["method"],
        layer=entered.index(text) if text in entered else None,
        tokens=[token_text(vlm, token) for token in withdrawn.token_ids],
        runs={
            "withdrawn": observed(vlm, prompt, withdrawn.token_ids, method and with_tower(method, tower)),
            "full": observed(vlm, prompt, withdrawn.token_ids, None),
        },
        even=float(even_shares(prompt.is_visual)[GROUPS.index("visual")]),
        tiles=prepared.tiles,
        curve=kl_curve(vlm.decoder, prompt),
        worst=kl_curve(vlm.decoder, prompt, LONGEST_ANSWER, vlm.stop_ids),
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
    add_model_option(options)
    add_method_options(options)
    chosen = options.parse_args(arguments)
    output = check_writable(chosen.output)
    vlm = load(chosen.model)
    html = page(tell(vlm, chosen.image, chosen.prompt, vlm.method(chosen.withdraw, chosen.method)))
    write_whole(output, html)
    print(f"{output}: {len(html) / 1000:.0f} kB")


if __name__ == "__main__":
    command(main)
