"""What the scripts of this folder share: `--help` for those that take nothing, and a chart as a file of its own."""

import argparse
import re

from minivtw.page.charts import COLORS, STYLE


def options(doc: str) -> argparse.ArgumentParser:
    """A parser that shows a script's docstring for `--help`, and refuses what the script does not take."""
    return argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


def standalone(drawing: str) -> str:
    """A drawing as a file of its own, with its style inside; its colours are written out, for viewers without var()."""
    light, dark = (dict(re.findall(r"--([\w-]+): (#\w+)", part)) for part in COLORS.split("@media"))
    style = STYLE + "svg.chart { background: var(--paper); }"
    written = [re.sub(r"var\(--([\w-]+)\)", lambda name: colors[name[1]], style) for colors in (light, dark)]
    style = f"<style>{written[0]}@media (prefers-color-scheme: dark) {{{written[1]}}}</style>"
    start = drawing.index(">") + 1
    return drawing[:start].replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ') + style + drawing[start:] + "\n"
