"""The report: what it tells is what the model did, it is one safe file, and in a browser it moves."""

import base64
import hashlib
import io
import json
import re

import numpy as np
import pytest
from PIL import Image, ImageDraw

import minivtw
from minivtw import report
from minivtw.inputs.opening import open_image
from minivtw.page import charts, horizon, page, watching
from minivtw.page import story as stories
from minivtw.search import layer as search

from .browser import Browser
from .doors import assert_one_line_error, run
from .small_llava import write_onevision

QUESTION = "What color is the star?"
K = 5


def scene():
    image = Image.new("RGB", (256, 256), (150, 140, 145))
    pen = ImageDraw.Draw(image)
    pen.ellipse([30, 40, 110, 120], fill=(214, 48, 49))
    pen.rectangle([140, 150, 210, 220], fill=(245, 245, 245))
    return image


@pytest.fixture(autouse=True, scope="module")
def hurry():
    """Seconds are not what is tested."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stories, "REPEATS", 1)
        yield


@pytest.fixture(scope="module")
def vlm():
    return minivtw.load()


@pytest.fixture(scope="module")
def story(vlm):
    return stories.story_of(vlm, scene(), QUESTION, vlm.method(K))


@pytest.fixture
def picture(tmp_path):
    scene().save(tmp_path / "scene.png")
    return tmp_path / "scene.png"


def data_of(html):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.S).group(1))


def test_page_is_one_file_without_network(story):
    html = stories.report_html(story)
    assert "The prompt is long" not in html
    assert not re.search(r"<!--[\w ]+-->", html)  # every gap is filled
    assert not re.search(r"""(src|href)=(?!["']?data:)""", re.sub(r"<script.*?</script>", "", html, flags=re.S))
    assert not re.search(r"https?://(?!www\.w3\.org/)|@import|url\(", html)
    assert "default-src 'none'" in html
    assert len(html) < 2_000_000


def test_the_wall_tells_what_the_model_did_at_every_layer(vlm, story):
    data = data_of(stories.report_html(story))
    assert len(data["frames"]) == vlm.config.layers + 1 and data["layer"] == K
    asked = vlm.embed(vlm.prepare(scene(), QUESTION))
    curve = [*search.kl_curve(vlm.decoder, asked), 0]
    for layer, frame in enumerate(data["frames"]):
        answer = vlm.answer(scene(), QUESTION, withdraw=layer, max_new_tokens=watching.LONGEST_ANSWER)
        assert frame["answer"] == answer.text and frame["ids"] == answer.token_ids
        flops, cache = answer.stats["flops"], answer.stats["cache"]
        assert frame["flops"] == [flops["prefill"], flops["prefill_without_withdrawal"]]
        assert frame["cache"] == [cache["bytes"], cache["bytes_without_withdrawal"]]
        assert frame["kl"] == pytest.approx(curve[layer], abs=1e-5)
        held = [sum(mark != "0" for mark in marks) for marks in frame["layers"]]
        assert held == answer.stats["prefill"]["entered"]
        assert frame["readings"][-1] == frame["next"]  # the lens after the last layer is the model's own head
    assert (story.worst >= np.array(curve[:-1]) - 1e-4).all()  # float32 sums over more tokens run in another order


@pytest.mark.parametrize(
    "stored, eta",
    [
        (None, search.ETA),
        ({"criterion": "kl", "threshold": 0.006}, 0.006),
        ({"criterion": "answer", "threshold": 0.02}, 0.02),
        ({"criterion": "attention", "threshold": 0.1}, search.ETA),  # a share, not nats
        ({"criterion": "kl", "threshold": 0}, search.ETA),  # has no place on a logarithmic axis
    ],
)
def test_the_threshold_shown_is_the_one_that_the_layer_was_stored_by(tmp_path, stored, eta):
    if stored:
        (tmp_path / "withdrawal.json").write_text(json.dumps(stored), encoding="utf-8")
    assert stories.stored_eta(tmp_path) == eta


def test_where_tokens_look_survives_its_packing(story):
    eyes = data_of(stories.report_html(story))["eyes"]
    assert set(map(int, eyes)) == {token for token, word in enumerate(story.words) if word is not None}
    for token, packed in eyes.items():
        looks = story.attention[int(token)]  # (layers, tokens)
        values = np.frombuffer(base64.b64decode(packed["values"]), "<u2").reshape(looks.shape)
        np.testing.assert_allclose(values / 65535 * packed["largest"], looks, atol=1e-5)
        np.testing.assert_allclose(looks.sum(-1), 1, atol=1e-5)


def test_a_page_without_withdrawal_begins_with_the_wall_at_the_end(vlm):
    data = data_of(stories.report_html(stories.story_of(vlm, scene(), QUESTION, None)))
    assert data["layer"] == vlm.config.layers and data["own"] is None


def test_another_method_has_a_place_of_its_own(vlm):
    data = data_of(
        stories.report_html(stories.story_of(vlm, scene(), QUESTION, vlm.method(method="freeze:layers=2-9")))
    )
    assert data["layer"] is None and data["own"]["method"] == "freeze:layers=2-9"
    assert all(("1" in marks) == (2 <= layer <= 9) for layer, marks in enumerate(data["own"]["layers"]))


def test_an_image_that_enters_late_is_marked_from_there_on(vlm):
    question = watching.ask(vlm, watching.see(vlm, scene()), QUESTION)
    layers = watching.frame(vlm, question, vlm.method(method="late:layer=6"))["layers"]
    assert ["0" in marks for marks in layers] == 6 * [True] + 6 * [False]


def test_what_is_stored_with_the_model_begins_where_its_picture_leaves(vlm):
    method = vlm.method(method="freeze:layers=1-2+withdraw:layer=4")
    data = data_of(stories.report_html(stories.story_of(vlm, scene(), QUESTION, method)))
    assert data["layer"] == 4 and data["own"]["method"] == "freeze:layers=1-2+withdraw:layer=4"


def test_words_cannot_break_out_of_the_page(story):
    evil = "</script><script>alert(1)</script><!--data-->\"'&"
    frames = [frame | {"answer": evil, "tokens": [evil]} for frame in story.frames]
    html = stories.report_html(story._replace(question=evil, words=[evil, *story.words[1:]], frames=frames, model=evil))
    assert "<script>alert" not in html
    assert data_of(html)["words"][0] == data_of(html)["frames"][0]["answer"] == evil
    assert html.count("<script") == (page.PAGES / "report.html").read_text(encoding="utf-8").count("<script")


def test_only_the_page_s_own_script_may_run(story):
    html = stories.report_html(story)
    script = re.findall(r"<script>(.*?)</script>", html, re.S)
    digest = base64.b64encode(hashlib.sha256(script[0].encode()).digest()).decode()
    assert len(script) == 1 and f"script-src 'sha256-{digest}'" in html


def test_picture_as_seen_has_its_colours_back(vlm):
    picture = Image.fromarray(np.random.default_rng(0).integers(150, 250, (6, 6, 3), np.uint8)).resize((1200, 1200), 0)
    tiles = vlm.prepare(picture, QUESTION).tiles
    (seen,) = page.as_seen(vlm.parts.vision, tiles)
    small = np.asarray(picture.resize(seen.size, Image.Resampling.BICUBIC), float)
    assert np.abs(np.asarray(seen, float) - small).max() <= 1  # of 255, and so for a picture of any size


def test_the_picture_is_opened_once(vlm, picture, monkeypatch):
    """A picture of 50 million pixels takes gigabytes and seconds otherwise."""
    opened = []
    monkeypatch.setattr("minivtw.vlm.open_image", lambda source: opened.append(source) or open_image(source))
    stories.story_of(vlm, picture, QUESTION, vlm.method(K))
    assert opened == [picture]


def test_where_tokens_are_packed_only_the_whole_view_has_patches(tmp_path):
    """Only its tokens are one a patch, and only they change with it."""
    vlm = minivtw.load(write_onevision(tmp_path / "model"))
    story = stories.story_of(vlm, scene().crop((0, 0, 250, 160)), "What?", vlm.method(2))
    prompt = vlm.prepare(scene().crop((0, 0, 250, 160)), "What?")
    tiles = prompt.tiles.copy()
    tiles[0] += 1
    embedded, other = vlm.embed(prompt).hidden, vlm.embed(prompt._replace(tiles=tiles)).hidden
    changed = (embedded != other).any(1)[prompt.is_visual]
    assert story.patches == [9] + [0] * (len(tiles) - 1) and len(tiles) > 2 and len(changed) > 9
    assert changed.nonzero()[0].tolist() == list(range(9))
    assert data_of(stories.report_html(story))["patches"] == story.patches


def test_charts_stay_inside_their_drawing():
    values = np.array([5.0, 0.3, 1e-9])
    drawing = charts.line_chart(
        "abc", [("kl", "visual", values)], ("layer", "KL"), decades=(-4, 0), threshold=0.003, layer=1
    )
    heights = [float(y) for y in re.findall(r'cy="([-\d.]+)"', drawing)]
    assert len(heights) == 3 and all(0 < y < charts.HEIGHT for y in heights) and heights == sorted(heights)
    assert drawing.count("<title>") == 3 and "kl: 0.3" in drawing


def test_stacked_bars_fill_the_plot():
    drawing = charts.stacked_bars(range(2), ("visual", "sink"), [[0.25, 0.75], [1.0, 0.0]], ("layer", "share"))
    bars = [float(height) for height in re.findall(r'height="([\d.]+)" class="fill (?:visual|sink)"/>', drawing)][:4]
    assert bars[0] + bars[1] == pytest.approx(bars[2] + bars[3], abs=0.2)
    assert bars[1] == pytest.approx(3 * bars[0], abs=0.2)


def test_a_page_grows_no_further_with_a_long_prompt_and_says_what_is_left_out(vlm, monkeypatch):
    asked = vlm.prepare(scene(), QUESTION)
    text, tokens = int((~asked.is_visual).sum()), len(asked.token_ids)
    monkeypatch.setattr(stories, "MOST", 3 * vlm.config.layers * tokens + 1)
    words = (
        f"prompt of {tokens} tokens takes minutes; only the last 3 of its {text} tokens of text show where they look"
    )
    with pytest.warns(UserWarning, match=words):
        story = stories.story_of(vlm, scene(), QUESTION, None)
    html = stories.report_html(story)
    assert list(data_of(html)["eyes"]) == [str(tokens - back) for back in (3, 2, 1)]
    assert f"only its last 3 of {text} tokens of text show it" in html
    monkeypatch.setattr(stories, "MOST", 1)  # the answering token always does
    with pytest.warns(UserWarning, match="only the last 1 of"):
        assert list(stories.story_of(vlm, scene(), QUESTION, None).attention) == [tokens - 1]


def test_door_writes_the_page(picture, tmp_path):
    ran = run(report.main, picture, QUESTION, "-o", tmp_path / "out.html", "--withdraw", K)
    assert ran.code == 0 and "out.html" in ran.out
    assert data_of((tmp_path / "out.html").read_text(encoding="utf-8"))["layer"] == K
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.html", "scene.png"]


def test_the_horizon_is_drawn_where_it_is_wanted(picture, tmp_path, monkeypatch):
    """One image per layer, from what `patch_worth` says (test_horizon.py)."""
    worth = lambda decoder, prompt, answer, layers: np.outer(10.0 ** -np.arange(len(layers)), np.linspace(-1, 1, 64))
    monkeypatch.setattr(horizon, "patch_worth", worth)
    ran = run(report.main, picture, QUESTION, "-o", tmp_path / "out.html", "--withdraw", K, "--horizon")
    html = (tmp_path / "out.html").read_text(encoding="utf-8")
    assert ran.code == 0 and html.count("#undimmed") == 12 and f">K = {K}<" in html
    assert [f">{most}<" in html for most in ("100.0", "1.0", "0.010", "0.000")] == 4 * [True]
    assert not re.search(r"""(src|href)=(?!["']?(data:|#))""", re.sub(r"<script.*?</script>", "", html, flags=re.S))


def test_a_patch_is_as_bright_as_it_is_worth_and_the_line_stands_before_the_first_image_without_the_rest():
    drawing = horizon.drawn("data:", [0, 4, 8], np.array([[1, 0.1, -1e-3, 1e-5], [0] * 4, [0] * 4]), 5)
    shade = re.search(r'pixelated" href="data:image/png;base64,([^"]*)', drawing).group(1)
    assert np.asarray(Image.open(io.BytesIO(base64.b64decode(shade))))[..., 3].tolist() == [[0, 0], [121, 242]]
    assert drawing.index("K = 5") > drawing.index(">8<") > drawing.index(">4<")
    assert "K =" not in horizon.drawn("data:", [0], np.zeros((1, 4)), None)


def test_tiles_that_are_packed_have_no_horizon(tmp_path):
    vlm = minivtw.load(write_onevision(tmp_path / "model"))
    question = watching.ask(vlm, watching.see(vlm, scene()), "What?")
    with pytest.raises(minivtw.InputError, match="an image of one tile, each patch a token"):
        horizon.horizon(vlm, question, None)


def test_bad_input_is_one_line_and_leaves_the_old_page(picture, tmp_path):
    old = tmp_path / "report.html"
    old.write_text("old", encoding="utf-8")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    assert_one_line_error(run(report.main, tmp_path / "broken.png", QUESTION, "-o", old), "is not an image")
    assert_one_line_error(run(report.main, tmp_path / "none.png", QUESTION, "-o", old), "none.png")
    assert_one_line_error(run(report.main, picture, " ", "-o", old), "the prompt is empty")
    assert_one_line_error(run(report.main, picture, QUESTION, "-o", old, "--withdraw", 99), "from 0 to")
    assert_one_line_error(run(report.main, picture, QUESTION, "-o", tmp_path / "no" / "r.html"), "cannot write")
    assert_one_line_error(run(report.main, picture, QUESTION, "-o", tmp_path), "cannot write")
    assert old.read_text(encoding="utf-8") == "old"
    assert not list(tmp_path.glob(".*"))


# --- in headless Chromium


@pytest.fixture(scope="module")
def opened(story, tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.html"
    path.write_text(stories.report_html(story), encoding="utf-8")
    with Browser() as browser:
        yield browser, path


def said(browser, name):
    return browser.run("return document.getElementById(arguments[0]).textContent.trim()", name)


def knob(browser):
    return browser.run(
        "const b = document.querySelector('#handle span').getBoundingClientRect();"
        "return [b.x + b.width / 2, b.y + b.height / 2]"
    )


def row(browser):
    """Pixels of a layer's row."""
    return browser.run("return (document.getElementById('cells').clientHeight - 20) / arguments[0]", 12)


@pytest.mark.browser
def test_dragging_the_wall_rewrites_the_answer(opened, story):
    browser, path = opened
    browser.show(path)
    for layer in (12, 9, 3, 0, 7):
        at = int(browser.run("return document.getElementById('handle').getAttribute('aria-valuenow')"))
        x, y = knob(browser)
        browser.drag((x, y), (x, y + (layer - at) * row(browser)))
        frame = story.frames[layer]
        assert said(browser, "knob") == f"K = {layer}"
        assert said(browser, "answer") == frame["answer"]
        less = f"{100 * (1 - frame['flops'][0] / frame['flops'][1]):.0f} % less"
        assert said(browser, "flops") == less
        wrong = browser.run("return document.querySelectorAll('#answer .wrong').length")
        assert bool(wrong) == (frame["answer"] != story.frames[-1]["answer"])
        assert f"#K={layer}" in browser.run("return location.hash")
    assert browser.console() == []


@pytest.mark.browser
def test_packed_tokens_are_not_drawn_as_patches(opened, tmp_path):
    browser, _ = opened
    vlm = minivtw.load(write_onevision(tmp_path / "model"))
    html = stories.report_html(stories.story_of(vlm, scene().crop((0, 0, 250, 160)), "What?", vlm.method(2)))
    (tmp_path / "packed.html").write_text(html, encoding="utf-8")
    browser.show(tmp_path / "packed.html")
    assert browser.run("return document.querySelectorAll('.patch').length") == 9
    assert "the first 9 one per patch" in said(browser, "visual-says")
    assert said(browser, "where").startswith(f"{data_of(html)['words'].count(None)} visual tokens reach layers 0 … 1")
    assert browser.console() == []


@pytest.mark.browser
def test_the_wall_moves_by_keyboard(opened, story):
    browser, path = opened
    browser.show(path)
    browser.run("document.getElementById('handle').focus()")
    for key, layer in (("End", 12), ("ArrowUp", 11), ("PageUp", 7), ("ArrowDown", 8), ("Home", 0), ("ArrowUp", 0)):
        browser.command("Input.dispatchKeyEvent", type="keyDown", key=key)
        assert said(browser, "knob") == f"K = {layer}"
    told = browser.run("return document.getElementById('handle').getAttribute('aria-valuetext')")
    assert told.endswith(story.frames[0]["answer"])


@pytest.mark.browser
def test_an_address_opens_its_place(opened, story):
    browser, path = opened
    browser.show(path.resolve().as_uri() + "#K=4&layer=2")
    assert said(browser, "knob") == "K = 4" and said(browser, "answer") == story.frames[4]["answer"]
    assert "In layer 2" in said(browser, "where")


@pytest.mark.browser
def test_brightest_patch_is_the_one_looked_at_most(opened, story):
    browser, path = opened
    browser.show(path)
    visual = np.flatnonzero([word is None for word in story.words])
    for token in (len(story.words) - 1, len(story.words) - 4):
        browser.run("document.querySelector(`#words [data-token='${arguments[0]}']`).click()", token)
        for layer in (1, K - 1):
            browser.run(
                "const s = document.getElementById('layer'); s.value = arguments[0]; s.dispatchEvent(new Event('input'))",
                layer,
            )
            dark = browser.run("return [...document.querySelectorAll('.patch')].map(p => +p.style.fillOpacity)")
            looks = story.attention[token][layer, visual]
            assert looks.argmax() in np.flatnonzero(np.array(dark) == min(dark))
            share = float(re.search(r"gives ([\d.]+) %", said(browser, "where")).group(1))
            assert share == pytest.approx(100 * looks.sum(), abs=0.6)
        browser.run("const s = document.getElementById('layer'); s.value = 11; s.dispatchEvent(new Event('input'))")
        assert "has no image" in said(browser, "where")


@pytest.mark.browser
def test_a_click_on_a_column_moves_the_wall(opened):
    browser, path = opened
    browser.show(path, height=3000)  # nothing to scroll to
    area = browser.run(
        "const b = document.querySelector('[data-column=\"3\"]').getBoundingClientRect();"
        "return [b.x + b.width / 2, b.y + b.height / 2]"
    )
    for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
        browser.mouse(kind, area)
    tip = browser.run("const t = document.getElementById('tip'); return t.hidden ? '' : t.textContent")
    assert tip.startswith("layer 3\nnext token: ")
    assert said(browser, "knob") == "K = 3"


@pytest.mark.browser
@pytest.mark.parametrize("width", [320, 390, 768, 1400])
def test_page_fits_every_width(opened, width):
    browser, path = opened
    browser.show(path, width=width, is_phone=width < 500)
    assert browser.run("return document.documentElement.scrollWidth") <= width
    assert (
        browser.run(
            "const widths = [...document.querySelectorAll('.chart')].map(chart => chart.clientWidth);"
            "return Math.min(...widths.filter(width => width))"  # the bars of the other run are hidden
        )
        > 250
    )


@pytest.mark.browser
@pytest.mark.parametrize("scheme, media, is_dark", [("light", "", False), ("dark", "", True), ("dark", "print", False)])
def test_words_stand_out_in_light_dark_and_print(opened, scheme, media, is_dark):
    browser, path = opened
    browser.show(path, scheme=scheme, media=media)

    def luminance(of):
        color = browser.run(f"return getComputedStyle(document.body).{of}")
        channels = np.array([float(part) for part in re.findall(r"[\d.]+", color)[:3]]) / 255
        return np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4) @ [
            0.2126,
            0.7152,
            0.0722,
        ]

    paper, ink = luminance("backgroundColor"), luminance("color")
    assert (paper < ink) == is_dark
    assert (max(paper, ink) + 0.05) / (min(paper, ink) + 0.05) > 7  # WCAG's enhanced contrast
    assert browser.console() == []
