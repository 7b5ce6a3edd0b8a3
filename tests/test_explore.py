"""The live page: what it shows is what the model says, only the page itself may ask, and in a browser it can be touched."""

import base64
import http.client
import io
import json
import sys
import tempfile
import threading

import numpy as np
import pytest
from PIL import Image, ImageDraw

import minivtw
from minivtw import explore
from minivtw.analysis import migration
from minivtw.errors import InputError
from minivtw.model.attention import attention_probabilities
from minivtw.model.cache import KVCache
from minivtw.model.decoder import decoder_layer, forward
from minivtw.model.tokens import EmbeddedPrompt, arriving
from minivtw.page import exploring, page, unfolding, watching

from .browser import Browser
from .doors import assert_one_line_error, needs_loopback, run

QUESTION = "What color is the star?"


@pytest.fixture(scope="module")
def vlm():
    return minivtw.load()


@pytest.fixture(scope="module")
def explorer(vlm):
    return exploring.Explorer(vlm, vlm.method("auto"))


@pytest.fixture(scope="module")
def server(explorer):
    """The page's server on a free port of this machine."""
    needs_loopback()
    with explore.Server(explorer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def scene(color=(214, 48, 49)):
    image = Image.new("RGB", (256, 256), (150, 140, 145))
    ImageDraw.Draw(image).ellipse([30, 40, 110, 120], fill=color)
    return image


def file_of(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def asking(explorer, sample=0, method="", question=QUESTION, **more):
    return {"picture": explorer.samples[sample]["picture"], "question": question, "method": method, **more}


def ask(server, path, content=b"{}", method="POST", root=None, **headers):
    """(status, body) of one request, with the address and headers of the page itself unless others are given."""
    host = f"127.0.0.1:{server.server_address[1]}"
    connection = http.client.HTTPConnection(host, timeout=60)
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    sent = {"Host": host, "Origin": f"http://{host}", "Content-Length": str(len(body))} | headers
    connection.putrequest(
        method, (f"/{server.token}" if root is None else root) + path, skip_host=True, skip_accept_encoding=True
    )
    for name, value in sent.items():
        if value is not None:
            connection.putheader(name, value)
    connection.endheaders(body if method == "POST" else None)
    answer = connection.getresponse()
    return answer.status, answer.read().decode()


# --- what is shown is what the model does


@pytest.mark.parametrize(
    "method",
    [
        "",
        "withdraw:layer=3",
        "freeze:layers=2-9",
        "fastv:layer=3,keep=0.25",
        "adaptive",
        "random:layer=4",
        "fastervlm:keep=0.25",
    ],
)
def test_a_frame_is_the_model_s_answer(vlm, explorer, method):
    frame = explorer.frame(asking(explorer, method=method))
    picture = explorer.picture(explorer.samples[0]["picture"])
    answer = vlm.answer(picture, QUESTION, withdraw=None, method=method or None, max_new_tokens=32)
    ran = answer.stats["prefill"]
    assert frame["answer"] == answer.text and frame["ids"] == answer.token_ids
    assert [len(marks) - marks.count("0") for marks in frame["layers"]] == ran["entered"]
    assert [marks.count("2") for marks in frame["layers"]] == ran["worked"]
    assert frame["flops"] == [answer.stats["flops"]["prefill"], answer.stats["flops"]["prefill_without_withdrawal"]]
    assert frame["cache"][0] == answer.stats["cache"]["bytes"]


def test_eyes_are_the_attention_that_observe_sees(vlm, explorer):
    frame = explorer.frame(asking(explorer, question="Describe the image.", method="withdraw:layer=5"))
    asked = explorer.question(asking(explorer, question="Describe the image."))
    seen = {}

    def observe(name, array):
        seen.setdefault(name, array)  # of every name, the prompt's comes first

    picture = explorer.picture(explorer.samples[0]["picture"])
    vlm.answer(picture, "Describe the image.", withdraw=5, max_new_tokens=1, observe=observe)
    last = len(asked.embedded.hidden) - 1
    prompt = asked.embedded
    traces = watching.traces(vlm.decoder, prompt, frame["ids"], vlm.method(5), [last, last + 1])
    text = np.flatnonzero(~asked.prompt.is_visual)
    for layer in range(vlm.config.layers):
        there = np.arange(last + 1) if layer < 5 else text
        attended = seen[f"decoder.layers.{layer}.attention"]  # (heads, asking, cached)
        np.testing.assert_allclose(traces.attention[0, layer][:, there], attended[:, -1], atol=1e-5)
        np.testing.assert_allclose(traces.received[0, layer, last], attended[:, -1, -1].mean(), atol=1e-5)
        np.testing.assert_allclose(traces.states[0, layer + 1], seen[f"decoder.layers.{layer}.hidden"][-1], atol=1e-3)
    np.testing.assert_allclose(
        traces.attention.sum(-1), 1, atol=1e-5
    )  # the answer's token, too, spends all its attention
    assert not traces.attention[1, 5:][:, :, :-1][:, :, asked.prompt.is_visual.nonzero()[0]].any()


def test_a_patch_that_has_left_looks_at_nothing(vlm, explorer):
    asked = explorer.question(asking(explorer))
    patch = int(asked.prompt.is_visual.argmax())
    prompt = asked.embedded
    traces = watching.traces(vlm.decoder, prompt, asked.answer.token_ids, vlm.method(4), [patch])
    assert (
        traces.attention[0, :4].any((1, 2)).all()
        and not traces.attention[0, 4:].any()
        and not traces.received[0, 4:].any()
    )
    assert [reading is None for reading in watching.readings(vlm, traces.states[0])] == [False] * 5 + [True] * 8


def test_a_picture_swapped_in_everywhere_is_the_other_picture(explorer):
    ours, theirs = explorer.samples[6]["picture"], explorer.samples[13]["picture"]
    question = "Describe the image."
    swap = lambda first, stop: explorer.frame(
        asking(explorer, 6, question=question, swap={"other": theirs, "first": first, "stop": stop})
    )
    left_alone = {
        name: explorer.frame({"picture": name, "question": question, "method": ""}) for name in (ours, theirs)
    }
    assert swap(0, 12)["ids"] == left_alone[theirs]["ids"] != left_alone[ours]["ids"]
    assert swap(3, 3)["ids"] == swap(0, 0)["ids"] == left_alone[ours]["ids"]
    assert swap(0, 12)["sides"][1] > 100 * swap(0, 12)["sides"][0]
    assert swap(4, 4)["sides"][0] > 100 * swap(4, 4)["sides"][1]


def test_swapping_inside_a_window_is_swapping_what_the_text_reads_there(vlm, explorer):
    """The same by hand: in the layers of the window, the keys and values of the image are the other picture's."""
    one, other = (explorer.question(asking(explorer, sample)) for sample in (0, 2))
    prompts = [each.embedded for each in (one, other)]
    first, stop, visual = 3, 6, one.prompt.is_visual
    caches = [KVCache(vlm.config), KVCache(vlm.config)]
    theirs = arriving(prompts[1], caches[1])
    ours = arriving(prompts[0], caches[0])
    for layer in range(vlm.config.layers):
        own = forward(vlm.decoder, ours, start=layer, stop=layer + 1)
        if first <= layer < stop:
            mixed = KVCache(vlm.config)
            hidden = np.where(visual[:, None], theirs.hidden, ours.hidden)
            together = arriving(EmbeddedPrompt(hidden, visual), mixed)
            read = forward(vlm.decoder, together, start=layer, stop=layer + 1)
            own.hidden[~visual] = read.hidden[~visual]
        theirs, ours = forward(vlm.decoder, theirs, start=layer, stop=layer + 1), own
    entering = (migration.layer_inputs(vlm.decoder, each) for each in prompts)
    method = migration.swapped(*entering, range(first, stop))
    swapped = forward(vlm.decoder, arriving(prompts[0], KVCache(vlm.config)), method)
    np.testing.assert_allclose(swapped.hidden[~visual], ours.hidden[~visual], atol=1e-3)


def test_patches_taken_away_are_in_no_layer(explorer):
    gone = [index for index, word in enumerate(explorer.ask(asking(explorer))["words"]) if word is None]
    some, all_of_them = (explorer.frame(asking(explorer, gone=taken)) for taken in (gone[5:9], gone))
    assert all({index for index, mark in enumerate(marks) if mark == "0"} == set(gone[5:9]) for marks in some["layers"])
    blind = explorer.frame(asking(explorer, method="withdraw:layer=0"))
    assert all_of_them["answer"] == blind["answer"] and all_of_them["flops"] == blind["flops"]
    assert some["sides"][0] > all_of_them["sides"][0]


def test_an_unfolded_layer_shows_what_ran(vlm, explorer):
    asked = explorer.question(asking(explorer))
    tokens = forward(vlm.decoder, arriving(asked.embedded, KVCache(vlm.config)), stop=2)
    called = unfolding.unfolded(decoder_layer, vlm.decoder, 2, tokens)
    made = {name: array for step in called.steps for name, array in step.arrays.items()}
    again = forward(vlm.decoder, arriving(asked.embedded, KVCache(vlm.config)), stop=3)
    np.testing.assert_array_equal(made["hidden"], again.hidden)
    for step in called.steps:
        lines = (unfolding.PACKAGE / step.file).read_text(encoding="utf-8").splitlines()
        assert step.source.startswith(lines[step.line - 1].strip())

    def every(steps):
        for step in steps:
            yield step
            for inside in step.inside:
                yield from every(inside.steps)

    names = {inside.name for step in every(called.steps) for inside in step.inside}
    assert {"rms_norm", "rotate", "attention", "swiglu"} <= names
    assert any("np.exp(" in step.source and step.arrays for step in every(called.steps))  # what is done in place, too


def test_unfolding_leaves_the_debugger_as_it_was(vlm):
    import sys

    mine = lambda frame, event, argument: None
    before = sys.gettrace()
    sys.settrace(mine)
    try:
        with pytest.raises(AttributeError):
            unfolding.unfolded(attention_probabilities, None, None)
        assert sys.gettrace() is mine
    finally:
        sys.settrace(before)


def test_thumbnails_take_memory_that_nothing_was_written_into_yet():
    anything = np.array([0x7FA00001, 0], np.uint32).view(np.float32)  # a signaling NaN, of which NumPy warns
    assert page.thumbnail(anything)["largest"] == 1e-12


def test_thumbnails_show_every_so_manyth_number():
    array = np.arange(6 * 500 * 300, dtype=np.float32).reshape(6, 500, 300)
    small = page.thumbnail(array)
    rows = len(base64.b64decode(small["values"])) // small["columns"]
    assert small["shape"] == [6, 500, 300] and rows <= 64 and small["columns"] <= 192
    scores = page.thumbnail(np.array([[1.0, -2.0, -np.inf]]))
    assert np.frombuffer(base64.b64decode(scores["values"]), np.int8).tolist() == [64, -127, -128]


# --- only the page itself may ask, and what cannot be used is one line


def test_only_loopback_is_listened_to(server):
    assert server.server_address[0] == "127.0.0.1"


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "evil.example"},
        {"Host": "127.0.0.1"},
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": None},
        {"Host": None},
    ],
)
def test_other_pages_may_not_ask(server, headers):
    status, body = ask(server, "/start", **headers)
    assert status == 403 and "picture" not in body


