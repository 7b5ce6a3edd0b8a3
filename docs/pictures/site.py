"""Record the site in headless Chromium: recorded answers while the model is fetched, live, and with a method of one's own.

python docs/pictures/site.py    # needs chromium and chromedriver, and Pyodide's files (`python -m tests.runtime`); a minute
"""

import io
import pathlib
import sys
import tempfile

from drawing import options
from PIL import Image

HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE.parent.parent))

from tests.browser import Browser  # noqa: E402
from tests.site import built, served, until  # noqa: E402


def shot(browser, folder, name, width, height, scale=1.0):
    """The window as a small PNG."""
    browser.wait("await new Promise(done => setTimeout(done, 400))")  # an answer fades in
    browser.picture(folder / "shot.png", {"x": 0, "y": browser.run("return scrollY"), "width": width, "height": height})
    image = Image.open(io.BytesIO((folder / "shot.png").read_bytes())).convert("RGB")
    image = image.resize((round(width * scale), round(height * scale)), Image.Resampling.LANCZOS)
    image.quantize(128, dither=Image.Dither.NONE).save(HERE / f"site-{name}.png", optimize=True)


def record(address, folder):
    with Browser() as browser:
        browser.show(address, width=1100, height=800)
        browser.wait("await ready; await wall.move(3)")
        until(browser, "/ %/.test(document.getElementById('live').textContent)", "it does not load")
        shot(browser, folder, "recorded", 1100, 800, 0.7)
        until(browser, "document.body.dataset.live", "the page does not become live")
        browser.command("Emulation.setDeviceMetricsOverride", width=390, height=844, deviceScaleFactor=1, mobile=True)
        browser.command("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}])
        browser.wait("await ask({question: 'Describe the image.'}); await wall.move(4)")
        browser.run("scrollTo(0, 0)")
        shot(browser, folder, "live", 390, 844)
        browser.command("Emulation.setDeviceMetricsOverride", width=1100, height=800, deviceScaleFactor=1, mobile=False)
        browser.command("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "light"}])
        browser.wait("await ask({question: 'What color is the star?'}); await wall.move(4)")
        browser.run("document.getElementById('run').click()")
        until(browser, "/of 20 right.*[.]$/.test(document.getElementById('mine-says').textContent)", "no score")
        browser.run("document.getElementById('mine').scrollIntoView()")
        height = browser.run("return Math.ceil(document.getElementById('mine').getBoundingClientRect().height) + 16")
        shot(browser, folder, "own-method", 1100, height, 0.7)


def main():
    options(__doc__).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        scratch = pathlib.Path(folder)
        with served(built(scratch / "site")) as address:
            record(address, scratch)


if __name__ == "__main__":
    main()
