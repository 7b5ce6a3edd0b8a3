"""What the scripts of this folder share: `--help` for those that take nothing, and a chart as a file of its own."""

import argparse

from minivtw.page.charts import standalone

__all__ = ["options", "standalone"]


def options(doc: str) -> argparse.ArgumentParser:
    """A parser that shows a script's docstring for `--help`, and refuses what the script does not take."""
    return argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
