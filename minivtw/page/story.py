"""The report's story: what one answer tells when it is asked at every K, and the page that lays it out."""

import base64
import hashlib
import pathlib
from html import escape
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from ..analysis.settling import GROUPS, even_shares, settling
from ..checkpoints.files import read_fields
from ..checkpoints.stored import STORED
from ..errors import InputError
from ..methods.text import Method, spec_of, withdrawal_layer
from ..methods.withdrawal import withdraw
from ..search.layer import ETA, kl_curve
from ..vlm import VLM, Answer
from .charts import line_chart, stacked_bars
from .page import as_json, as_seen, data_url, filled, packed, page_css, part, patches
from .watching import LONGEST_ANSWER, EmbeddedQuestion, ask, frame, readings, responded, token_text, traces

REPEATS = 5  # of each timed answer; the fastest counts


class Story(NamedTuple):
    """All that a report tells; `report_html` only lays it out."""

    model: str
    question: str
    tiles: list[Image.Image]  # the image as the model sees it
    words: list[str | None]  # the prompt's tokens; None: a visual one
    patches: list[int]  # of each tile, those that are a visual token of their own
    frames: list[dict]  # `watching.frame` at every K from 0 to the number of layers
    layer: int | None  # the K to begin with; None: with `own`
    own: dict | None  # the frame of another method
    attention: np.ndarray  # (tokens, layers, tokens) of each, nothing left out; mean over heads; visual rows are zero
    shares: dict  # {"withdrawn": (layers, groups), "full": the same}: attention of the text
    even: float  # the image's share if attention were even
    worst: np.ndarray  # (layers,) KL of the answer's worst token, nats
    eta: float
    seconds: dict  # {"withdrawn": {phase: seconds}, "full": the same}


def timed(vlm: VLM, question: EmbeddedQuestion, methods: tuple[Method | None, ...]) -> list[Answer]:
    """The greedy answer under each method, with the seconds of its fastest run; taken in turns."""
    answered = lambda method: responded(vlm, question.embedded, method)[0]
    rounds = [[answered(method) for method in methods] for _ in range(REPEATS)]
    for answers in zip(*rounds):
        fastest = {phase: min(answer.stats["seconds"][phase] for answer in answers) for phase in ("prefill", "decode")}
        answers[0].stats["seconds"].update(fastest)
    return rounds[0]


def stored_eta(folder: pathlib.Path) -> float:
    """The KL threshold by which a model's stored layer was found; the paper's where none is stored."""
    stored = read_fields(folder, STORED, optional=True)
    threshold, is_divergence = stored.raw("threshold"), stored.raw("criterion") in ("kl", "answer")
    return threshold if is_divergence and isinstance(threshold, int | float) and threshold > 0 else ETA


def framed(vlm: VLM, question: EmbeddedQuestion, method: Method | None) -> dict[str, Any]:
    """A position of the wall, and what the answering token would say after each layer."""
    answering = [len(question.embedded.hidden) - 1]
    states = traces(vlm.decoder, question.embedded, question.answer.token_ids[:1], method, answering).states[0]
    return frame(vlm, question, method) | {"readings": readings(vlm, states)}


