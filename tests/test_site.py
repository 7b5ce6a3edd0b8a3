"""The live page without a server: the package itself runs in the browser and says what it says here."""

import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest

import minivtw
from docs.site import build, runtime
from minivtw.checkpoints.hub import embedded_folder
from minivtw.inputs.questions import read_questions
from minivtw.model.cache import KVCache
from minivtw.page.exploring import Explorer

from .browser import Browser
from .doors import needs_loopback
from .site import built, go_live, served, until, until_kept
from .test_explore import CONTRASTS

SAMPLES = read_questions(embedded_folder() / "samples")
LAYERS = (1, 5, 12)  # wrong answers, those of the stored layer, and every layer with the image


@pytest.fixture(scope="module")
def explorer():
    vlm = minivtw.load()
    return Explorer(vlm, vlm.method("auto"), str(build.SCENE))


def requests_of(explorer, number):
    """The request of a sample's answer at each of LAYERS."""
    about = {"picture": explorer.samples[number + 1]["picture"], "question": SAMPLES[number].question}
    return [about | {"method": f"withdraw:layer={layer}", "gone": [], "swap": None} for layer in LAYERS]


def assert_same(here, there):
    """Two frames, of BLAS and of another product: the same but for the last digits."""
    same = ("answer", "ids", "tokens", "layers", "flops", "cache", "method")
    assert {name: here[name] for name in same} == {name: there[name] for name in same}
    assert here["kl"] == pytest.approx(there["kl"], abs=1e-4)


def test_the_page_is_that_of_explore_with_a_policy_and_hashes(tmp_path):
    for name in (*build.SCRIPTS, "page.css", *build.OURS):
        (tmp_path / name).write_text(name, encoding="utf-8")
    page = build.index_html(tmp_path)
    for tag in re.findall(r"<script[^>]*>|<link rel=.stylesheet[^>]*>", page):
        assert re.search(r'="[a-z]+\.(js|css)\?[0-9a-f]{64}" integrity="sha256-', tag), tag
    assert "default-src 'none'" in page and "for index in range(start" in page and not re.search("<!--[a-z]+-->", page)
    line = int(re.search(r"source/model/decoder.py/#L(\d+)", page)[1])
    source = (build.ROOT / "minivtw" / "model" / "decoder.py").read_text(encoding="utf-8").splitlines()
    assert source[line - 1].lstrip().startswith("for index in range(start")


def test_the_source_pages_find_their_style(tmp_path):
    build.write_sources(tmp_path / "source")
    for page in (tmp_path / "source").rglob("index.html"):
        assert '<ol class="code">' in page.read_text(encoding="utf-8")
        links = re.findall(r'<link rel="stylesheet" href="([^"]+)"', page.read_text(encoding="utf-8"))
        assert [(page.parent / link).resolve() for link in links] == [(tmp_path / "page.css").resolve()]


STANDING_IN = """
import json, sys
from docs.site.here import begin
class Body(bytes):
    to_bytes = lambda self: self
answer = begin()
assert "tokenizers.tokenizers" not in sys.modules and sys.modules["safetensors"].__file__.endswith("tensors.py")
for request in json.load(sys.stdin):
    print(answer(request[0], Body(json.dumps(request[1]).encode())))
"""


def test_what_stands_in_for_two_packages_changes_no_answer(explorer, tmp_path):
    """The worker's program, run here: the package with docs/from_scratch/ in place of the two libraries."""
    cell = (build.HERE / "cell.py").read_text(encoding="utf-8")
    asked = [("frame", requests_of(explorer, number)[1]) for number in range(0, 20, 5)]
    mine = {"sample": 2, "method": "mine.py:my_method,layer=3"}
    asked += [
        ("mine", {"text": cell}),
        ("scored", mine),
        ("mine", {"text": "x = 1\n\ny = x / 0\n"}),
        ("scored", mine),
        ("frame", {}),
    ]
    ran = subprocess.run(
        [sys.executable, "-c", STANDING_IN], input=json.dumps(asked), cwd=tmp_path, capture_output=True, text=True,
        encoding="utf-8", env={**os.environ, "PYTHONPATH": str(build.ROOT)}, check=False,
    )  # fmt: skip
    assert ran.stderr == ""
    *frames, took, scored, broken, unscored, wrong = [
        (line[:3], json.loads(line[4:])) for line in ran.stdout.splitlines()
    ]
    for (_, request), (status, frame) in zip(asked, frames):
        assert status == "200"
        assert_same(frame, explorer.frame(request))
    assert took == ("200", {"template": "mine.py:my_method,layer=K"})
    assert scored[1]["points"] in (0, 1) and scored[1]["right"] == "five" and scored[1]["alone"] == 1
    assert broken == ("200", {"error": "line 3: ZeroDivisionError: division by zero"})
    assert unscored[0] == "400" and "ZeroDivisionError" in unscored[1]["error"]
    assert wrong == ("400", {"error": "the request lacks picture"})