def test_a_name_that_points_here_may_not_read_the_page(server):
    assert ask(server, "/", method="GET", Origin=None)[0] == 200
    assert ask(server, "/", method="GET", Origin=None, Host="rebound.example:80")[0] == 403
    assert ask(server, "/", method="GET", Origin="http://evil.example")[0] == 403


@pytest.mark.parametrize(
    "path",
    ["/../explore.py", "/source/../../LICENSE", "/source//etc/passwd", "/source/page/files/page.css", "/x"]
    + [f"/source/{'a' * 300}.py", "/source/%00.py", "/source/", "/source"],
)
def test_nothing_else_can_be_read(server, path):
    assert ask(server, path, method="GET")[0] == 404


def test_source_is_shown_with_its_lines(server):
    status, body = ask(server, "/source/model/decoder.py", method="GET")
    assert status == 200 and 'id="L1"' in body and "def decoder_layer" in body


@pytest.mark.parametrize(
    "path, content, words",
    [
        ("/start", b"{", "cannot be read"),
        ("/start", b"[]", "no such request"),
        ("/hold", {}, "no such request"),
        ("/lock", {}, "no such request"),
        ("/upload", b"no picture", "this file is not an image"),
        ("/upload", b"", "this file is empty"),
        ("/ask", {"picture": "0" * 32, "question": QUESTION}, "no longer held"),
        ("/ask", {"question": QUESTION}, "lacks picture"),
        ("/frame", {"method": "nonsense"}, "there is no method"),
        ("/frame", {"method": "withdraw:layer=99"}, "from 0 to 12"),
        ("/frame", {"method": "/etc/passwd.py:x"}, "code is run only if"),
        ("/frame", {"method": "withdraw:layer=2+mine.py:x"}, "code is run only if"),
        ("/frame", {"question": " "}, "the prompt is empty"),
        ("/frame", {"question": "<image> <image> what?"}, "marks 2 places"),
        ("/frame", {"gone": [-1]}, "not there"),
        ("/frame", {"gone": "all"}, "not there"),
        ("/frame", {"swap": {"other": "none", "first": 0, "stop": 3}}, "no longer held"),
        ("/frame", {"swap": {"first": 0}}, "not there"),
        ("/frame", {"swap": 3}, "no object"),
        ("/frame", {"method": 3}, "lacks method"),
        ("/eyes", {"token": 10_000, "ids": [1]}, "not there"),
        ("/eyes", {"token": 3, "ids": [10**9]}, "not there"),
        ("/layer", {"layer": 12}, "not there"),
        ("/layer", {"layer": 1.5}, "not there"),
    ],
)
def test_what_cannot_be_used_is_one_line(server, path, content, words):
    if isinstance(content, dict) and path in ("/frame", "/eyes", "/layer"):
        content = asking(server.explorer) | content
    status, body = ask(server, path, content)
    error = json.loads(body)["error"]
    assert status == 400 and words in error and "\n" not in error and tempfile.gettempdir() not in error, error


