"""Over which tokens the image reaches the answer, what is written in its patches, and wrong answers by K.

A part of `phenomena.py`.
"""

import instruments
import knock_outs
import numpy as np
from filling import HERE, embedded, fill, names, table, write

from minivtw.analysis import migration
from minivtw.methods.withdrawal import withdraw
from minivtw.page import charts, page
from minivtw.search.layer import LONGEST_ANSWER, run_in_full

WINDOW = 3  # layers
STAR = ("scene.png", "What color is the star?")
CUTS = {
    "image → question": ("question", "image", "visual"),
    "image → last": ("last", "image", "sink"),
    "question → last": ("last", "question", "nearest dashed"),
}
PANELS, COLUMNS = 6, 2  # layers of which the words in the patches are drawn


def routes(about):
    """Three ways cut one at a time, in all layers and in windows of three; and one token alone that may look."""
    vlm, layers, by_family, windows, alone = about.vlm, about.vlm.config.layers, {}, [], {}
    cut_in = [range(first, min(first + WINDOW, layers)) for first in range(0, layers, 2 if layers > 20 else 1)]
    for question in about.some("routes"):
        prompt = embedded(vlm, question.image, question.question)
        answer = run_in_full(vlm.decoder, prompt, LONGEST_ANSWER, vlm.stop_ids).answer
        left = by_family.setdefault(question.family, [])
        ranges = [range(layers), *(cut_in if len(left) < about.counts["crossing"] else ())]
        shares = cut_ways(vlm, prompt, answer, ranges)  # (ways, ranges)
        left.append(shares[:, 0])
        if len(ranges) > 1:
            windows.append(shares[:, 1:])
        if question.family in ("attribute", "reading"):
            alone.setdefault(question.family, []).append(one_alone(about, question, prompt, answer))
    rows = [[way, *(f"{np.mean(left, axis=0)[i]:.0%}" for left in by_family.values())] for i, way in enumerate(CUTS)]
    fill(about.page, "routes", table(["cut in all layers", *by_family], rows))
    shares, columns = np.mean(windows, axis=0), [each[0] for each in cut_in]
    series = [(way, look, shares[i]) for i, (way, (_, _, look)) in enumerate(CUTS.items())]
    write(
        f"routes{about.suffix}",
        charts.line_chart(columns, series, ("layer i: cut in layers i to i + 2", "")),
        f"The answer's probability after a cut: {about.called}",
    )
    rows = [[way, *(f"{share:.0%}" for share in shares[i])] for i, way in enumerate(CUTS)]
    fill(about.data, "routes", table(["cut in three layers from layer", *columns], rows))
    rows = [
        [f"{kind} ({len(left)} questions)", *(f"{share:.0%}" for share in np.mean(left, axis=0))]
        for kind, left in alone.items()
    ]
    heading = [
        f"from layer {about.alone_from} on only one looks",
        "the word before “?”",
        "the last token",
        "the best other",
    ]
    fill(about.page, "alone", table(heading, rows))
    fill(about.page, "alone says", said_alone(about))


def cut_ways(vlm, prompt, answer, ranges):
    """The share of the answer's probability that is left with each of CUTS, (ways, ranges)."""
    roles = knock_outs.roles(knock_outs.with_answer(vlm.decoder, prompt, answer).is_visual, len(answer))._asdict()
    cuts = [
        knock_outs.Cut(roles[queries], roles[keys], layers) for queries, keys, _ in CUTS.values() for layers in ranges
    ]
    whole, left = knock_outs.knock_outs(vlm.decoder, prompt, answer, cuts)
    return left.reshape(len(CUTS), -1) / whole


def shares_alone(about, prompt, answer):
    """What is left if from some layer on one token alone may look: (text tokens after the image,)."""
    deep = range(about.alone_from, about.vlm.config.layers)
    whole, left = instruments.only_one_attends(about.vlm.decoder, prompt, answer, deep)
    return left / whole


def one_alone(about, question, prompt, answer):
    """The same for the word before the question mark, for the last token, and for the best of all others."""
    left, words = shares_alone(about, prompt, answer), words_after(about.vlm, question.image, question.question)
    named, last = words.index("?") - 1, len(left) - 1
    return left[named], left[last], np.delete(left, [named, last]).max()


