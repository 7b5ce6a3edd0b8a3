"""Requests from strangers, broken clients and slow ones, and faults while one is answered: the live page tells whoever is
its own what is wrong, in one line, and goes on."""

import contextlib
import io
import json
import socket
import threading
import time
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import minivtw
from minivtw import explore
from minivtw.cli.terminal import MOST_CHARACTERS
from minivtw.page import exploring

from .doors import examples, make_world
from .test_explore import QUESTION, ask, asking


@contextlib.contextmanager
def serving(explorer):
    with explore.Server(explorer) as server:
        threading.Thread(target=server.serve_forever, args=[0.02], daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture(scope="module")
def vlm(tmp_path_factory):
    """A small random LLaVA: four layers, nine visual tokens."""
    return minivtw.load(make_world(tmp_path_factory.mktemp("world")).model)


@pytest.fixture(scope="module")
def server(vlm):
    with serving(exploring.Explorer(vlm, vlm.method("auto"))) as server:
        yield server


@pytest.fixture(scope="module")
def own(vlm, tmp_path_factory):
    """A page that was started with --method …/mine.py:mine, and that file."""
    path = tmp_path_factory.mktemp("own") / "mine.py"
    path.write_text("def mine(index, tokens):\n    return tokens\n")
    with serving(exploring.Explorer(vlm, vlm.method(method=f"{path}:mine"))) as server:
        yield server, path


def error_of(server, **edits):
    """(status, error) of a frame."""
    status, body = ask(server, "/frame", asking(server.explorer, **edits))
    error = json.loads(body)["error"]
    assert error.isprintable() and len(error) <= MOST_CHARACTERS
    return status, error


# --- who may ask


def test_only_who_knows_the_address_may_ask(server):
    """Every user of a machine can open 127.0.0.1, under any name and origin."""
    roots = [
        "",
        "/",
        "/x",
        "//",
        f"/{server.token[:-1]}",
        f"/{server.token[:-1]}é",
        f"/{server.token.swapcase()}",
        "/?token=",
    ]
    for root in roots + [f"/x/{server.token}", f"/{'é' * len(server.token)}", f"/{server.token}x"]:
        root = root.encode().decode("latin-1")  # as it arrives
        for path in ("/", "/wall.js", "/source/vlm.py"):
            assert said(server, f"GET {root}{path} HTTP/1.1\r\nHost: {host(server)}\r\n\r\n").startswith("HTTP/1.0 403")
        headers = f"Host: {host(server)}\r\nOrigin: http://{host(server)}\r\nContent-Length: 2"
        for name in (*explore.REQUESTS, "x"):
            answer = said(server, f"POST {root}/{name} HTTP/1.1\r\n{headers}\r\n\r\n{{}}")
            assert answer.startswith("HTTP/1.0 403") and len(answer) < 1000 and server.token not in answer
    assert ask(server, "/start")[0] == 200


def test_the_address_is_another_at_every_start(server, own):
    assert len(server.token) > 20 and server.token != own[0].token


@pytest.mark.parametrize("own_page", [False, True])
@pytest.mark.parametrize(
    "method",
    [
        "evil.py",
        "evil.py:evil",
        "./evil.py:evil",
        "withdraw:layer=3+evil.py",
        " evil.py:evil",
        "mine.py:mine+evil.py",
        "mine.py",
    ],
)
def test_a_request_names_no_file_that_is_run(server, own, tmp_path, monkeypatch, method, own_page):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.py").write_text("open('ran', 'w')\nevil = mine = lambda index, tokens: tokens\n")
    (tmp_path / "mine.py").write_text("open('ran', 'w')\nmine = lambda index, tokens: tokens\n")
    status, error = error_of(own[0] if own_page else server, method=method)
    assert status == 400 and "code is run only if --method names it" in error
    assert not (tmp_path / "ran").exists()


# --- faults


@pytest.mark.parametrize(
    "line, kind",
    [
        ("raise ValueError('two\\n\\x1b[2Jlines')", "ValueError: two \\x1b[2Jlines"),
        ("raise KeyError('x')", "KeyError: 'x'"),
        ("raise OSError(28, 'No space')", "OSError: [Errno 28] No space"),
        ("raise TimeoutError('late')", "TimeoutError: late"),
        ("raise MemoryError", "MemoryError"),
        ("raise SystemExit(3)", "SystemExit: 3"),
        ("raise type('Odd', (Exception,), {'__str__': None})", "Odd: <exception str() failed>"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt"),
        ("return mine(index, tokens)", "RecursionError"),
        ("return tokens[tokens.nothing]", "AttributeError"),
    ],
)
def test_a_fault_in_a_method_of_one_s_own_is_shown_with_its_line(own, capsys, line, kind):
    server, path = own
    path.write_text(f"def mine(index, tokens):\n    {line}\n")
    status, error = error_of(server, method=f"{path}:mine")
    assert status == 500 and kind in error and "(mine.py, line 2: " in error and "fault of minivtw" not in error
    told = capsys.readouterr().err
    assert told.startswith("Traceback") and 'mine.py", line 2' in told and "\x1b" not in told
    assert ask(server, "/frame", asking(server.explorer))[0] == 200  # and the page goes on
    assert capsys.readouterr().err == ""


def test_a_method_that_cannot_be_called_may_be_the_fault(own, capsys):
    server, path = own
    path.write_text("mine = max  # written in C: no line of it is known\n")
    status, error = error_of(server, method=f"{path}:mine")
    assert status == 500 and f"or of {path}:mine: TypeError: " in error
    assert capsys.readouterr().err.startswith("Traceback")


def test_a_fault_of_ours_is_one_line_on_the_page_and_a_traceback_on_the_terminal(server, monkeypatch, capsys):
    def broken(*arguments):
        raise IndexError("index 9 " * 1000)

    monkeypatch.setattr(exploring.watching, "frame", broken)
    status, error = error_of(server)
    assert status == 500 and error.startswith("a fault of minivtw, please report it: IndexError: index 9")
    assert error.endswith(': raise IndexError("index 9 " * 1000))')
    told = capsys.readouterr().err
    assert told.startswith("Traceback") and "in broken" in told


def test_too_little_memory_is_one_line(server, monkeypatch, capsys):
    def broken(*arguments):
        raise MemoryError

    monkeypatch.setattr(exploring.watching, "frame", broken)
    assert error_of(server) == (400, "this needs more memory than the machine has")
    assert capsys.readouterr().err == ""


def test_a_fault_is_told_where_standard_error_is_full(server, monkeypatch):
    monkeypatch.setattr(exploring.watching, "frame", lambda *_: 1 / 0)
    full = mock.Mock(write=mock.Mock(side_effect=OSError(28, "No space left on device")))
    with contextlib.redirect_stderr(full):
        assert "ZeroDivisionError" in error_of(server)[1]


def test_an_error_is_no_longer_than_a_line(server):
    status, error = error_of(server, method="fastv:" + "x" * 9_000)
    assert status == 400 and error.startswith("the method fastv takes layer") and len(error) <= MOST_CHARACTERS


# --- connections


def host(server):
    return f"127.0.0.1:{server.server_address[1]}"


@contextlib.contextmanager
def connected(server, content):
    with socket.create_connection(server.server_address, timeout=30) as connection:
        connection.sendall(content.encode("latin-1") if isinstance(content, str) else content)
        yield connection


def said(server, content):
    """Everything that is answered to these bytes, after which nothing more comes."""
    with connected(server, content) as connection:
        connection.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: connection.recv(1 << 16), b"")).decode("latin-1")


