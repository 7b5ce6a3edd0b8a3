"""The report's story: what one answer tells when it is asked at every K, and the page that lays it out."""

import base64
import hashlib
import json
import pathlib
import warnings
from html import escape
from typing import Any, NamedTuple

import numpy as np

from ..analysis.settling import GROUPS, even_shares, settling
from ..checkpoints.files import read_fields
from ..checkpoints.stored import STORED
from ..errors import InputError
from ..methods.text import Method, spec_of, withdrawal_layer
from ..methods.withdrawal import withdraw
from ..search.layer import ETA, kl_curve
from ..vlm import VLM
from .charts import line_chart, stacked_bars
from .horizon import horizon
from .page import filled, packed, page_css, part
from .watching import LONGEST_ANSWER, EmbeddedQuestion, ask, frame, readings, responded, see, shown, traces

MOST = 3_000_000  # attention weights of a report, 8 MB of its page: where more tokens look than that is left out
REPEATS = 5  # of each timed answer; the fastest counts


class Story(NamedTuple):
    """All that a report tells; `report_html` only lays it out."""

    model: str
    question: str
    tiles: list[str]  # the image as the model sees it, each tile a PNG in a `data:` URL
    words: list[str | None]  # the prompt's tokens; None: a visual one
    patches: list[int]  # of each tile, those that are a visual token of their own
    frames: list[dict]  # `watching.frame` at every K from 0 to the number of layers
    layer: int | None  # the K to begin with; None: with `own`
    own: dict | None  # the frame of another method
    attention: dict[int, np.ndarray]  # (layers, tokens) of the last tokens of text, none withdrawn; mean over heads
    shares: dict  # {"withdrawn": (layers, groups), "full": the same}: attention of the text
    even: float  # the image's share if attention were even
    worst: np.ndarray  # (layers,) KL of the answer's worst token, nats
    eta: float
    seconds: dict  # {"withdrawn": {phase: seconds}, "full": the same}
    horizon: str = ""  # the drawing of it, where it is wanted


def timed(vlm: VLM, question: EmbeddedQuestion, *methods: Method | None) -> list[dict[str, float]]:
    """Seconds of the greedy answer under each method, by phase; of its fastest run, and taken in turns."""
    seconds = lambda method: responded(vlm, question.embedded, method)[0].stats["seconds"]
    rounds = [[seconds(method) for method in methods] for _ in range(REPEATS)]
    return [{phase: min(run[phase] for run in runs) for phase in ("prefill", "decode")} for runs in zip(*rounds)]


def stored_eta(folder: pathlib.Path) -> float:
    """The KL threshold by which a model's stored layer was found; the paper's where none is stored."""
    stored = read_fields(folder, STORED, optional=True)
    threshold, is_divergence = stored.raw("threshold"), stored.raw("criterion") in ("kl", "answer")
    return threshold if is_divergence and isinstance(threshold, int | float) and threshold > 0 else ETA


def framed(vlm: VLM, question: EmbeddedQuestion, method: Method | None) -> dict[str, Any]:
    """A position of the wall, and what the answering token would say after each layer."""
    answering = [len(question.embedded.hidden) - 1]
    states = traces(vlm.decoder, question.embedded, (), method, answering).states[0]
    return frame(vlm, question, method) | {"readings": readings(vlm, states)}


def story_of(vlm: VLM, image: Any, text: str, method: Method | None, with_horizon: bool = False) -> Story:
    """Ask at every K, observe and measure: everything that the report shows. Raises InputError."""
    layers = vlm.config.layers
    if not vlm.parts.vision:
        raise InputError(f"{vlm.folder} is a text-only model: a report needs one that sees images")
    question = ask(vlm, see(vlm, image), text)
    prompt, is_visual = question.embedded, question.prompt.is_visual
    leaves = withdrawal_layer(method) if method else layers
    is_own = method is not None and spec_of(method) != f"withdraw:layer={leaves}"
    words = np.flatnonzero(~is_visual).tolist()
    looking = words[-max(MOST // (layers * len(is_visual)), 1) :]
    if looking != words:
        which = f"only the last {len(looking):,} of its {len(words):,} tokens of text show where they look"
        warnings.warn(f"a report on a prompt of {len(is_visual):,} tokens takes minutes; {which}", stacklevel=2)
    attention = traces(vlm.decoder, prompt, (), None, looking).attention.mean(2)  # (looking, layers, tokens)
    return Story(
        model=question.answer.stats["model"],
        question=text,
        **shown(vlm, question),
        frames=[framed(vlm, question, withdraw(layer)) for layer in range(layers + 1)],
        layer=leaves,
        own=framed(vlm, question, method) if is_own else None,
        attention=dict(zip(looking, attention)),
        shares={"withdrawn": settling(vlm.decoder, prompt, method), "full": settling(vlm.decoder, prompt)},
        even=float(even_shares(is_visual)[GROUPS.index("visual")]),
        worst=kl_curve(vlm.decoder, prompt, LONGEST_ANSWER, vlm.stop_ids),
        eta=stored_eta(vlm.folder),
        seconds=dict(zip(("withdrawn", "full"), timed(vlm, question, method, None))),
        horizon=horizon(vlm, question, leaves) if with_horizon else "",
    )


def report_data(story: Story) -> dict[str, Any]:
    """What the script of the report needs."""
    seen = {"heads": 1, "tokens": len(story.words)}
    eyes = {token: packed(attention) | seen for token, attention in story.attention.items()}
    told = {name: getattr(story, name) for name in ("words", "patches", "frames", "layer", "own")}
    return {"layers": len(story.frames) - 1, **told, "eyes": eyes}


def report_html(story: Story) -> str:
    """The whole report, text of an HTML file."""
    curve = np.array([frame["kl"] for frame in story.frames[:-1]])
    layers = list(range(len(curve)))
    lowest = np.log10(max(min(curve.min(), story.worst.min(), story.eta), 1e-6))
    decades = int(np.floor(lowest)), int(max(np.ceil(np.log10(max(story.worst.max(), 1e-6))), 0))
    order = [GROUPS.index(group) for group in ("visual", "sink", "nearest", "other")]
    bars = lambda name: stacked_bars(
        layers, [GROUPS[i] for i in order], story.shares[name][:, order], ("layer", "attention of the text"),
        even=story.even, layer=story.layer if name == "withdrawn" else None,
        label="where the text's attention goes, layer by layer",
    )  # fmt: skip
    text, drawn = sum(word is not None for word in story.words), len(story.attention)
    fewer = f" The prompt is long: only its last {drawn:,} of {text:,} tokens of text show it."
    seconds = zip(story.seconds["withdrawn"].items(), story.seconds["full"].values())
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
            "tiles": "".join(f'<div class="tile"><img src="{tile}" alt=""></div>' for tile in story.tiles),
            "curve": line_chart(
                layers, [("next token", "visual", curve), ("worst token", "sink dashed", story.worst)],
                ("layer", "KL, nats"), decades, story.eta, story.layer, label="KL divergence for each withdrawal layer",
            ),
            "bars withdrawn": bars("withdrawn"),
            "bars full": bars("full"),
            "horizon": filled("horizon.html", {"drawing": story.horizon}) if story.horizon else "",
            "even": f"{story.even:.0%}",
            "seconds": ", ".join(f"{phase} {1e3 * now:.1f} ms instead of {1e3 * full:.1f}" for (phase, now), full in seconds),
            "fewer": fewer if drawn < text else "",
            "model": escape(story.model),
            "question": escape(story.question),
            "data": json.dumps(report_data(story)).replace("<", "\\u003c"),  # which would end the script element
        },
    )  # fmt: skip
