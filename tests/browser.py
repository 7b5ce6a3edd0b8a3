"""Headless Chromium for the tests, driven over the WebDriver protocol with the standard library alone."""

import base64
import json
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import urllib.request

SWITCHES = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip


class Browser:
    """One page in one fresh browser; use it in a `with`."""

    def __enter__(self):
        self._profile = tempfile.mkdtemp()
        self._driver = subprocess.Popen(["chromedriver", "--port=0"], stdout=subprocess.PIPE, encoding="utf-8")
        for line in self._driver.stdout:
            if port := re.search(r"started successfully on port (\d+)", line):
                break
        self._session = f"http://127.0.0.1:{port.group(1)}/session"
        options = {"args": [*SWITCHES, f"--user-data-dir={self._profile}"]}
        wanted = {
            "browserName": "chrome",
            "goog:chromeOptions": options,
            "goog:loggingPrefs": {"browser": "ALL"},
            "timeouts": {"script": 50_000},
        }
        self._session += "/" + self._send("", {"capabilities": {"alwaysMatch": wanted}})["sessionId"]
        return self

    def __exit__(self, *error):
        self._send("", None, "DELETE")
        self._driver.terminate()
        self._driver.wait()
        self._driver.stdout.close()
        shutil.rmtree(self._profile, ignore_errors=True)

    def _send(self, path, content=None, method="POST"):
        body = None if content is None else json.dumps(content).encode()
        request = urllib.request.Request(
            self._session + path, body, {"Content-Type": "application/json"}, method=method
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["value"]

    def command(self, name, **parameters):
        """A command of the DevTools protocol."""
        return self._send("/goog/cdp/execute", {"cmd": name, "params": parameters})

    def show(self, path, width=1100, height=900, scheme="light", media="", is_phone=False):
        """Open a file, or an address, in a window of this size."""
        self.command(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=is_phone
        )  # fmt: skip
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.command("Emulation.setEmulatedMedia", media=media, features=features)
        self._send("/url", {"url": path if isinstance(path, str) else path.resolve().as_uri()})

    def run(self, script, *arguments):
        """What a script returns."""
        return self._send("/execute/sync", {"script": script, "args": list(arguments)})

    def wait(self, script, *arguments):
        """What an asynchronous script hands to its last argument, or what the promise that it returns becomes."""
        body = f"const done = arguments[arguments.length - 1]; (async () => {{ {script} }})().then(done, e => done('' + e))"
        return self._send("/execute/async", {"script": body, "args": list(arguments)})

    def drag(self, start, end, steps=10):
        """Press at one point (x, y) of the window, move in a straight line to another, release."""
        places = [[a + (b - a) * step / steps for a, b in zip(start, end)] for step in range(steps + 1)]
        self.mouse("mousePressed", places[0])
        for place in places:
            self.mouse("mouseMoved", place)
        self.mouse("mouseReleased", places[-1])

    def mouse(self, kind, place):
        """One event of the mouse: mouseMoved, mousePressed, mouseReleased."""
        self.command(
            "Input.dispatchMouseEvent", type=kind, x=place[0], y=place[1], button="left", buttons=1, clickCount=1
        )

    def console(self):
        """Messages since the last call."""
        return [entry["message"] for entry in self._send("/se/log", {"type": "browser"})]

    def picture(self, path, area=None):
        """The whole page as a PNG, or an area of it: {x, y, width, height}."""
        size = area or self.command("Page.getLayoutMetrics")["cssContentSize"]
        shot = self.command("Page.captureScreenshot", captureBeyondViewport=True, clip={**size, "scale": 1})
        path.write_bytes(base64.b64decode(shot["data"]))


def main():
    """A picture of a page, as on a screen: python -m tests.browser docs/reports/star.html docs/pictures/report.png"""
    with Browser() as browser:
        browser.show(pathlib.Path(sys.argv[1]))
        browser.picture(pathlib.Path(sys.argv[2]))


if __name__ == "__main__":
    main()
