"""What the scripts of this folder share: `--help` for those that take nothing, and a chart as a file of its own."""

import argparse
import re

from minivtw.page.charts import COLORS, STYLE, text

HEAD = 26  # pixels above a drawing, for its title


def options(doc: str) -> argparse.ArgumentParser:
    """A parser that shows a script's docstring for `--help`, and refuses what the script does not take."""
    return argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


def standalone(drawing: str, title: str) -> str:
    """A drawing as a file of its own that can stand on a slide: its title above it, and before its label for screen readers.

    Its style is inside, the colours written out, for viewers without var().
    """
    light, dark = (dict(re.findall(r"--([\w-]+): (#\w+)", part)) for part in COLORS.split("@media"))
    style = STYLE + "svg.chart { background: var(--paper); } svg.chart text.title { font-size: 16px; }"
    written = [re.sub(r"var\(--([\w-]+)\)", lambda name: colors[name[1]], style) for colors in (light, dark)]
    style = f"<style>{written[0]}@media (prefers-color-scheme: dark) {{{written[1]}}}</style>"
    start = drawing.index(">") + 1
    opening = drawing[:start].replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ')
    opening = opening.replace('aria-label="', f'aria-label="{title}: ')
    opening = re.sub(
        r'viewBox="0 0 (\d+) ([\d.]+)"', lambda box: f'viewBox="0 {-HEAD} {box[1]} {float(box[2]) + HEAD:g}"', opening
    )
    return opening + style + text(2, -9, title, "start", "strong title") + drawing[start:] + "\n"