def test_a_file_that_is_not_the_published_one_is_refused(tmp_path):
    for name in runtime.PINNED:
        (tmp_path / name).write_bytes(b"another file")
    assert not runtime.complete(tmp_path)
    command = [sys.executable, str(build.HERE / "build.py"), str(tmp_path / "out"), "--runtime", str(tmp_path)]
    ran = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=False)
    assert ran.returncode == 1 and "not the published file" in ran.stderr and not (tmp_path / "out").exists()


# --- in a browser


@pytest.mark.browser
def test_every_link_of_the_site_leads_somewhere(site):
    assert build.broken_links(site) == []


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    needs_loopback()
    return built(tmp_path_factory.mktemp("site"))


@pytest.fixture(scope="module")
def page(site):
    """A browser in which the page is live."""
    with served(site) as address, Browser() as browser:
        go_live(browser, address)
        yield browser


def said(browser, name):
    return browser.run("return document.getElementById(arguments[0]).textContent.trim()", name)


def settle(browser):
    until(browser, "document.getElementById('wall').ariaBusy === 'false'", "the wall does not come to rest")


@pytest.mark.browser
def test_answers_ids_kl_and_counts_are_those_of_this_python(page, explorer):
    for number in range(len(SAMPLES)):
        asked = requests_of(explorer, number)
        script = "const said = []; for (const one of arguments[0]) said.push(await (await live.ask('frame', JSON.stringify(one))).json()); return said"
        for frame, request in zip(page.wait(script, asked), asked):
            assert_same(frame, explorer.frame(request))


LOGITS = """
import json, minivtw
from minivtw.model.cache import KVCache
vlm = minivtw.load()
prompt = vlm.prepare("docs/pictures/scene.png", "What color is the star?")
raise ValueError(json.dumps(vlm.advance(vlm.embed(prompt), KVCache(vlm.config), vlm.method(5))[0].tolist()))
"""


@pytest.mark.browser
def test_logits_agree_to_four_digits(page, explorer):
    error = page.wait("return (await post('mine', {text: arguments[0]})).error", LOGITS)
    there, vlm = np.array(json.loads(error[error.index("[") :])), explorer.vlm
    prompt = vlm.prepare(build.SCENE, build.QUESTION)
    here = vlm.advance(vlm.embed(prompt), KVCache(vlm.config), vlm.method(5))[0]
    np.testing.assert_allclose(there, here, atol=1e-4)


@pytest.mark.browser
def test_a_hundred_fast_drags_leave_the_last_state(page):
    page.console()  # what other tests left there
    page.run("frames.clear(); for (let i = 0; i < 100; i++) wall.move([0, 12, 3, 7][i % 4] + i % 2); wall.move(4)")
    settle(page)
    assert page.run("return wall.state.K") == 4 and said(page, "knob") == "K = 4" and said(page, "error") == ""
    assert said(page, "answer") == page.wait("return (await post('frame', request(4))).answer")
    assert page.console() == []


@pytest.mark.browser
def test_a_drawn_image_is_asked_about(page):
    page.wait("await upload(await new Promise(done => find('scene').toBlob(done)))")
    settle(page)
    assert said(page, "error") == "" and said(page, "answer") != ""
    page.wait("await ask({picture: all('#samples button')[0].dataset.picture})")


@pytest.mark.browser
def test_a_reader_s_own_method_runs_and_is_scored(page):
    page.run("cell.focus()")
    page.command(
        "Input.dispatchKeyEvent", type="keyDown", key="Enter", code="Enter", windowsVirtualKeyCode=13, modifiers=2
    )
    until(page, "/of 20 right/.test(document.getElementById('mine-says').textContent)", "no score")
    assert re.match(r"K = \d+: [\d.]+ of 20 right, with \d+ % less arithmetic", said(page, "mine-says"))
    assert page.run("return document.querySelectorAll('#mine-samples button').length") == 20
    held = page.run("return wall.state.frame.layers.map(marks => [...marks].filter(mark => mark !== '0').length)")
    K = page.run("return wall.state.K")
    assert held == [77] * K + [21] * (12 - K) and said(page, "mine-error") == said(page, "error") == ""