def story_of(vlm: VLM, image: Any, text: str, method: Method | None) -> Story:
    """Ask at every K, observe and measure: everything that the report shows. Raises InputError."""
    layers, vision = vlm.config.layers, vlm.parts.vision
    if not vision:
        raise InputError(
            f"{vlm.folder} is a language model that sees nothing; there is no image whose leaving could be shown"
        )
    question = ask(vlm, image, text)
    prompt, is_visual, tiles = question.embedded, question.prompt.is_visual, question.prompt.tiles
    assert tiles is not None  # there was an image
    leaves = withdrawal_layer(method) if method else layers
    is_own = method is not None and spec_of(method) != f"withdraw:layer={leaves}"
    timings = timed(vlm, question, (method, None))
    attention = np.zeros((len(is_visual), layers, len(is_visual)), np.float32)
    words = np.flatnonzero(~is_visual).tolist()
    attention[words] = traces(vlm.decoder, prompt, question.answer.token_ids[:1], None, words).attention.mean(2)
    return Story(
        model=timings[0].stats["model"],
        question=text,
        tiles=as_seen(vision, tiles),
        words=[
            None if visual else token_text(vlm, token)
            for token, visual in zip(question.prompt.token_ids.tolist(), is_visual)
        ],
        patches=patches(vision, len(tiles), int(is_visual.sum())),
        frames=[framed(vlm, question, withdraw(layer)) for layer in range(layers + 1)],
        layer=leaves,
        own=framed(vlm, question, method) if is_own else None,
        attention=attention,
        shares={"withdrawn": settling(vlm.decoder, prompt, method), "full": settling(vlm.decoder, prompt)},
        even=float(even_shares(is_visual)[GROUPS.index("visual")]),
        worst=kl_curve(vlm.decoder, prompt, LONGEST_ANSWER, vlm.stop_ids),
        eta=stored_eta(vlm.folder),
        seconds={name: answer.stats["seconds"] for name, answer in zip(("withdrawn", "full"), timings)},
    )


def report_data(story: Story) -> dict[str, Any]:
    """What the script of the report needs."""
    layers = len(story.frames) - 1
    eyes = {
        token: packed(attention) | {"heads": 1, "tokens": attention.shape[-1]}
        for token, (attention, word) in enumerate(zip(story.attention, [*story.words, *[""] * len(story.attention)]))
        if word is not None
    }
    return {
        "layers": layers,
        "words": story.words,
        "patches": story.patches,
        "frames": story.frames,
        "layer": story.layer,
        "own": story.own,
        "eyes": eyes,
    }


def tiles_html(tiles: list[Image.Image]) -> str:
    """The pictures; the script lays the patches over them."""
    return "".join(f'<div class="tile"><img src="{data_url(tile)}" alt=""></div>' for tile in tiles)


def seconds_text(seconds: dict) -> str:
    now, full = seconds["withdrawn"], seconds["full"]
    return ", ".join(
        f"{phase} {now[phase] * 1e3:.1f} ms instead of {full[phase] * 1e3:.1f}" for phase in ("prefill", "decode")
    )


def report_html(story: Story) -> str:
    """The whole report, text of an HTML file."""
    curve = np.array([frame["kl"] for frame in story.frames[:-1]])
    layers = list(range(len(curve)))
    lowest = np.log10(max(min(curve.min(), story.worst.min(), story.eta), 1e-6))
    decades = int(np.floor(lowest)), int(max(np.ceil(np.log10(max(story.worst.max(), 1e-6))), 0))
    order = [GROUPS.index(group) for group in ("visual", "sink", "nearest", "other")]
    bars = {
        name: stacked_bars(
            layers, [GROUPS[i] for i in order], shares[:, order], ("layer", "attention of the text"),
            even=story.even, layer=story.layer if name == "withdrawn" else None,
            label="where the text's attention goes, layer by layer",
        )
        for name, shares in story.shares.items()
    }  # fmt: skip
    script = part("wall.js") + part("report.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return filled(
        "report.html",
        {
            "style": page_css(),
            "wall": part("wall.html"),
            "left": '<p class="question"><!--question--></p><div class="chips"><button type="button" id="own"></button></div>',
            "digest": digest,
            "script": script,
            "tiles": tiles_html(story.tiles),
            "curve": line_chart(
                layers, [("next token", "visual", curve), ("worst token", "sink dashed", story.worst)],
                ("layer", "KL, nats"), decades, story.eta, story.layer, label="KL divergence for each withdrawal layer",
            ),
            "bars withdrawn": bars["withdrawn"],
            "bars full": bars["full"],
            "even": f"{story.even:.0%}",
            "seconds": seconds_text(story.seconds),
            "model": escape(story.model),
            "question": escape(story.question),
            "data": as_json(report_data(story)),
        },
    )  # fmt: skip
