"""One page about one answer, to open with a double click: python -m minivtw.report IMAGE PROMPT -o report.html"""

import numpy as np

from . import load
from .analysis.settling import GROUPS, even_shares, settling
from .checkpoints.stored import stored_search
from .cli.options import Parser, add_method_options, add_model_option, check_question
from .cli.terminal import command, one_line
from .cli.writing import check_writable, write_whole
from .errors import InputError
from .methods.text import spec_of, withdrawal_layer
from .methods.withdrawal import withdraw
from .page import watching
from .page.page import Story, as_seen, page, patches
from .search.layer import ETA, kl_curve

REPEATS = 5  # of each timed answer; the fastest counts


def timed(vlm, asked, methods):
    """The greedy answer under each method, with the seconds of its fastest run; taken in turns."""
    rounds = [[watching.responded(vlm, asked.embedded, method)[0] for method in methods] for _ in range(REPEATS)]
    for answers in zip(*rounds):
        fastest = {phase: min(answer.stats["seconds"][phase] for answer in answers) for phase in ("prefill", "decode")}
        answers[0].stats["seconds"].update(fastest)
    return rounds[0]


def stored_eta(folder):
    """The KL threshold by which a model's stored layer was found; the paper's where none is stored."""
    stored = stored_search(folder)
    is_divergence = stored.get("criterion") in ("kl", "answer") and isinstance(stored.get("threshold"), int | float)
    return stored["threshold"] if is_divergence and stored["threshold"] > 0 else ETA


def framed(vlm, asked, method):
    """A position of the wall, and what the answering token would say after each layer."""
    answering = len(asked.embedded.hidden) - 1
    states = watching.eyes(vlm.decoder, asked.embedded, asked.answer.token_ids[:1], method, [answering]).states[0]
    return watching.frame(vlm, asked, method) | {"readings": watching.readings(vlm, states)}


def tell(vlm, image, question, method):
    """Ask at every K, observe and measure: everything that `page` shows. Raises InputError."""
    layers = vlm.config.layers
    if not vlm.parts.vision:
        raise InputError(
            f"{vlm.folder} is a language model that sees nothing; there is no image whose leaving could be shown"
        )
    asked = watching.ask(vlm, image, question)
    prompt, is_visual = asked.embedded, asked.prompt.is_visual
    leaves = withdrawal_layer(method) if method else layers
    is_own = method is not None and spec_of(method) != f"withdraw:layer={leaves}"
    timings = timed(vlm, asked, (method, None))
    own = framed(vlm, asked, method) if is_own else None
    looks = np.zeros((len(is_visual), layers, len(is_visual)), np.float32)
    text = np.flatnonzero(~is_visual).tolist()
    looks[text] = watching.eyes(vlm.decoder, prompt, asked.answer.token_ids[:1], None, text).looks.mean(2)
    return Story(
        model=timings[0].stats["model"],
        question=question,
        tiles=as_seen(vlm.parts.vision, asked.prompt.tiles),
        words=[
            None if visual else watching.token_text(vlm, token)
            for token, visual in zip(asked.prompt.token_ids.tolist(), is_visual)
        ],
        patches=patches(vlm.parts.vision, len(asked.prompt.tiles), int(is_visual.sum())),
        frames=[framed(vlm, asked, withdraw(layer)) for layer in range(layers + 1)],
        layer=leaves,
        own=own,
        looks=looks,
        shares={"withdrawn": settling(vlm.decoder, prompt, method), "full": settling(vlm.decoder, prompt)},
        even=float(even_shares(is_visual)[GROUPS.index("visual")]),
        worst=kl_curve(vlm.decoder, prompt, watching.LONGEST_ANSWER, vlm.stop_ids),
        eta=stored_eta(vlm.folder),
        seconds={name: answer.stats["seconds"] for name, answer in zip(("withdrawn", "full"), timings)},
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
    check_question(chosen.image, chosen.prompt)
    output = check_writable(chosen.output)
    vlm = load(chosen.model)
    html = page(tell(vlm, chosen.image, chosen.prompt, vlm.method(chosen.withdraw, chosen.method)))
    write_whole(output, html)
    print(f"{one_line(output)}: {len(html) / 1000:.0f} kB")


if __name__ == "__main__":
    command(main)
