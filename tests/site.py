"""The site for its tests: built once, served on the loopback address, opened in a browser that waits until it is live."""

import contextlib
import functools
import http.server
import importlib.util
import threading
import time

import pytest

from docs.site import build, runtime

PATIENCE = 240  # seconds until the page must be live, also on a busy machine


class Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *parts):
        """Nothing."""


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, address):
        """Nothing where a page was left while it loaded."""


def built(folder):
    """The site in a folder; skips where Pyodide's files are not here."""
    files = runtime.cached()
    if not runtime.complete(files):
        pytest.skip(f"Pyodide's files are not in {files}: `python -m tests.runtime` fetches and checks them")
    build.build(folder, files, bool(importlib.util.find_spec("zensical")))
    return folder


@contextlib.contextmanager
def served(folder):
    """The address of a folder."""
    with Server(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/"
        server.shutdown()


def until(browser, script, what):
    """Poll, since a script that waits in the page has a time limit. Returns what it gives, and the seconds that it took."""
    started = time.perf_counter()
    while not (given := browser.run(f"return {script}")):
        assert time.perf_counter() - started < PATIENCE, (
            f"{what}: {browser.run('return document.body.innerText')[:300]}"
        )
        time.sleep(0.05)
    return given, time.perf_counter() - started


def until_kept(browser):
    """Wait for what the next visit goes on from: the page's files, and Python's memory and files."""
    until(browser, "document.body.dataset.kept", "the page keeps nothing")
    names = [f"{runtime.NAME}/memory", f"{runtime.NAME}/files"]
    script = "for (const name of arguments[0]) while (!await caches.match(name)) await new Promise(done => setTimeout(done, 100))"
    browser.wait(script, names)


def go_live(browser, address, **window):
    """Open the page and wait for the model. Returns the seconds from the request to it."""
    browser.console()  # what an earlier page left there
    started = time.perf_counter()
    browser.show(address, **window)
    until(browser, "document.body.dataset.live", "the page does not become live")
    return time.perf_counter() - started
