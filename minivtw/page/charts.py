"""Charts as SVG text: for the report, where they are part of the page, and for the docs, where each is a file.

Every column of a chart, most often a layer, is covered by an invisible band with its numbers as a `<title>`: hovering
shows them, in a page or in a bare file. Colours come from the style sheet, for light and for dark.
"""

import re
from collections.abc import Iterable, Sequence
from html import escape

import numpy as np

WIDTH, HEIGHT = 480, 250
HEAD = 26  # above a drawing, for its title
LEFT, RIGHT, TOP, BOTTOM = 50, 12, 42, 40  # the room around the plot: the legend goes above, the names below

COLORS = """
:root { --paper: #fff; --ink: #1d232b; --soft: #66707c; --grid: #e3e7ec; --mark: #b5413b;
  --visual: #4a86c5; --sink: #d98a3d; --nearest: #4f9d72; --other: #b3bbc4; --text: #d98a3d; --frozen: #b9d3ec; }
@media (prefers-color-scheme: dark) { :root {
  --paper: #14181d; --ink: #e6eaef; --soft: #9aa5b1; --grid: #2b333c; --mark: #f08a83;
  --visual: #64a3e6; --sink: #e8a15a; --nearest: #62bd8b; --other: #68737f; --text: #e8a15a; --frozen: #33536f; } }
"""
STYLE = """
svg.chart { font: 13px system-ui, sans-serif; display: block; width: 100%; height: auto; }
svg.chart text { fill: var(--soft); } svg.chart .strong { fill: var(--ink); font-weight: 600; }
svg.chart .grid { stroke: var(--grid); }
svg.chart .mark { stroke: var(--mark); stroke-width: 1.5; stroke-dasharray: 5 3; }
svg.chart .marked { fill: var(--mark); font-weight: 600; }
svg.chart .eta { stroke: var(--soft); stroke-dasharray: 2 3; }
svg.chart .line { fill: none; stroke-width: 2; stroke-linejoin: round; } svg.chart .dashed { stroke-dasharray: 6 4; }
svg.chart .band { fill: var(--ink); opacity: 0; } svg.chart .band:hover, svg.chart .band.chosen { opacity: .08; }
""" + "".join(
    f"svg.chart .fill.{name} {{ fill: var(--{name}); }} svg.chart .line.{name} {{ stroke: var(--{name}); }}\n"
    for name in ("visual", "sink", "nearest", "other", "mark", "text", "frozen")
)


def power_of_ten(power: int) -> str:
    raised = str(power).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"{10**power:g}" if -2 <= power <= 3 else f"10{raised}"


def svg(body: Iterable[str], height: float = HEIGHT, label: str = "") -> str:
    """A whole drawing, WIDTH wide, that scales with its surroundings. `label` is read by screen readers."""
    head = f'<svg class="chart" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(label)}">'
    return head + "".join(body) + "</svg>"


def standalone(drawing: str, title: str = "") -> str:
    """A drawing as a file of its own: its style inside, with the colours written out, for viewers without var().

    title: above it, so that it can stand on a slide, and before its label for screen readers.
    """
    light, dark = (dict(re.findall(r"--([\w-]+): (#\w+)", part)) for part in COLORS.split("@media"))
    style = STYLE + "svg.chart { background: var(--paper); } svg.chart text.title { font-size: 16px; }"
    written = [re.sub(r"var\(--([\w-]+)\)", lambda name: colors[name[1]], style) for colors in (light, dark)]
    style = f"<style>{written[0]}@media (prefers-color-scheme: dark) {{{written[1]}}}</style>"
    start = drawing.index(">") + 1
    opening = drawing[:start].replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ')
    if title:
        opening = opening.replace('aria-label="', f'aria-label="{title}: ')
        box = r'viewBox="0 0 (\d+) ([\d.]+)"'
        opening = re.sub(box, lambda size: f'viewBox="0 {-HEAD} {size[1]} {float(size[2]) + HEAD:g}"', opening)
        style += text(2, -9, title, "start", "strong title")
    return opening + style + drawing[start:] + "\n"


def text(x: float, y: float, words: object, anchor: str = "middle", kind: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{kind}">{escape(str(words))}</text>'


def line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{kind}"/>'


def rectangle(x: float, y: float, width: float, height: float, kind: str) -> str:
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(width, 0):.1f}" height="{max(height, 0):.1f}" class="{kind}"/>'


