"""The stops of chapter 1 in an editor: through debugpy, in the protocol that editors speak (the Debug Adapter Protocol)."""

import json
import os
import pathlib
import re
import socket
import subprocess
import sys
import time

import pytest

from minivtw.cli.stops import STOPS

pytestmark = pytest.mark.live
ROOT = pathlib.Path(__file__).parent.parent
LAYER = 5


class Editor:
    """The editor's side of the protocol: numbered requests, their responses, and events."""

    def __init__(self, port):
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=60)
        self.stream = self.socket.makefile("rwb")
        self.number, self.events = 0, []

    def send(self, command, **arguments):
        self.number += 1
        message = json.dumps(
            {"seq": self.number, "type": "request", "command": command, "arguments": arguments}
        ).encode()
        self.stream.write(b"Content-Length: %d\r\n\r\n%s" % (len(message), message))
        self.stream.flush()
        return self.number

    def read(self):
        length = 0
        while (line := self.stream.readline().strip()) or not length:
            if line.startswith(b"Content-Length:"):
                length = int(line.split(b":")[1])
        return json.loads(self.stream.read(length))

    def ask(self, command, **arguments):
        number = self.send(command, **arguments)
        while True:
            message = self.read()
            if message["type"] == "event":
                self.events.append(message)
            elif message.get("request_seq") == number:
                assert message["success"], message
                return message.get("body")

    def wait(self, name):
        while True:
            found = next((event for event in self.events if event["event"] == name), None)
            if found:
                self.events.remove(found)
                return found.get("body")
            message = self.read()
            if message["type"] == "event":
                self.events.append(message)


@pytest.fixture
def editor():
    pytest.importorskip("debugpy")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    configuration = json.loads((ROOT / ".vscode" / "launch.json").read_text(encoding="utf-8"))["configurations"][0]
    server = subprocess.Popen(
        [sys.executable, "-Xfrozen_modules=off", "-m", "debugpy", "--listen", f"127.0.0.1:{port}", "--wait-for-client",
         "-m", configuration["module"], *configuration["args"]],
        cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ | configuration["env"],
    )  # fmt: skip
    try:
        for _ in range(600):
            try:
                editor = Editor(port)
                break
            except ConnectionRefusedError:
                assert server.poll() is None
                time.sleep(0.1)
        with editor.socket, editor.stream:
            yield editor
    finally:
        server.kill()
        server.wait()


def set_breakpoints(editor, stops):
    """Replace all breakpoints by those of these stops; a file at a time, as the protocol wants it."""
    files = {}
    for stop in stops:
        file, line, condition = re.fullmatch(r"(\S+):(\d+)(?:, (.*))?", stop.breakpoint(LAYER)).groups()
        files.setdefault(file, []).append({"line": int(line)} | ({"condition": condition} if condition else {}))
    for file in {stop.breakpoint(LAYER).split(":")[0] for stop in STOPS}:
        asked = files.get(file, [])
        told = editor.ask("setBreakpoints", source={"path": str(ROOT / file)}, breakpoints=asked)
        assert [one["verified"] for one in told["breakpoints"]] == [True] * len(asked)


def test_every_stop_is_a_breakpoint_and_variables_are_readable(editor):
    editor.ask("initialize", adapterID="test", pathFormat="path", linesStartAt1=True)
    editor.send("attach", justMyCode=True)
    editor.wait("initialized")
    set_breakpoints(editor, STOPS[:1])
    editor.ask("configurationDone")
    for index, stop in enumerate(STOPS):
        thread = editor.wait("stopped")["threadId"]
        frame = editor.ask("stackTrace", threadId=thread)["stackFrames"][0]
        place = f"{pathlib.Path(frame['source']['path']).relative_to(ROOT).as_posix()}:{frame['line']}"
        assert place == stop.breakpoint(LAYER).split(",")[0]
        scope = editor.ask("scopes", frameId=frame["id"])["scopes"][0]
        shown = editor.ask("variables", variablesReference=scope["variablesReference"])["variables"]
        values = {one["name"]: one["value"] for one in shown}
        if "tokens" in values:
            assert values["tokens"].startswith("Tokens(") and len(values["tokens"]) <= 300
        if "decoder" in values:
            assert values["decoder"].startswith("Decoder(12 layers")
        for code in stop.look:
            assert editor.ask("evaluate", expression=code, frameId=frame["id"], context="watch")["result"]
        set_breakpoints(editor, STOPS[index + 1 : index + 2])
        editor.ask("continue", threadId=thread)
    editor.wait("terminated")
