"""Draw rooms.svg: the files of the package, in their rooms, and which room imports which: python docs/pictures/rooms.py"""

import ast
import pathlib
from collections import Counter

HERE = pathlib.Path(__file__).parent
PACKAGE = HERE.parent.parent / "minivtw"
ROWS = [
    ["plug", "commands"], ["page", "timing"], ["analysis", "search"], ["cli"], ["held"], ["checkpoints"], ["methods", "inputs"], ["model"]
]  # fmt: skip
HELD = {
    "vlm",
    "loading",
    "counting",
    "saved",
    "seen",
}  # what a user holds; a room otherwise is a folder, and the files above them the commands
STYLE = """
  text { font: 12.5px system-ui, sans-serif; fill: #1d232b } .small { font-size: 11px; fill: #66707c } .name { font-weight: 600 }
  .room { fill: #edf3f9; stroke: #4a86c5 } .model { fill: #f9ede2; stroke: #d98a3d }
  .arrow { stroke: #66707c; fill: none; marker-end: url(#head) } .head { fill: #66707c }
  @media (prefers-color-scheme: dark) { .room { fill: #16202b } .model { fill: #2b2118 } text { fill: #e6eaef } .small { fill: #9aa5b1 } .arrow { stroke: #9aa5b1 } }
"""


def room_of(module):
    """The room of a module's dotted name inside the package; none for what all import."""
    first = module.partition(".")[0]
    if "." in module or (PACKAGE / first).is_dir():
        return first
    return "held" if first in HELD else "" if first in ("errors", "threads", "__init__") else "commands"


def imports_of(path):
    """The dotted names, inside the package, of what a file imports from it."""
    package = path.relative_to(PACKAGE).parent.parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = [*package[: len(package) - node.level + 1], *(node.module or "").split(".")]
            target = ".".join(part for part in base if part)
            yield from [target] if target else [alias.name for alias in node.names]


def read():
    """(room -> its files with their lines, (room, room) -> how many imports)"""
    files, arrows = {}, Counter()
    for path in sorted(PACKAGE.rglob("*.py")):
        module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if lines and room_of(module):
            files.setdefault(room_of(module), []).append((path.name, lines))
        for target in imports_of(path):
            if room_of(module) and room_of(target) and room_of(target) != room_of(module):
                arrows[room_of(module), room_of(target)] += 1
    return files, arrows


def draw(files, arrows):
    """The SVG text."""
    width, columns, boxes, body, under, y = 720, 4, {}, [], [], 14
    for row in ROWS:
        each = (width - 28 - 20 * (len(row) - 1)) / len(row)
        height = 0
        for place, room in enumerate(row):
            x = 14 + place * (each + 20)
            fit = max(1, min(columns, int(each // 158)))
            listed = [f"{name} {lines}" for name, lines in files[room] if not name.startswith("__")]
            high = 34 + 17 * -(-len(listed) // fit)
            boxes[room], height = (x, y, each, high), max(height, high)
            total = sum(lines for _, lines in files[room])
            body.append(
                f'<rect class="{"model" if room == "model" else "room"}" x="{x:.0f}" y="{y}" width="{each:.0f}" height="{high}" rx="8"/>'
            )
            body.append(f'<text class="name" x="{x + 10:.0f}" y="{y + 19}">{room}</text>')
            body.append(
                f'<text class="small" x="{x + each - 10:.0f}" y="{y + 19}" text-anchor="end">{total} lines</text>'
            )
            for index, words in enumerate(listed):
                left, top = x + 10 + index % fit * (each - 12) / fit, y + 37 + index // fit * 17
                body.append(f'<text class="small" x="{left:.0f}" y="{top}">{words}</text>')
        y += height + 34
    for source, target in arrows:
        (x1, y1, w1, h1), (x2, y2, w2, _) = boxes[source], boxes[target]
        if y2 > y1:
            under.append(
                f'<path class="arrow" d="M{x1 + w1 * (0.3 + 0.4 * (x2 > x1)):.0f} {y1 + h1}L{x2 + w2 * (0.3 + 0.4 * (x1 > x2)):.0f} {y2 - 2}"/>'
            )
    head = '<marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto"><path class="head" d="M0 0l8 4-8 4z"/></marker>'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {y - 20}" role="img" aria-label="the folders of the package with their files, and which folder imports which">\n<style>{STYLE}</style><defs>{head}</defs>\n'
        + "\n".join(under + body)  # the arrows pass under the rooms
        + "\n</svg>\n"
    )


if __name__ == "__main__":
    from drawing import options

    options(__doc__).parse_args()
    (HERE / "rooms.svg").write_text(draw(*read()), encoding="utf-8")
