"""Draw what every layer of a model does with an image's tokens: python docs/pictures/draw.py [MODEL]

From what ran under the method that is stored with the model. Writes withdrawal.svg for the embedded model, and
schedule-MODEL.svg for another.
"""

from drawing import options
from filling import HERE

import minivtw

UNIT, ROW, LEFT, TOP = 6.6, 17, 92, 54  # pixels: a token's width, a layer's height, the margins

STYLE = """
    text { font: 13px system-ui, sans-serif; fill: #333 }
    .small { font-size: 11px; fill: #666 } .title { font-size: 16px; font-weight: 600 }
    .visual { fill: #4a86c5 }
    .read { fill: #4a86c5; opacity: .35 }
    .text { fill: #d98a3d }
    .gone { fill: none; stroke: #9aa5b1; stroke-dasharray: 3 3 }
    .wall { stroke: #b5413b; stroke-width: 2 }
    .leave { fill: #b5413b; font-weight: 600 }
    @media (prefers-color-scheme: dark) {
      text { fill: #ddd } .small { fill: #aaa } .leave { fill: #f08a83 } .wall { stroke: #f08a83 }
    }
"""


def box(kind, x, y, width, height):
    return f'<rect class="{kind}" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" rx="2"/>'


def bars(stats):
    """A row per layer, the first at the top, to scale: the text, and the visual tokens worked on and only read there."""
    text, prefill = stats["tokens"]["text"], stats["prefill"]
    for layer, (entered, worked) in enumerate(zip(prefill["entered"], prefill["worked"])):
        y, busy, there = TOP + layer * ROW, (worked - text) * UNIT, (entered - text) * UNIT
        image = LEFT + text * UNIT
        yield f'<text class="small" x="{LEFT - 8}" y="{y + 12}" text-anchor="end">layer {layer}</text>'
        yield box("text", LEFT, y + 1.5, text * UNIT, ROW - 3)
        if busy:
            yield box("visual", image, y + 1.5, busy, ROW - 3)
        if there > busy:
            yield box("read", image + busy, y + 1.5, there - busy, ROW - 3)


def draw(stats):
    """The SVG text for the `stats` of an answer."""
    visual, text, entered = stats["tokens"]["visual"], stats["tokens"]["text"], stats["prefill"]["entered"]
    width, height = LEFT + (visual + text) * UNIT + 24, TOP + stats["layers"] * ROW + 34
    split, is_read = LEFT + text * UNIT, stats["prefill"]["worked"] != entered
    saved = 1 - stats["flops"]["prefill"] / stats["flops"]["prefill_without_withdrawal"]
    says = "one bar per layer: what it works on" + (", paler what it only reads" if is_read else " and caches")
    title = f"What each layer of {stats['model']} does with the tokens"
    lines = [
        f'<text class="title" x="{LEFT}" y="0">{title}</text>',
        f'<text x="{LEFT}" y="24">{text} text tokens</text>',
        f'<text x="{split + 20:.1f}" y="24">{visual} visual tokens</text>',
        f'<text class="small" x="{LEFT}" y="42">{says}</text>',
        *bars(stats),
    ]
    if text in entered:  # all visual tokens leave
        layer = entered.index(text)
        wall, gone = TOP + layer * ROW, (stats["layers"] - layer) * ROW
        words, middle = f"before layer {layer} the visual tokens leave", split + visual * UNIT / 2
        lines += [
            box("gone", split + 1, wall + 5, visual * UNIT - 2, gone - 7),
            f'<line class="wall" x1="{LEFT - 60}" x2="{width - 12:.1f}" y1="{wall}" y2="{wall}"/>',
            f'<text class="leave" x="{middle:.1f}" y="{wall + gone / 2 + 6}" text-anchor="middle">{words}</text>',
        ]
    less = f"prefill: {saved:.1%} fewer operations than without withdrawal"
    lines.append(f'<text class="small" x="{LEFT}" y="{height - 12}">{less}</text>')
    size = f'viewBox="0 -18 {width:.0f} {height + 18}" width="{width:.0f}" height="{height + 18}" role="img" aria-label="{title}: {says}; {less}"'
    body = "\n  ".join(lines)
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>\n  <style>{STYLE}  </style>\n  {body}\n</svg>\n'


if __name__ == "__main__":
    parser = options(__doc__)
    parser.add_argument("model", nargs="?", metavar="MODEL")
    model = parser.parse_args().model
    result = minivtw.load(model).answer(
        HERE / "scene.png", "What color is the star?", max_new_tokens=0, withdraw="auto" if model else 5
    )
    name = f"schedule-{model}.svg" if model else "withdrawal.svg"
    (HERE / name).write_text(draw(result.stats), encoding="utf-8")