def words_after(vlm, picture, question):
    """The prompt's text tokens after the first visual one, as text."""
    prompt = vlm.prepare(picture, question)
    after = ~prompt.is_visual & (np.cumsum(prompt.is_visual) > 0)
    return [names(vlm, token) for token in prompt.token_ids[after]]


def said_alone(about):
    """One example, in a line."""
    vlm, picture, question = about.vlm, HERE / STAR[0], STAR[1]
    prompt = embedded(vlm, picture, question)
    left = shares_alone(about, prompt, run_in_full(vlm.decoder, prompt, LONGEST_ANSWER, vlm.stop_ids).answer)
    said = [word.strip().replace("\\|", "|") or "\\n" for word in words_after(vlm, picture, question)]
    parts = [f"`{word}` {share:.0%}" for word, share in zip(said, left)]
    return f"About `scene.png`, each token of the prompt as the only one: {', '.join(parts)}."


def words(about):
    """The lens on every visual token, drawn on the picture at some depths; all of it goes into the data."""
    vlm, picture = about.vlm, HERE / STAR[0]
    prompt = vlm.prepare(picture, STAR[1])
    read = instruments.visual_lens(vlm.decoder, migration.layer_inputs(vlm.decoder, embedded(vlm, picture, STAR[1])))
    (tile,) = page.as_seen(vlm.parts.vision, prompt.tiles)
    side, place, layers = round(read.token_ids.shape[1] ** 0.5), 232, vlm.config.layers
    body = [f'<defs><image id="tile" href="{page.data_url(tile)}" width="{place}" height="{place}"/></defs>']
    for panel, layer in enumerate(np.linspace(0, layers, PANELS).round().astype(int)):
        x, y = panel % COLUMNS * (place + 8) + 4, panel // COLUMNS * (place + 24) + 18
        name = f"after layer {layer - 1}" if layer else "as they arrive"
        body.append(charts.text(x, y - 5, name, "start", "strong"))
        body.append(f'<rect x="{x}" y="{y}" width="{place}" height="{place}" fill="#fff"/>')  # in the dark, too
        body.append(f'<use href="#tile" x="{x}" y="{y}" opacity=".35"/>')
        for patch, token in enumerate(read.token_ids[layer]):
            left, top = x + (patch % side + 0.5) * place / side, y + (patch // side + 0.5) * place / side + 2
            label = charts.text(left, top, names(vlm, token)[:7], "middle", "word")
            body.append(label.replace("</text>", f"<title>{read.probabilities[layer, patch]:.0%}</title></text>"))
    style = "<style>svg.chart .word { font-size: 7px; fill: #111; }</style>"
    write(
        f"words{about.suffix}",
        charts.svg(
            [style, *body], -(-PANELS // COLUMNS) * (place + 24), "the likeliest word on every patch, at six depths"
        ),
        f"The word that each patch would say: {about.called}",
    )
    said = [[names(vlm, token).replace("`", "'") for token in tokens] for tokens in read.token_ids]
    rows = [[layer, f"`{' '.join(word.strip() or '·' for word in row)}`"] for layer, row in enumerate(said)]
    fill(about.data, "words", table(["layer that they enter", "the likeliest word of each patch, row by row"], rows))


def wrong(about):
    """What a caption becomes if the image leaves too early."""
    vlm, layers = about.vlm, about.vlm.config.layers
    prompt = embedded(vlm, HERE / "scene.png", "Describe the image.")
    tried = [*(range(layers) if layers < 20 else (1, 6, 9, 14, 18, 22, 23, 24)), layers]
    outcomes = instruments.redundancy(vlm.decoder, prompt, [withdraw(k) for k in tried], vlm.stop_ids, 24)
    said = [vlm.tokenizer.decode(outcome.answer).strip() for outcome in outcomes]
    rows = [[k if k < layers else "off", text] for k, text in zip(tried, said)]
    fill(about.data, "wrong", table(["K", "the caption of `scene.png`"], rows))
    right = next(i for i in range(len(tried)) if all(text == said[-1] for text in said[i:]))
    chosen = sorted({tried.index(1), tried.index(about.alone_from), max(right - 1, 0), right})
    fill(about.page, "wrong", table(["K", "the caption of `scene.png`"], [rows[i] for i in chosen]))
