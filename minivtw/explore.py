"""A page to touch, on which the model runs while one watches: python -m minivtw.explore [IMAGE]"""

import json
import webbrowser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from . import load
from .analysis.exploring import Explorer
from .analysis.page import PAGES, explore_html, page_css, source_html
from .cli import Parser, add_method_options, add_model_option
from .errors import InputError
from .terminal import command

MOST_BYTES = {"upload": 20_000_000}  # of a picture …
MOST_TEXT = 100_000  # … and of any other request
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
    """Requests to answers: only from this machine, and only from the page itself."""

    server_version = "minivtw"
    sys_version = ""

    def do_GET(self):
        name = self.path.split("?")[0].removeprefix("/")
        if not self.is_ours():
            return
        if name == "":
            self.reply(200, explore_html(), "text/html")
        elif name == "page.css":
            self.reply(200, page_css(), "text/css")
        elif name in SCRIPTS:
            self.reply(200, (PAGES / name).read_text(encoding="utf-8"), "text/javascript")
        elif name.startswith("source/") and (html := source_html(name.removeprefix("source/"))):
            self.reply(200, html, "text/html")
        else:
            self.reply(404, "there is no such page", "text/plain")

    def do_POST(self):
        name = self.path.removeprefix("/")
        if not self.is_ours(needs_origin=True):
            return
        try:
            length, most = int(self.headers.get("Content-Length", "")), MOST_BYTES.get(name, MOST_TEXT)
            if not 0 <= length <= most:
                self.close_connection = True
                raise InputError(f"this is too large: a request has at most {most:,} bytes")
            body = self.rfile.read(length)
            content = body if name == "upload" else json.loads(body)
            if name not in REQUESTS or not isinstance(content, bytes | dict):
                raise InputError("there is no such request")
            with self.server.explorer.lock:
                answer = getattr(self.server.explorer, name)(content)
            self.reply(200, json.dumps(answer), "application/json")
        except (InputError, ValueError, KeyError, TypeError, RecursionError) as error:
            said = str(error) if isinstance(error, InputError) else "the request cannot be read"
            self.reply(400, json.dumps({"error": " ".join(said.split())}), "application/json")

    def is_ours(self, needs_origin=False):
        """Only this page, under its own name, may ask: another site's page, or a name that points here, may not."""
        port = self.server.server_address[1]
        hosts = {f"127.0.0.1:{port}", f"localhost:{port}"}
        origin, host = self.headers.get("Origin"), self.headers.get("Host")
        if host in hosts and (origin == f"http://{host}" or (origin is None and not needs_origin)):
            return True
        self.close_connection = True
        self.reply(403, "this page answers to itself alone", "text/plain")
        return False

    def reply(self, code, content, kind):
        body = content.encode()
        self.send_response(code)
        for name, value in HEADERS.items():
            self.send_header(name, value)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *parts):
        """Nothing: the terminal keeps the address."""


class Server(ThreadingHTTPServer):
    """On the loopback address alone. Port 0 takes a free one."""

    daemon_threads = True

    def __init__(self, explorer, port=0):
        super().__init__(("127.0.0.1", port), Handler)
        self.explorer = explorer
        self.address = f"http://127.0.0.1:{self.server_address[1]}/"

    def handle_error(self, request, client_address):
        """Nothing: a tab was closed while it waited."""


def main(arguments):
    options = Parser(
        prog="minivtw.explore", description="A page to touch: the model runs while you watch. Ctrl-C ends it."
    )
    options.add_argument("image", nargs="?", metavar="IMAGE", help="a picture in any format that Pillow reads")
    options.add_argument("--port", type=int, default=0, metavar="N", help="default: a free one")
    options.add_argument("--no-browser", action="store_true", help="print the address and open nothing")
    add_model_option(options)
    add_method_options(options)
    chosen = options.parse_args(arguments)
    vlm = load(chosen.model)
    explorer = Explorer(vlm, vlm.method(chosen.withdraw, chosen.method), chosen.image)
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
