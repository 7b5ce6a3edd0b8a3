"""A page to touch, on which the model runs while one watches: python -m minivtw.explore [IMAGE]"""

import collections
import contextlib
import ctypes
import hmac
import json
import re
import secrets
import socket
import sys
import traceback
import webbrowser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from . import load
from .cli.options import Parser, add_method_options, add_model_option
from .cli.terminal import command, error_line, located, visible
from .errors import InputError
from .page.exploring import Explorer
from .page.page import explore_html, page_css, part, source_html

MOST_PICTURE = 20_000_000  # bytes of an image's file …
MOST_TEXT = 100_000  # … and of any other request
MOST_WAITING = 32  # connections that have not said yet that they are the page's
PATIENCE = 10  # seconds of silence that end a connection
REQUESTS = ("start", "upload", "ask", "frame", "eyes", "layer")
SCRIPTS = ("wall.js", "explore.js", "scene.js", "tour.js")
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; img-src 'self' data: blob:; style-src 'self'; script-src 'self'; "
    "connect-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


class Handler(BaseHTTPRequestHandler):
    """Requests to answers: only from this machine, and only from the page itself, whose address is a secret."""

    server: "Server"
    server_version = "minivtw"
    sys_version = ""
    timeout = PATIENCE

    def do_GET(self) -> None:
        name = self.wanted()
        if name is None:
            return
        if name == "":
            self.reply(200, explore_html(), "text/html")
        elif name == "page.css":
            self.reply(200, page_css(), "text/css")
        elif name in SCRIPTS:
            self.reply(200, part(name), "text/javascript")
        elif name.startswith("source/") and (html := source_html(name.removeprefix("source/"))):
            self.reply(200, html, "text/html")
        else:
            self.reply(404, "there is no such page", "text/plain")

    def do_POST(self) -> None:
        name = self.wanted(needs_origin=True)
        if name is None:
            return
        length, most = self.headers.get("Content-Length", ""), MOST_PICTURE if name == "upload" else MOST_TEXT
        fits = re.fullmatch("[0-9]{1,18}", length) and int(length) <= most
        if fits:
            self.reply(*answered(self.server.explorer, name, self.rfile.read(int(length))))
        else:
            self.reply(400, {"error": f"this is too large: a request says its length, at most {most:,} bytes"})
            while self.rfile.read(MOST_TEXT):  # a browser reads an answer when it has sent everything
                pass

    def wanted(self, needs_origin: bool = False) -> str | None:
        """What is wanted, if this is the page: it knows its address, and no other site's page does, nor a name that
        points here."""
        path, root = self.path.split("?")[0], f"/{self.server.token}/"
        port = self.server.server_address[1]
        hosts = {f"127.0.0.1:{port}", f"localhost:{port}"}
        origin, host = self.headers.get("Origin"), self.headers.get("Host")
        is_ours = host in hosts and (origin == f"http://{host}" or (origin is None and not needs_origin))
        if hmac.compare_digest(path[: len(root)].encode(), root.encode()) and is_ours:
            self.server.waiting.pop(self.connection, None)
            return path[len(root) :]
        self.reply(403, {"error": "this page answers to itself alone, at the address that minivtw.explore printed"})
        return None

    def reply(self, code: int, content: Any, kind: str = "application/json") -> None:
        body = (json.dumps(content) if kind == "application/json" else content).encode()
        self.send_response(code)
        for name, value in HEADERS.items():
            self.send_header(name, value)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *parts: Any) -> None:
        """Nothing: the terminal keeps the address."""


def answered(explorer: Explorer, name: str, body: bytes) -> tuple[int, dict]:
    """The status and the answer of a request. What is wrong with it is one line; of a fault, in this package or in the
    method that the page was started with, the terminal gets the traceback."""
    try:
        content = body if name == "upload" else json.loads(body)
    except (ValueError, RecursionError):
        return 400, {"error": "the request cannot be read"}
    try:
        if name not in REQUESTS or not isinstance(content, bytes | dict):
            raise InputError("there is no such request")
        with explorer.lock:
            return 200, getattr(explorer, name)(content)
    except InputError as error:
        return 400, {"error": error_line(error)}
    except BaseException as error:  # SystemExit, too, which would end this thread without a word
        said, is_theirs = located(error, explorer.own)
        if isinstance(error, MemoryError) and not is_theirs:
            return 400, {"error": "this needs more memory than the machine has"}
        with contextlib.suppress(OSError):  # standard error is full or closed
            print(visible(traceback.format_exc()), end="", file=sys.stderr, flush=True)
        ours = f"or of {explorer.own}" if ".py:" in (explorer.own or "") else "please report it"
        return 500, {"error": error_line(said if is_theirs else f"a fault of minivtw, {ours}: {said}")}


class Server(ThreadingHTTPServer):
    """On the loopback address alone, for whoever knows the token in the page's address. Port 0 takes a free one."""

    daemon_threads, request_queue_size = True, MOST_WAITING

    def __init__(self, explorer: Explorer, port: int = 0):
        super().__init__(("127.0.0.1", port), Handler)
        self.explorer = explorer
        self.token = secrets.token_urlsafe(16)  # other users of this machine can open the port, but do not know it
        self.address = f"http://127.0.0.1:{self.server_address[1]}/{self.token}/"
        self.waiting = collections.OrderedDict[Any, None]()  # connections that have not said who they are, oldest first

    def process_request(self, request: Any, client_address: Any) -> None:
        """One more connection; where too many wait, the oldest of them ends."""
        if len(self.waiting) >= MOST_WAITING:
            with contextlib.suppress(KeyError, OSError):  # it has just said it, or has ended
                self.waiting.popitem(last=False)[0].shutdown(socket.SHUT_RDWR)
        self.waiting[request] = None
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self.waiting.pop(request, None)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Nothing where a tab was closed while it waited."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


def main(arguments: list[str]) -> None:
    options = Parser(prog="minivtw.explore", description="A page to touch: the model runs while you watch.")
    options.add_argument("image", nargs="?", metavar="IMAGE", help="an image in any format that Pillow reads")
    options.add_argument("--port", type=int, default=0, metavar="N", help="default: a free one")
    options.add_argument("--no-browser", action="store_true", help="print the address and open nothing")
    add_model_option(options)
    add_method_options(options)
    chosen = options.parse_args(arguments)
    vlm = load(chosen.model)
    explorer = Explorer(vlm, vlm.method(chosen.withdraw, chosen.method), chosen.image)
    with contextlib.suppress(AttributeError, OSError, TypeError):  # where the C library is another than glibc
        ctypes.CDLL(None).mallopt(-3, 1 << 23)  # M_MMAP_THRESHOLD: 8 MiB, as of large images, go back when freed
    try:
        server = Server(explorer, chosen.port)
    except (OSError, OverflowError) as error:
        raise InputError(f"cannot listen on port {chosen.port}: {getattr(error, 'strerror', None) or error}") from error
    print(f"{server.address} (Ctrl-C ends it)", flush=True)
    if not chosen.no_browser:
        webbrowser.open(server.address)
    with server:
        server.serve_forever()


if __name__ == "__main__":
    command(main)