def soon(is_so):
    """Whether something becomes so within seconds."""
    return any(is_so() or time.sleep(0.02) for _ in range(500))


def is_ended(connection):
    with contextlib.suppress(ConnectionResetError):
        return connection.recv(1) == b""
    return True


def test_connections_that_say_nothing_are_few_and_end(server, monkeypatch):
    monkeypatch.setattr(explore, "MOST_WAITING", 4)
    monkeypatch.setattr(explore.Handler, "timeout", 0.5)
    before = threading.active_count()
    with contextlib.ExitStack() as stack:
        half = f"GET /{server.token}/ HTTP/1.1\r\nHost: "
        body = f"POST /{server.token}/ask HTTP/1.1\r\nHost: {host(server)}\r\nOrigin: http://{host(server)}\r\n"
        slow = [stack.enter_context(connected(server, half)) for _ in range(20)]
        assert ask(server, "/start")[0] == 200  # the page is answered all the same
        assert all(is_ended(connection) for connection in slow[:16])
        assert len(server.waiting) <= 4 and soon(lambda: threading.active_count() <= before + 4)
        slow += [stack.enter_context(connected(server, body + "Content-Length: 50\r\n\r\n{}"))]
        started = time.monotonic()
        assert all(is_ended(connection) for connection in slow)
        assert time.monotonic() - started < 20
    assert soon(lambda: not server.waiting)