def test_what_is_too_large_is_not_read(server):
    assert "too large" in ask(server, "/ask", b"{}", **{"Content-Length": str(explore.MOST_TEXT + 1)})[1]
    assert "too large" in ask(server, "/upload", b"x", **{"Content-Length": str(10**12)})[1]
    assert "says its length" in ask(server, "/ask", b"{}", **{"Content-Length": "many"})[1]
    assert "too large" in ask(server, "/upload", bytes(explore.MOST_PICTURE + 1))[1]  # told to one who sends it all


def test_two_tabs_at_once_get_their_own_answers(server):
    explorer = server.explorer
    wanted = [asking(explorer, sample, f"withdraw:layer={layer}") for layer in (3, 6, 12) for sample in (0, 5)] * 2
    answers = [None] * len(wanted)

    def tab(start):
        for index in range(start, len(wanted), 2):
            answers[index] = json.loads(ask(server, "/frame", wanted[index])[1])["answer"]

    tabs = [threading.Thread(target=tab, args=(start,)) for start in (0, 1)]
    for each in tabs:
        each.start()
    for each in tabs:
        each.join()
    for content, answer in zip(wanted, answers):
        picture = explorer.picture(content["picture"])
        assert answer == explorer.vlm.answer(picture, QUESTION, withdraw=None, method=content["method"]).text


