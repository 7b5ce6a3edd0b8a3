"""How long the live page takes from a move of K to the redrawn page, in headless Chromium (needs chromedriver):

python -m tests.bench_explore [MODEL]
"""

import statistics
import sys
import threading

import minivtw
from minivtw import explore
from minivtw.page import exploring

from .browser import Browser

MOVES = 25
MOVED = """
await ready;
const wall_ = document.getElementById("wall"), frame = () => new Promise(requestAnimationFrame);
const quiet = async () => { while (wall_.ariaBusy === "true") await frame(); };
await quiet();
const taken = [];
for (const layer of arguments[0]) {
  const started = performance.now();
  wall.move(layer);
  await quiet();
  await frame();  // what was changed is on the screen
  taken.push(performance.now() - started);
}
return taken;
"""


def main(model=None):
    vlm = minivtw.load(model)
    layers = vlm.config.layers
    with explore.Server(exploring.Explorer(vlm, vlm.method("auto"))) as server, Browser() as browser:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        browser.show(server.address)
        taken = browser.wait(MOVED, [step * 7 % (layers + 1) for step in range(1, MOVES + 1)])
        server.shutdown()
    middle, worst = statistics.median(taken), max(taken)
    print(f"{vlm.folder.name}: {len(taken)} moves of K, median {middle:.0f} ms, longest {worst:.0f} ms until redrawn")


if __name__ == "__main__":
    main(*sys.argv[1:])