# --- at random

TEXTS = st.text(max_size=30) | st.sampled_from(["\ud800", "<image>", "</s>", "\x00\x1b[2J", "x" * 5000, "[" * 50])
METHODS = st.sampled_from([
    "", "withdraw:layer=3", "freeze:layers=2-3", "fastv:layer=3,keep=0.25", "adaptive", "divprune", "random:layer=4,seed=2",
    "withdraw:layer=2+renumber:layer=2", "withdraw:layer=5", "withdraw", "withdraw:layer=x", "mine.py", "a.py:b", "+",
])  # fmt: skip
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS,
    lambda inside: st.lists(inside, max_size=4) | st.dictionaries(TEXTS, inside, max_size=4),
    max_leaves=6,
)
TOKENS = st.integers(0, 40)
LAYERS = st.integers(0, 4)


def requests(pictures):
    """Requests that fit, the same with one part that may be anything, and anything."""
    given = {
        "picture": st.sampled_from(pictures),
        "question": st.sampled_from([QUESTION, "Describe the image."]),
        "method": METHODS,
    }
    swap = st.fixed_dictionaries({"other": given["picture"], "first": LAYERS, "stop": LAYERS})
    gone = {"gone": st.lists(TOKENS, max_size=70), "swap": swap}
    one = {"token": TOKENS, "ids": st.lists(TOKENS, min_size=1, max_size=40), "layer": LAYERS}
    fits = st.fixed_dictionaries(given | one, optional=gone)
    odd = [st.fixed_dictionaries({name: JSON}) for name in given | one | gone]
    odd += [
        st.fixed_dictionaries({"swap": st.dictionaries(st.sampled_from(["other", "first", "stop"]), LAYERS | JSON)})
    ]
    return fits | fits | fits | st.builds(lambda request, part: request | part, fits, st.one_of(odd)) | JSON


@examples(30, 2000)
def test_any_request_is_answered_or_told_what_is_wrong_with_it(server, examples):
    pictures = [sample["picture"] for sample in server.explorer.samples[:3]]

    @settings(max_examples=examples)
    @given(name=st.sampled_from([*explore.REQUESTS, "frame", "frame", "eyes", "lock"]), content=requests(pictures))
    def check(name, content):
        with contextlib.redirect_stderr(io.StringIO()) as told:
            status, body = explore.answered(server.explorer, name, json.dumps(content).encode())
        assert told.getvalue() == "", told.getvalue()
        if status != 200:
            error = body["error"]
            assert status == 400 and error.isprintable() and 0 < len(error) <= MOST_CHARACTERS, (status, error)
        json.dumps(body)

    check()


@examples(30, 2000)
def test_any_bytes_on_the_line_end_in_an_answer_or_in_nothing(server, examples):
    words = st.sampled_from([*explore.REQUESTS, *explore.SCRIPTS, "source/vlm.py", "page.css", ""]).map(str.encode)
    paths = st.builds(lambda root, name: root + name, st.sampled_from([f"/{server.token}/".encode(), b"/", b""]), words)
    methods = st.sampled_from([b"GET", b"POST", b"PUT", b"HEAD", b"TRACE"]) | st.binary(max_size=9)
    headers = st.sampled_from(
        [f"Host: {host(server)}".encode(), f"Origin: http://{host(server)}".encode(), b"Host: evil.example"]
        + [b"Content-Length: 2", b"Content-Length: -1", b"Content-Length: 99999999999", b"Transfer-Encoding: chunked", b"Expect: 100-continue"]
    ) | st.binary(max_size=40)  # fmt: skip
    versions = st.sampled_from([b"HTTP/1.1", b"HTTP/1.0", b"HTTP/2.0", b"HTTP/0.9", b""]) | st.binary(max_size=9)

    @settings(max_examples=examples)
    @given(methods, paths | st.binary(max_size=40), versions, st.lists(headers, max_size=8), st.binary(max_size=60))
    def check(method, path, version, headers, body):
        content = b"\r\n".join([b" ".join([method, path, version]), *headers, b"", body])
        with contextlib.redirect_stderr(io.StringIO()) as told:
            answer = said(server, content)
        assert told.getvalue() == "", told.getvalue()
        assert " 500 " not in answer.split("\r\n")[0]
        assert server.token.encode() in content or "samples" not in answer
        assert ask(server, "/page.css", method="GET")[0] == 200

    check()