class Axes:
    """Where columns and values lie in the plot: shares from 0 to 1, or, with `decades` (low, high), powers of ten."""

    def __init__(self, columns: Sequence, decades: tuple[int, int] | None = None) -> None:
        self.columns = columns  # the name of each, shown below
        self.decades = decades
        self.step = (WIDTH - LEFT - RIGHT) / len(columns)

    def x(self, column: int) -> float:
        """The middle of a column."""
        return LEFT + (column + 0.5) * self.step

    def y(self, value: float) -> float:
        bottom = HEIGHT - BOTTOM
        if self.decades:
            low, high = self.decades
            value = (np.log10(max(value, 10.0**low)) - low) / (high - low)
        return bottom - min(max(value, 0), 1.05) * (bottom - TOP)

    def drawn(self, x_name: str, y_name: str) -> list[str]:
        """The grid, with its numbers and names."""
        if self.decades:
            ticks = [(10.0**power, power_of_ten(power)) for power in range(self.decades[0], self.decades[1] + 1)]
        else:
            ticks = [(share, f"{share:.0%}") for share in (0, 0.25, 0.5, 0.75, 1)]
        body = []
        for value, words in ticks:
            body.append(self.across(value, "grid"))
            body.append(text(LEFT - 6, self.y(value) + 4, words, "end"))
        every = -(-len(self.columns) // 16)  # a column's name needs room
        body += [text(self.x(i), HEIGHT - BOTTOM + 16, name) for i, name in enumerate(self.columns) if i % every == 0]
        body.append(text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, x_name))
        body.append(text(2, 12, y_name, "start", "strong"))
        return body

    def withdrawal(self, layer: int | None) -> list[str]:
        """A line where the image leaves."""
        if layer is None or layer >= len(self.columns):
            return []
        x, words = self.x(layer) - self.step / 2, f"image leaves, K = {layer}"
        side, anchor = (-5, "end") if layer > len(self.columns) / 2 else (5, "start")
        return [line(x, TOP - 14, x, HEIGHT - BOTTOM, "mark"), text(x + side, TOP - 7, words, anchor, "marked")]

    def across(self, value: float, kind: str) -> str:
        """A line at a value, over all columns."""
        return line(LEFT, self.y(value), WIDTH - RIGHT, self.y(value), kind)

    def bands(self, name: str, values: Iterable[Iterable[str]]) -> list[str]:
        """What each column says when it is pointed at: its name and its values."""
        body = []
        for i, (column, lines) in enumerate(zip(self.columns, values)):
            area = rectangle(self.x(i) - self.step / 2, TOP, self.step, HEIGHT - TOP - BOTTOM, "band")
            tip = "\n".join([f"{name} {column}", *lines])
            body.append(f'<g data-column="{i}">{area}<title>{escape(tip)}</title></g>')
        return body


def legend(entries: Sequence[tuple[str, str]]) -> list[str]:
    """Names with their colours, right-aligned above the plot. entries: [(name, kind)]."""
    x, body = float(WIDTH - RIGHT), list[str]()
    for name, kind in reversed(entries):
        x -= 7.9 * len(name)  # about the width of 13 px letters
        body.append(text(x, 12, name, "start"))
        body.append(line(x - 17, 8, x - 4, 8, kind) if "line" in kind else rectangle(x - 15, 2, 11, 11, kind))
        x -= 28
    return body


def line_chart(
    columns: Sequence,
    series: Sequence[tuple[str, str, Sequence[float] | np.ndarray]],
    names: tuple[str, str],
    decades: tuple[int, int] | None = None,
    threshold: float | None = None,
    layer: int | None = None,
    label: str = "",
) -> str:
    """Lines over columns.

    series: [(name, colour and style, values)]; names: (below, above); layer: where the image leaves.
    """
    axes = Axes(columns, decades)
    body = axes.drawn(*names)
    if threshold is not None:
        body += [axes.across(threshold, "eta"), text(WIDTH - RIGHT, axes.y(threshold) - 4, f"{threshold:g}", "end")]
    body += axes.withdrawal(layer)
    for _, kind, values in series:
        points = [(f"{axes.x(i):.1f}", f"{axes.y(value):.1f}") for i, value in enumerate(values)]
        body.append(f'<polyline points="{" ".join(map(",".join, points))}" class="line {kind}"/>')
        body += [f'<circle cx="{x}" cy="{y}" r="2.6" class="fill {kind.split()[0]}"/>' for x, y in points]
    shown = (lambda value: f"{value:.2g}") if decades else (lambda value: f"{value:.1%}")
    said = [[f"{name}: {shown(values[i])}" for name, _, values in series] for i in range(len(columns))]
    body += legend([(name, f"line {kind}") for name, kind, _ in series]) + axes.bands(names[0], said)
    return svg(body, label=label or f"{', '.join(name for name, *_ in series)}, by {names[0]}")


def stacked_bars(
    columns: Sequence,
    groups: Sequence[str],
    shares: Sequence[Sequence[float]] | np.ndarray,
    names: tuple[str, str],
    even: float | None = None,
    layer: int | None = None,
    label: str = "",
) -> str:
    """A bar per column, cut into shares that sum to 1. shares: (columns, groups); even: what attention without preference
    would give the first group, drawn as a line."""
    axes = Axes(columns)
    body = axes.drawn(*names)
    for i, parts in enumerate(shares):
        below = 0.0
        for group, share in zip(groups, parts):
            top, height = axes.y(below + share), axes.y(below) - axes.y(below + share)
            body.append(rectangle(axes.x(i) - 0.4 * axes.step, top, 0.8 * axes.step, height, f"fill {group}"))
            below += share
    if even is not None:
        body.append(axes.across(even, "eta"))
    body += axes.withdrawal(layer)
    said = [[f"{group}: {share:.1%}" for group, share in zip(groups, parts)] for parts in shares]
    body += legend([(group, f"fill {group}") for group in groups]) + axes.bands(names[0], said)
    return svg(body, label=label or f"{', '.join(groups)}, by {names[0]}")
