"""Draw withdrawal.svg from what the embedded model really holds: python docs/pictures/draw.py"""

import pathlib

import minivtw

HERE = pathlib.Path(__file__).parent
UNIT, ROW, LEFT, TOP = 6.6, 17, 92, 54  # pixels: a token's width, a layer's height, the margins

STYLE = """
    text { font: 13px system-ui, sans-serif; fill: #333 }
    .small { font-size: 11px; fill: #666 }
    .visual { fill: #4a86c5 }
    .text { fill: #d98a3d }
    .gone { fill: none; stroke: #9aa5b1; stroke-dasharray: 3 3 }
    .door { stroke: #b5413b; stroke-width: 2 }
    .leave { fill: #b5413b; font-weight: 600 }
    @media (prefers-color-scheme: dark) { text { fill: #ddd } .small { fill: #aaa } .leave { fill: #f08a83 } .door { stroke: #f08a83 } }
"""


def bars(stats):
    """One row a layer, the first at the top: the visual and the text tokens that pass through it, to scale."""
    visual, text = stats["tokens"]["visual"], stats["tokens"]["text"]
    for layer in range(stats["layers"]):
        y = TOP + layer * ROW
        yield f'<text class="small" x="{LEFT - 8}" y="{y + 12}" text-anchor="end">layer {layer}</text>'
        if layer < stats["withdraw_layer"]:
            yield f'<rect class="visual" x="{LEFT}" y="{y + 1.5}" width="{visual * UNIT:.1f}" height="{ROW - 3}" rx="2"/>'
        yield f'<rect class="text" x="{LEFT + visual * UNIT:.1f}" y="{y + 1.5}" width="{text * UNIT:.1f}" height="{ROW - 3}" rx="2"/>'


def draw(stats):
    """The SVG text for the `stats` of an answer."""
    visual, text, layer = stats["tokens"]["visual"], stats["tokens"]["text"], stats["withdraw_layer"]
    width, height = LEFT + (visual + text) * UNIT + 24, TOP + stats["layers"] * ROW + 34
    split, door = LEFT + visual * UNIT, TOP + layer * ROW
    gone = (stats["layers"] - layer) * ROW
    saved = 1 - stats["flops"]["prefill"] / stats["flops"]["prefill_without_withdrawal"]
    lines = [
        f'<text x="{LEFT}" y="24">{visual} visual tokens</text>',
        f'<text x="{split:.1f}" y="24">{text} text tokens</text>',
        f'<text class="small" x="{LEFT}" y="42">one bar a layer; its length is what the layer computes and caches</text>',
        *bars(stats),
        f'<rect class="gone" x="{LEFT + 1}" y="{door + 5}" width="{visual * UNIT - 2:.1f}" height="{gone - 7}" rx="2"/>',
        f'<line class="door" x1="{LEFT - 60}" x2="{width - 12:.1f}" y1="{door}" y2="{door}"/>',
        f'<text class="leave" x="{LEFT + visual * UNIT / 2:.1f}" y="{door + gone / 2 + 6}" text-anchor="middle">before layer {layer} the visual tokens leave</text>',
        f'<text class="small" x="{LEFT}" y="{height - 12}">prefill: {saved:.1%} fewer operations than without withdrawal</text>',
    ]
    body = "\n  ".join(lines)
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height}" width="{width:.0f}" height="{height}">\n  <style>{STYLE}  </style>\n  {body}\n</svg>\n'


if __name__ == "__main__":
    result = minivtw.load().answer(HERE / "scene.png", "What color is the star?", max_new_tokens=0, withdraw=5)
    (HERE / "withdrawal.svg").write_text(draw(result.stats), encoding="utf-8")
