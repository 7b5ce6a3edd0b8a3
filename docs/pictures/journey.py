"""Draw journey.svg, the map of chapter 1, from what the embedded model really does: python docs/pictures/journey.py"""

import base64
import pathlib

from drawing import options

import minivtw

HERE = pathlib.Path(__file__).parent
QUESTION = "What color is the star?"
STYLE = """
  text { font: 13px system-ui, sans-serif; fill: #1d232b } .small { font-size: 11.5px; fill: #66707c }
  .name { font-weight: 600 } .title { font-size: 17px; font-weight: 600 } .visual { fill: #4a86c5 } .text { fill: #d98a3d } .grid { stroke: #fff; stroke-opacity: .55 }
  .arrow { stroke: #66707c; stroke-width: 1.5; fill: none; marker-end: url(#head) } .head { fill: #66707c }
  .wall { stroke: #b5413b; stroke-width: 2 } .leave { fill: #b5413b; font-weight: 600; font-size: 11.5px }
  @media (prefers-color-scheme: dark) { text { fill: #e6eaef } .small { fill: #9aa5b1 } .leave { fill: #f08a83 }
    .wall { stroke: #f08a83 } .arrow { stroke: #9aa5b1 } .head { fill: #9aa5b1 } }
"""


def cells(x, y, count, kind, columns, size=7.0):
    """One square per token, in rows of `columns`."""
    for index in range(count):
        left, top = x + index % columns * size, y + index // columns * size
        yield f'<rect class="{kind}" x="{left:.1f}" y="{top:.1f}" width="{size - 1.2:.1f}" height="{size - 1.2:.1f}" rx="1"/>'


def words(x, y, text, kind="", anchor="start"):
    return f'<text x="{x}" y="{y}" class="{kind}" text-anchor="{anchor}">{text}</text>'


def draw(answer):
    """The SVG text of one question's way, from the `Answer` of a prefill and the token after it."""
    entered, visual, text = (
        answer.stats["prefill"]["entered"],
        answer.stats["tokens"]["visual"],
        answer.stats["tokens"]["text"],
    )
    leaves, side = entered.index(text), round(visual**0.5)
    picture = base64.b64encode((HERE / "scene.png").read_bytes()).decode()
    step = 112 / side
    grid = [f'<path class="grid" d="M{20 + i * step:.1f} 44v112M20 {44 + i * step:.1f}h112"/>' for i in range(1, side)]
    body = [
        words(20, -4, "An image and a question become an answer", "title"), words(20, 24, "image", "name"), f'<image x="20" y="44" width="112" height="112" href="data:image/png;base64,{picture}"/>',
        *grid, words(20, 174, f"cut into {side} x {side} patches", "small"),
        '<path class="arrow" d="M140 100h32"/>',
        words(182, 24, "vision tower", "name"), words(182, 40, "and connector", "small"),
        *cells(186, 66, visual, "visual", side), words(182, 174, f"{visual} visual tokens", "small"),
        '<path class="arrow" d="M252 100h30"/>',
        words(20, 216, "question", "name"), words(20, 236, f"“{QUESTION}”", "small"),
        words(186, 216, "tokenizer", "name"), *cells(186, 226, text, "text", text), words(186, 252, f"{text} text tokens", "small"),
        '<path class="arrow" d="M284 232h14"/>',
        words(308, 24, "decoder", "name"), words(376, 24, f"{len(entered)} layers, one bar each: the tokens in it", "small"),
    ]  # fmt: skip
    unit, row = 3.6, 15
    for layer, tokens in enumerate(entered):
        y = 40 + layer * row
        body.append(words(340, y + 10, layer, "small", "end"))
        body.append(f'<rect class="text" x="348" y="{y}" width="{text * unit:.1f}" height="{row - 3}" rx="2"/>')
        if tokens > text:
            body.append(
                f'<rect class="visual" x="{350 + text * unit:.1f}" y="{y}" width="{(tokens - text) * unit:.1f}" height="{row - 3}" rx="2"/>'
            )
    y = 40 + leaves * row - 1.5
    body += [
        f'<path class="wall" d="M318 {y:.1f}h320"/>',
        words(402, y + 18, f"before layer {leaves} the image leaves", "leave"),
    ]
    bottom = 40 + len(entered) * row
    body += [
        f'<path class="arrow" d="M372 {bottom + 2}v16"/>', words(348, bottom + 36, f"next token: “{answer.text}”", "name"),
        words(348, bottom + 54, "fed back in, one at a time, until the answer ends", "small"),
    ]  # fmt: skip
    head = '<marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto"><path class="head" d="M0 0l8 4-8 4z"/></marker>'
    height = bottom + 66
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 -24 660 {height + 24}" role="img" aria-label="an image and a question on '
        f'their way through the model: {visual} visual and {text} text tokens, and before layer {leaves} the image leaves">\n<style>{STYLE}</style><defs>{head}</defs>\n'
        + "\n".join(body)
        + "\n</svg>\n"
    )


if __name__ == "__main__":
    options(__doc__).parse_args()
    (HERE / "journey.svg").write_text(
        draw(minivtw.load().answer(HERE / "scene.png", QUESTION, max_new_tokens=1, withdraw=5)), encoding="utf-8"
    )
