"""Charts as SVG text: for the report, where they are part of the page, and for the docs, where each is a file.

Every column of a chart, most often a layer, is covered by an invisible band with its numbers as a `<title>`: hovering
shows them, in a page or in a bare file. Colours come from the style sheet, for light and for dark.
"""

from collections.abc import Iterable, Sequence
from html import escape

import numpy as np

WIDTH, HEIGHT = 480, 250
LEFT, RIGHT, TOP, BOTTOM = 50, 12, 42, 40  # the room around the plot: the legend goes above, the names below

COLORS = """
:root { --paper: #fff; --ink: #1d232b; --soft: #66707c; --grid: #e3e7ec; --mark: #b5413b;
  --visual: #4a86c5; --sink: #d98a3d; --nearest: #4f9d72; --other: #b3bbc4; }
@media (prefers-color-scheme: dark) { :root {
  --paper: #14181d; --ink: #e6eaef; --soft: #9aa5b1; --grid: #2b333c; --mark: #f08a83;
  --visual: #64a3e6; --sink: #e8a15a; --nearest: #62bd8b; --other: #68737f; } }
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
    for name in ("visual", "sink", "nearest", "other", "mark")
)


def power_of_ten(power: int) -> str:
    raised = str(power).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"{10**power:g}" if -2 <= power <= 3 else f"10{raised}"


def svg(body: Iterable[str], height: float = HEIGHT, label: str = "") -> str:
    """A whole drawing, WIDTH wide, that scales with its surroundings. `label` is read by screen readers."""
    head = f'<svg class="chart" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(label)}">'
    return head + "".join(body) + "</svg>"


def text(x: float, y: float, words: object, anchor: str = "middle", kind: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{kind}">{escape(str(words))}</text>'


def line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{kind}"/>'


def rectangle(x: float, y: float, width: float, height: float, kind: str) -> str:
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(width, 0):.1f}" height="{max(height, 0):.1f}" class="{kind}"/>'


def band(column: int, area: str, tip: str) -> str:
    """A part of the drawing that says what it shows when it is pointed at."""
    return f'<g data-column="{column}">{area}<title>{escape(tip)}</title></g>'


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
            body.append(line(LEFT, self.y(value), WIDTH - RIGHT, self.y(value), "grid"))
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

    def bands(self, tips: Iterable[str]) -> list[str]:
        """What a column says when it is pointed at."""
        return [
            band(i, rectangle(self.x(i) - self.step / 2, TOP, self.step, HEIGHT - TOP - BOTTOM, "band"), tip)
            for i, tip in enumerate(tips)
        ]


def legend(entries: Sequence[tuple[str, str]]) -> list[str]:
    """Names with their colours, right-aligned above the plot. entries: [(name, kind)]."""
    x, body = float(WIDTH - RIGHT), list[str]()
    for name, kind in reversed(entries):
        x -= 7.9 * len(name)  # about the width of 13 px letters
        body.append(text(x, 12, name, "start"))
        swatch = line(x - 17, 8, x - 4, 8, f"line {kind}") if "line" in kind else rectangle(x - 15, 2, 11, 11, kind)
        body.append(swatch.replace("line line", "line"))
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
        body += [line(LEFT, axes.y(threshold), WIDTH - RIGHT, axes.y(threshold), "eta")]
        body += [text(WIDTH - RIGHT, axes.y(threshold) - 4, f"{threshold:g}", "end")]
    body += axes.withdrawal(layer)
    for _, kind, values in series:
        points = " ".join(f"{axes.x(i):.1f},{axes.y(value):.1f}" for i, value in enumerate(values))
        body.append(f'<polyline points="{points}" class="line {kind}"/>')
        color = kind.split()[0]
        body += [
            f'<circle cx="{axes.x(i):.1f}" cy="{axes.y(value):.1f}" r="2.6" class="fill {color}"/>'
            for i, value in enumerate(values)
        ]
    shown = (lambda value: f"{value:.2g}") if decades else (lambda value: f"{value:.1%}")
    tips = [
        "\n".join([f"{names[0]} {column}"] + [f"{name}: {shown(values[i])}" for name, _, values in series])
        for i, column in enumerate(columns)
    ]
    body += legend([(name, f"line {kind}") for name, kind, _ in series]) + axes.bands(tips)
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
            top = axes.y(below + share)
            left, wide = axes.x(i) - 0.4 * axes.step, 0.8 * axes.step
            body.append(rectangle(left, top, wide, axes.y(below) - top, f"fill {group}"))
            below += share
    if even is not None:
        body.append(line(LEFT, axes.y(even), WIDTH - RIGHT, axes.y(even), "eta"))
    body += axes.withdrawal(layer)
    tips = [
        "\n".join([f"{names[0]} {column}"] + [f"{group}: {share:.1%}" for group, share in zip(groups, parts)])
        for column, parts in zip(columns, shares)
    ]
    body += legend([(group, f"fill {group}") for group in groups]) + axes.bands(tips)
    return svg(body, label=label or f"{', '.join(groups)}, by {names[0]}")
