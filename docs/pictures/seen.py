"""Draw seen.svg, what stands in the caches once an image has been seen, and what a question adds:

python docs/pictures/seen.py
"""

import pathlib

import minivtw
from minivtw.page.charts import WIDTH, legend, rectangle, standalone, svg, text

HERE = pathlib.Path(__file__).parent
QUESTION, LAYER = "What color is the star?", 5
ROW, TOP, UNIT = 14, 66, 2.5  # pixels: a layer's height, where the first one is, a token's width
PANELS = {52: None, 276: LAYER}  # where each begins, and K


def panel(vlm: minivtw.VLM, left: float, layer: int | None) -> list[str]:
    """A row per layer: its tokens at their positions in the prompt, in blue and orange what every question finds there."""
    seen = vlm.see(HERE / "scene.png", layer)
    stats = seen.ask(QUESTION, max_new_tokens=0).stats
    title = "left alone" if layer is None else f"withdrawn before layer {layer}"
    body = [text(left, TOP - 14, title, "start", "strong")]
    before, shared = int((~seen.is_visual).sum()), len(seen.is_visual)
    asked = sum(stats["tokens"].values()) - shared
    for index, held in enumerate(seen.cache.tokens_per_layer):
        y = TOP + index * ROW
        body.append(rectangle(left, y, before * UNIT, ROW - 3, "fill text"))
        body.append(rectangle(left + before * UNIT, y, (held - before) * UNIT, ROW - 3, "fill visual"))
        body.append(rectangle(left + shared * UNIT + 1, y, asked * UNIT, ROW - 3, "fill nearest"))
    y, reused = TOP + len(seen.cache.layers) * ROW + 16, stats["reused"]["flops"] / 1e6
    own = stats["flops"]["prefill"] / 1e6 - reused
    body.append(text(left, y, f"once: {reused:.0f} MFLOP, {seen.cache.nbytes / 1e3:.0f} kB", "start"))
    body.append(text(left, y + 18, f"per question: {own:.0f} MFLOP", "start"))
    return body


def draw(vlm: minivtw.VLM) -> str:
    body = legend([("text before it", "fill text"), ("the image", "fill visual"), ("a question", "fill nearest")])
    body += [text(46, TOP + index * ROW + 10, index, "end") for index in range(vlm.config.layers)]
    body += [text(46, TOP - 14, "layer", "end")]
    body += [mark for left, layer in PANELS.items() for mark in panel(vlm, left, layer)]
    words = "one bar per layer and, for two methods, the tokens in its cache; a question adds the same to both"
    assert max(PANELS) + 78 * UNIT < WIDTH
    return standalone(svg(body, TOP + vlm.config.layers * ROW + 44, words), "What stands in the cache after an image")


if __name__ == "__main__":
    from drawing import options

    options(__doc__).parse_args()
    (HERE / "seen.svg").write_text(draw(minivtw.load()), encoding="utf-8")