@pytest.mark.browser
@pytest.mark.parametrize(
    "before, after, error",
    [
        ("def method(index, tokens):", "def method(index, tokens:", "SyntaxError"),
        ("stays = ~tokens.is_visual", "stays = ~tokens.visual", "AttributeError"),
        ("return tokens[stays]", "return stays", "must return tokens"),
    ],
)
def test_a_method_with_a_fault_shows_it_with_its_line(page, before, after, error):
    script = "cell.value = original.replace(arguments[0], arguments[1]); document.getElementById('run').click()"
    page.run(script, before, after)
    until(page, "document.getElementById('mine-error').textContent", "no error")
    shown = said(page, "mine-error")
    assert error in shown
    if error.endswith("Error"):  # raised in a line of the cell, which is chosen
        text = (build.HERE / "cell.py").read_text(encoding="utf-8")
        assert f"line {text[: text.index(before)].count(chr(10)) + 1}" in shown
        assert page.run("return cell.value.slice(cell.selectionStart, cell.selectionEnd).trim()") == after
    page.run("cell.value = original; wrongIn(''); chooseMethod('withdraw:layer=K')")
    settle(page)


LEAVING = """
import socket
from pyodide.http import open_url
open_url("ADDRESS")
"""


@pytest.mark.browser
def test_nothing_reaches_another_host_from_the_page_or_the_worker(page, tmp_path):
    (tmp_path / "index.html").write_text("reached", encoding="utf-8")
    page.console()  # what other tests left there
    with served(tmp_path) as elsewhere:
        there = page.wait(
            "return (await post('mine', {text: arguments[0]})).error", LEAVING.replace("ADDRESS", elsewhere)
        )
        here = page.wait("return fetch(arguments[0]).then(answer => 'reached', error => String(error))", elsewhere)
    assert "line 4" in there and "JsException" in there and "reached" not in there + here
    assert sum("Connecting to" in message and "Content Security Policy" in message for message in page.console()) == 2


@pytest.mark.browser
@pytest.mark.parametrize("width, scheme", [(390, "light"), (390, "dark"), (1600, "light"), (1600, "dark")])
def test_the_page_fits_and_can_be_read(site, page, width, scheme):
    page.command("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 500)
    page.command("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    assert page.run("return document.documentElement.scrollWidth") <= width
    assert page.run(CONTRASTS) == []
    nameless = page.run("""
      return [...document.querySelectorAll('button, input, select, textarea, [tabindex]')].filter(one => one.checkVisibility())
        .filter(one => !(one.getAttribute('aria-label') || one.textContent.trim() || one.labels?.length || one.querySelector('img[alt]')))
        .map(one => one.outerHTML.slice(0, 80))""")
    assert nameless == []


@pytest.mark.browser
def test_recorded_answers_are_there_at_every_k_without_the_model(site, tmp_path, explorer):
    """And what else is asked then is told what is wrong: the model's file is damaged."""
    shutil.copytree(site, tmp_path / "site")
    model = tmp_path / "site" / "model.zip"
    model.write_bytes(model.read_bytes()[:-1] + b"?")
    with served(tmp_path / "site") as address, Browser() as browser:
        browser.show(address)
        until(
            browser, "/cannot run here/.test(document.getElementById('live').textContent)", "the damage is not noticed"
        )
        assert "model.zip is not the file" in said(browser, "live")
        about = {"picture": explorer.samples[0]["picture"], "question": build.QUESTION, "gone": [], "swap": None}
        for K in range(12, -1, -1):
            browser.wait("await wall.move(arguments[0])", K)
            assert said(browser, "answer") == explorer.frame(about | {"method": f"withdraw:layer={K}"})["answer"]
        browser.run("document.querySelectorAll('#samples button')[3].click()")
        until(browser, "document.getElementById('error').textContent", "no word of the model that is missing")
        assert "recorded answers only" in said(browser, "error")


@pytest.mark.browser
def test_the_second_visit_needs_no_network_and_unpacks_nothing(site):
    with Browser() as browser:
        with served(site) as address:
            go_live(browser, address)
            until_kept(browser)
            browser.wait("await navigator.serviceWorker.ready")
            archives = r"for (const {url} of await cache.keys()) if (/\.whl|(package|model)\.zip/.test(url)) await cache.delete(url)"
            browser.wait(f"const cache = await caches.open('minivtw'); {archives}")
        go_live(browser, address)
        assert browser.run("return document.body.dataset.live") == "same" and said(browser, "error") == ""
        assert browser.wait(
            "return (await post('ask', {picture: chosen.picture, question: 'Describe the image.'})).full"
        ).startswith("a black ring")
        assert [message for message in browser.console() if "Failed to load resource" not in message] == []
