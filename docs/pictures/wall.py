"""Record the pages in headless Chromium: wall.webp, the wall on its way from 12 to 0, and report.png, the report.

python docs/pictures/wall.py    # needs chromium and chromedriver; a minute
"""

import io
import pathlib
import sys
import tempfile
import threading

from drawing import options
from PIL import Image

HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE.parent.parent))

import minivtw  # noqa: E402
from minivtw.explore import Server  # noqa: E402
from minivtw.page.exploring import Explorer  # noqa: E402
from tests.browser import Browser  # noqa: E402

WIDTH, HEIGHT = 1100, 744
QUESTION = "What color is the star?"
READY = "await ready; await ask({question: arguments[0]}); await wall.move(arguments[1]);"
MILLISECONDS = 500  # a layer
SCALE = 0.7  # of the animation


def shot(browser, folder):
    """The window as a Pillow image."""
    browser.picture(folder / "shot.png", {"x": 0, "y": 0, "width": WIDTH, "height": HEIGHT})
    return Image.open(io.BytesIO((folder / "shot.png").read_bytes())).convert("RGB")


def record(server, folder):
    with Browser() as browser:
        browser.show(server.address, width=WIDTH, height=HEIGHT)
        layers = server.explorer.vlm.config.layers
        browser.wait(READY, QUESTION, layers)
        frames = []
        for layer in range(layers, -1, -1):
            browser.wait("await wall.move(arguments[0]); await new Promise(done => setTimeout(done, 400))", layer)
            frames.append(shot(browser, folder))
        browser.show(HERE.parent / "reports" / "star.html")
        browser.wait("await new Promise(done => setTimeout(done, 600))")  # the answer fades in
        browser.picture(HERE / "report.png")
    size = round(WIDTH * SCALE), round(HEIGHT * SCALE)
    small = [frame.resize(size, Image.Resampling.LANCZOS) for frame in frames]
    times = [3 * MILLISECONDS, *[MILLISECONDS] * (len(small) - 2), 4 * MILLISECONDS]
    small[0].save(
        HERE / "wall.webp", save_all=True, append_images=small[1:], duration=times, loop=0, quality=80, method=6
    )


def main():
    options(__doc__).parse_args()
    vlm = minivtw.load()
    with (
        Server(Explorer(vlm, vlm.method("auto"), str(HERE / "scene.png"))) as server,
        tempfile.TemporaryDirectory() as folder,
    ):
        threading.Thread(target=server.serve_forever, daemon=True).start()
        record(server, pathlib.Path(folder))
        server.shutdown()


if __name__ == "__main__":
    main()
