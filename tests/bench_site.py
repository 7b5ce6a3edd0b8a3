"""How long the site takes until it can be touched, until the model runs, and for a move of K, in headless Chromium:

python -m tests.bench_site FOLDER (made by docs/site/build.py; needs chromedriver)
"""

import os
import pathlib
import statistics
import sys
import time

from .browser import Browser
from .site import served, until, until_kept

MOVES = 25
MOVED = """
const wall_ = document.getElementById("wall"), frame = () => new Promise(requestAnimationFrame);
frames.clear();  // each place is computed, none remembered
const started = performance.now();
wall.move(arguments[0]);
while (wall_.ariaBusy === "true") await frame();
await frame();  // what was changed is on the screen
return performance.now() - started;
"""
ANSWERED = """
const started = performance.now();
await ask({question: arguments[0]});
return performance.now() - started;
"""
QUESTIONS = "Describe the image.", "How many objects are there?", "Where is the star?", "What shape is the red object?"


USABLE = """
await ready;
await wall.move(3);
await new Promise(requestAnimationFrame);
return performance.now() / 1000;
"""


def visit(browser, address):
    """Seconds from the request until recorded answers can be dragged, and until the model runs."""
    browser.show("about:blank")
    started = time.perf_counter()
    browser.show(address)
    usable = browser.wait(USABLE)
    until(browser, "document.body.dataset.live", "the page does not become live")
    return usable, time.perf_counter() - started


def main(folder):
    print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    with served(pathlib.Path(folder)) as address, Browser() as browser:
        usable, cold = visit(browser, address)
        until_kept(browser)
        usable_again, warm = visit(browser, address)
        moves = [browser.wait(MOVED, step * 7 % 13) for step in range(1, MOVES + 1)]
        answers = [browser.wait(ANSWERED, question) for question in QUESTIONS]
    print(f"recorded answers can be dragged after {usable:.1f} s, on the second visit {usable_again:.1f} s")
    print(f"the model runs after {cold:.1f} s, on the second visit {warm:.1f} s")
    print(f"{MOVES} moves of K: median {statistics.median(moves):.0f} ms, longest {max(moves):.0f} ms until redrawn")
    print(f"an answer to a new question: {', '.join(f'{taken:.0f}' for taken in answers)} ms until it is on the screen")
    print(f"load {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