def test_what_is_held_has_an_end(monkeypatch, vlm):
    explorer = exploring.Explorer(vlm, None)
    monkeypatch.setattr(exploring, "MOST_HELD", 1_500_000)  # bytes; an image takes 1.2 MB of this model
    names = [explorer.upload(file_of(scene((shade, 0, 0))))["picture"] for shade in range(3)]
    for name in names:
        explorer.ask({"picture": name, "question": QUESTION})
        assert explorer.held.size == sum(map(sys.getsizeof, (*explorer.held, *explorer.held.values()))) <= 1_500_000
    assert explorer.picture(names[2])
    explorer.upload(file_of(Image.effect_noise((1400, 1400), 99)))  # one that is larger than what may be held
    assert len(explorer.held) == 1
    with pytest.raises(InputError, match="no longer held"):
        explorer.picture(names[2])
    assert explorer.picture(explorer.samples[0]["picture"])  # the samples are never forgotten


def test_an_image_is_looked_at_once_for_all_its_questions(vlm, monkeypatch):
    explorer, towers, encode = exploring.Explorer(vlm, None), [], minivtw.vlm.encode_image
    monkeypatch.setattr(minivtw.vlm, "encode_image", lambda *given: towers.append(given) or encode(*given))
    questions = [QUESTION, "How many objects are there?", "Describe the image."]
    asked = [explorer.ask(asking(explorer, question=question)) for question in questions]
    frames = [
        explorer.frame(asking(explorer, question=question, method="fastervlm:keep=0.5")) for question in questions
    ]
    assert len(towers) == 1
    for question, told, frame in zip(questions, asked, frames):  # with a tower for each
        alone = exploring.Explorer(vlm, None)
        assert alone.ask(asking(alone, question=question)) == told
        assert alone.frame(asking(alone, question=question, method="fastervlm:keep=0.5")) == frame
    explorer.upload(file_of(scene()))
    explorer.ask(asking(explorer))
    explorer.ask(asking(explorer, sample=1))
    assert len(towers) == 1 + 3 + 1
    held = list(explorer.held)  # a question goes before its image, and that before its file
    for sample in (0, 1):
        name = explorer.samples[sample]["picture"]
        assert held.index(f"{name} {QUESTION}") < held.index(f"seen {name}") < held.index(name)


def test_own_method_runs_as_its_file_stands(vlm, tmp_path):
    own = tmp_path / "mine.py"
    own.write_text("def mine(index, tokens):\n    return tokens\n", encoding="utf-8")
    explorer = exploring.Explorer(vlm, vlm.method(method=f"{own}:mine"))
    content = asking(explorer, method=f"{own}:mine")
    assert explorer.start({})["own"] == f"{own}:mine"
    assert not any("0" in marks for marks in explorer.frame(content)["layers"])
    own.write_text(
        "def mine(index, tokens):\n    return tokens[~tokens.is_visual] if index == 2 else tokens\n", encoding="utf-8"
    )
    assert ["0" in marks for marks in explorer.frame(content)["layers"]] == [False] * 2 + [True] * 10


def test_door_reports_in_one_line(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no picture")
    assert_one_line_error(run(explore.main, tmp_path / "broken.png", "--no-browser"), "is not an image")
    assert_one_line_error(run(explore.main, "--no-browser", "--withdraw", 99), "from 0 to")
    assert_one_line_error(run(explore.main, "--no-browser", "--port", 10**6), "cannot listen")


def test_page_fits_its_size():
    sizes = {path.name: path.stat().st_size for path in page.PAGES.iterdir()}
    assert sum(sizes.values()) < 60_500, sizes
    assert "http" not in page.explore_html()


# --- in headless Chromium


@pytest.fixture(scope="module")
def browser():
    with Browser() as browser:
        yield browser


def opened(browser, server, **window):
    browser.console()  # what an earlier test left there
    browser.show(server.address, **window)
    settle(browser)


def settle(browser):
    """Wait until the page shows what was last asked for."""
    browser.wait(
        "await ready; const wall = document.getElementById('wall');"
        "while (wall.ariaBusy === 'true') await new Promise(done => setTimeout(done, 10));"
    )


def said(browser, name):
    return browser.run("return document.getElementById(arguments[0]).textContent.trim()", name)


def shown(browser):
    """What the page says it asked, and the answer that it shows."""
    content = browser.run("return request(wall.state.K)")
    return content, said(browser, "answer")


def assert_shows_the_model_s_answer(browser, explorer):
    content, answer = shown(browser)
    picture, method = explorer.picture(content["picture"]), content["method"] or None
    assert not content["gone"] and not content["swap"]
    assert answer == explorer.vlm.answer(picture, content["question"], withdraw=None, method=method).text
    assert said(browser, "error") == ""


@pytest.mark.browser
def test_dragging_the_wall_asks_the_model(browser, server):
    opened(browser, server)
    for layer in (12, 2, 0, 5):
        x, y = browser.run(
            "const b = document.querySelector('#handle span').getBoundingClientRect();"
            "return [b.x + b.width / 2, b.y + b.height / 2]"
        )
        step = browser.run("return (document.getElementById('cells').clientHeight - 20) / 12")
        now = browser.run("return wall.state.K")
        browser.drag((x, y), (x, y + (layer - now) * step))
        settle(browser)
        assert browser.run("return wall.state.K") == layer
        assert_shows_the_model_s_answer(browser, server.explorer)
    assert browser.console() == []


@pytest.mark.browser
def test_a_hundred_fast_drags_leave_the_last_state(browser, server):
    opened(browser, server)
    browser.run("for (let i = 0; i < 100; i++) wall.move([0, 12, 3, 7][i % 4] + i % 2); wall.move(4)")
    settle(browser)
    assert browser.run("return wall.state.K") == 4 and said(browser, "knob") == "K = 4"
    assert_shows_the_model_s_answer(browser, server.explorer)


@pytest.mark.browser
def test_asking_and_choosing_a_picture(browser, server):
    opened(browser, server)
    browser.run("document.querySelectorAll('#samples button')[5].click()")
    settle(browser)
    browser.wait("await ask({question: 'Describe the image.'})")
    settle(browser)
    assert_shows_the_model_s_answer(browser, server.explorer)
    browser.wait("await ask({question: ' '})")
    assert "the prompt is empty" in said(browser, "error")


@pytest.mark.browser
def test_a_scene_can_be_drawn(browser, server):
    opened(browser, server)
    browser.wait("await ask({question: 'What color is the star?'})")
    browser.run("document.getElementById('draw-open').click()")
    browser.wait(
        "while (chosen.picture === document.querySelector('#samples button').dataset.picture)"
        " await new Promise(done => setTimeout(done, 20))"
    )
    for color in ("purple", "yellow"):
        before = browser.run("return chosen.picture")
        browser.run(f"document.querySelector('#colors [data-color={color}]').click()")
        browser.wait("while (chosen.picture === arguments[0]) await new Promise(done => setTimeout(done, 20))", before)
        settle(browser)
        assert_shows_the_model_s_answer(browser, server.explorer)
        assert said(browser, "answer") == color  # of the star, which is chosen at first
    assert browser.console() == []


@pytest.mark.browser
def test_clicking_a_token_lights_what_it_looks_at(browser, server, vlm):
    opened(browser, server)
    browser.run("document.querySelectorAll('#samples button')[0].click()")
    settle(browser)
    browser.wait("await wall.move(12)")
    last = browser.run("return wall.state.words.length - 1")
    browser.run("document.querySelector(`#words [data-token='${arguments[0]}']`).click()", last)
    settle(browser)
    browser.run("wall.chooseLayer(3)")
    content, _ = shown(browser)
    asked = server.explorer.question(content)
    prompt = asked.embedded
    traces = watching.traces(vlm.decoder, prompt, asked.answer.token_ids, None, [last])
    looks = traces.attention[0, 3].mean(0)[: last + 1][asked.prompt.is_visual]
    dark = np.array(browser.run("return [...document.querySelectorAll('.patch')].map(p => +p.style.fillOpacity)"))
    assert looks.argmax() in np.flatnonzero(dark == dark.min())
    reading = watching.readings(vlm, traces.states[0])[4][0][0].strip()
    assert said(browser, "readings").startswith(reading)
    browser.run("document.querySelectorAll('.patch')[20].dispatchEvent(new MouseEvent('click', {bubbles: true}))")
    settle(browser)
    assert browser.run("return document.querySelectorAll('.patch')[20].classList.contains('on')")


@pytest.mark.browser
def test_patches_swaps_and_frozen_layers_reach_the_model(browser, server):
    opened(browser, server)
    explorer = server.explorer
    browser.run(
        "document.getElementById('taking').click();"
        "document.querySelectorAll('.patch')[9].dispatchEvent(new MouseEvent('click', {bubbles: true}))"
    )
    settle(browser)
    content, answer = shown(browser)
    assert len(content["gone"]) == 1 and answer == explorer.frame(content)["answer"]
    assert "1 taken away" in said(browser, "owes")
    browser.run("document.getElementById('bring').click(); document.querySelectorAll('#paint button')[7].click()")
    settle(browser)
    content, answer = shown(browser)
    assert content["method"].startswith("freeze:layers=7+") and not content["gone"]
    assert_shows_the_model_s_answer(browser, explorer)
    browser.wait("await swapTo({picture: document.querySelectorAll('#others button')[13].dataset.picture}, 0, layers)")
    settle(browser)
    content, answer = shown(browser)
    assert content["swap"]["stop"] == 12 and answer == explorer.frame(content)["answer"]
    assert browser.run("return document.querySelectorAll('.side').length") == 2
    assert browser.console() == []


@pytest.mark.browser
def test_the_tour_goes_to_its_end(browser, server):
    opened(browser, server)
    browser.run("document.getElementById('tour-start').click()")
    for step in range(1, 9):
        browser.wait("await new Promise(done => setTimeout(done, 50))")
        settle(browser)
        assert said(browser, "tour-step") == f"{step} of 8" and said(browser, "error") == ""
        browser.run("document.getElementById('tour-next').click()")
    assert browser.run("return document.getElementById('tour-next').disabled")
    browser.run("document.getElementById('tour-end').click()")
    assert browser.run("return document.getElementById('tour').hidden")
    assert browser.console() == []


@pytest.mark.browser
def test_a_layer_unfolds(browser, server):
    opened(browser, server)
    browser.wait("await unfold(3)")
    browser.wait(
        "for (const box of document.querySelectorAll('#steps details')) box.open = true;"
        "await new Promise(done => setTimeout(done, 300))"
    )
    assert "rms_norm" in said(browser, "steps") and " × 128, up to" in said(browser, "steps")
    links = browser.run("return [...document.querySelectorAll('#steps a')].map(link => link.getAttribute('href'))")
    assert all(ask(server, "/" + link.split("#")[0], method="GET")[0] == 200 for link in links)


@pytest.mark.browser
def test_evil_words_are_shown_and_do_nothing(browser, server, vlm, monkeypatch):
    evil = '<img src=x onerror="window.hurt = 1"><script>window.hurt = 1</script>'
    monkeypatch.setattr(exploring, "model_name", lambda folder: evil)
    opened(browser, server)
    assert said(browser, "model").startswith(evil)
    browser.wait("await ask({question: arguments[0]})", evil)
    settle(browser)
    browser.wait("await upload(new File(['no picture'], arguments[0]), arguments[0])", evil)
    assert said(browser, "error").startswith(evil)
    browser.wait("await chooseMethod(arguments[0])", evil)
    assert evil[:20] in said(browser, "error")
    assert browser.run("return window.hurt ?? null") is None
    assert browser.run("return document.querySelectorAll('main script, img[src=x]').length") == 0


@pytest.mark.browser
def test_what_goes_wrong_is_said_on_the_page(browser, server, monkeypatch):
    opened(browser, server)
    browser.wait(f"await upload(new File([new Uint8Array({explore.MOST_PICTURE + 1})], 'photo.raw'), 'photo.raw')")
    assert said(browser, "error").startswith("photo.raw: this is too large")
    monkeypatch.setattr(watching, "frame", lambda *arguments: {}["nothing"])
    browser.wait("await chooseMethod('withdraw:layer=K+own_positions')")
    assert said(browser, "error").startswith("a fault of minivtw, please report it: KeyError: 'nothing'")
    browser.run("window.fetch = () => Promise.reject()")
    browser.wait("await chooseMethod('adaptive')")
    assert said(browser, "error") == "no answer from minivtw.explore; look at its terminal"


@pytest.mark.browser
@pytest.mark.parametrize("width, scheme", [(390, "light"), (390, "dark"), (1600, "light"), (1600, "dark")])
def test_page_fits_and_can_be_read(browser, server, width, scheme):
    opened(browser, server, width=width, scheme=scheme, is_phone=width < 500)
    browser.wait("await wall.move(1)")
    assert browser.run("return document.documentElement.scrollWidth") <= width
    assert browser.run(CONTRASTS) == []
    if width < 500:  # the wall is in the first screen
        assert browser.run("return document.getElementById('stack').getBoundingClientRect().top") < 500


# Every visible text whose contrast with what lies behind it is below WCAG's AA.
CONTRASTS = """
const channels = text => (text.match(/[\\d.]+/g) ?? []).map(Number);
const pen = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
function rgb(color) { pen.clearRect(0, 0, 1, 1); pen.fillStyle = color; pen.fillRect(0, 0, 1, 1); return [...pen.getImageData(0, 0, 1, 1).data]; }
const light = ([r, g, b]) => [r, g, b].map(c => c / 255).map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
  .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
function behind(element) {
  for (let each = element; each; each = each.parentElement) {
    const color = rgb(getComputedStyle(each).backgroundColor);
    if (color[3] === 255) return color;
  }
  return [255, 255, 255];
}
const weak = [];
for (const element of document.querySelectorAll("body *")) {
  const own = [...element.childNodes].some(node => node.nodeType === 3 && node.textContent.trim());
  const style = getComputedStyle(element);
  if (!own || !element.checkVisibility() || element.closest("svg, select, script, :disabled")) continue;
  const [one, other] = [light(rgb(style.color)), light(behind(element))].sort((a, b) => b - a), ratio = (one + 0.05) / (other + 0.05);
  const size = parseFloat(style.fontSize), isLarge = size >= 24 || (size >= 18.66 && +style.fontWeight >= 700);
  if (ratio < (isLarge ? 3 : 4.5)) weak.push(element.id + " " + element.textContent.trim().slice(0, 30) + " " + ratio.toFixed(2));
}
return weak;
"""


@pytest.mark.browser
def test_every_control_has_a_name_and_can_be_reached(browser, server):
    opened(browser, server)
    nameless = browser.run("""
      return [...document.querySelectorAll('button, input, select, [tabindex]')].filter(one => one.checkVisibility())
        .filter(one => !(one.getAttribute('aria-label') || one.textContent.trim() || one.labels?.length || one.querySelector('img[alt]')))
        .map(one => one.outerHTML.slice(0, 80))""")
    assert nameless == []
    reached = set()
    for _ in range(120):
        browser.command("Input.dispatchKeyEvent", type="keyDown", key="Tab", code="Tab", windowsVirtualKeyCode=9)
        reached.add(browser.run("const e = document.activeElement; return e.id || e.parentElement.id"))
    assert {"tiles", "question", "samples", "draw-open", "play", "handle", "words", "preset", "method", "taking",
            "others", "unfold", "paint"} <= reached  # fmt: skip
