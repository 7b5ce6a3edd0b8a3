"""The report: what it tells is what the model did, it is one safe file, and in a browser it moves."""

import base64
import json
import re

import numpy as np
import pytest
from PIL import Image, ImageDraw

import minivtw
from minivtw import report, search
from minivtw.analysis import charts, page
from minivtw.model.tokens import EmbeddedPrompt

from .browser import Browser
from .doors import assert_one_line_error, run

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
        patch.setattr(report, "REPEATS", 1)
        yield


@pytest.fixture(scope="module")
def vlm():
    return minivtw.load()


@pytest.fixture(scope="module")
def story(vlm):
    return report.tell(vlm, scene(), QUESTION, vlm.method(K))


@pytest.fixture
def picture(tmp_path):
    scene().save(tmp_path / "scene.png")
    return tmp_path / "scene.png"


def data_of(html):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.S).group(1))


def test_page_is_one_file_without_network(story):
    html = page.page(story)
    assert "<!--" not in html  # every gap is filled
    assert not re.search(r"""(src|href)=(?!["']?data:)""", html)
    assert not re.search(r"https?://(?!www\.w3\.org/)|@import|url\(", html)
    assert "default-src 'none'" in html
    assert len(html) < 2_000_000


def test_page_tells_what_the_model_did(vlm, story):
    html, data = page.page(story), data_of(page.page(story))
    full, withdrawn = (
        vlm.answer(scene(), QUESTION, withdraw=layer, max_new_tokens=report.LONGEST_ANSWER) for layer in (None, K)
    )
    assert story.answers == {"full": full.text, "withdrawn": withdrawn.text}
    assert data["layer"] == K and len(data["tokens"]) == len(withdrawn.token_ids)
    for stats in (full.stats, withdrawn.stats):
        assert f"{stats['flops']['prefill'] / 1e6:,.1f}" in html and f"{stats['cache']['bytes'] / 1e3:,.1f}" in html
    prompt = vlm.prepare(scene(), QUESTION)
    asked = EmbeddedPrompt(vlm.embed(prompt), prompt.is_visual)
    np.testing.assert_allclose(story.curve, search.kl_curve(vlm.decoder, asked), atol=1e-6)
    assert (story.worst >= story.curve - 1e-4).all()  # float32 sums over more tokens run in another order
    # The runs go over the answer that was given: its first token is what the deepest layer reads.
    assert data["runs"]["withdrawn"]["readings"][0][-1][0][0] == data["tokens"][0]


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
        (tmp_path / "withdrawal.json").write_text(json.dumps(stored))
    assert report.stored_eta(tmp_path) == eta


def test_maps_survive_their_packing(story):
    data = data_of(page.page(story))
    for name, told in story.runs.items():
        values = np.frombuffer(base64.b64decode(data["runs"][name]["maps"]), np.uint8).reshape(told.maps.shape)
        largest = np.array(data["runs"][name]["largest"])[:, None, None]
        np.testing.assert_allclose(values / 255 * largest, told.maps, atol=largest.max() / 500)
        np.testing.assert_allclose(data["runs"][name]["totals"], told.maps.sum(-1), atol=1e-4)


def test_image_is_gone_in_deep_layers_of_the_withdrawn_run_only(story):
    withdrawn, full = story.runs["withdrawn"], story.runs["full"]
    assert not withdrawn.maps[:, K:].any() and full.maps[:, K:].any()
    np.testing.assert_allclose(withdrawn.maps[:, :K], full.maps[:, :K], atol=1e-6)


def test_page_without_withdrawal_says_so(vlm):
    html = page.page(report.tell(vlm, scene(), QUESTION, None))
    assert "nothing is withdrawn." in html and "image leaves, K" not in html
    assert data_of(html)["layer"] is None


def test_words_cannot_break_out_of_the_page(story):
    evil = "</script><script>alert(1)</script><!--data-->\"'&"
    html = page.page(
        story._replace(question=evil, answers={"withdrawn": evil, "full": "x" + evil}, tokens=[evil], model=evil)
    )
    assert "<script>alert" not in html
    assert data_of(html)["tokens"] == [evil]
    assert html.count("<script") == page.TEMPLATE.read_text().count("<script")


def test_picture_as_seen_has_its_colours_back(vlm):
    tiles = vlm.prepare(scene(), QUESTION).tiles
    (seen,) = page.as_seen(tiles, scene())
    small = np.asarray(scene().resize(seen.size, Image.Resampling.BICUBIC), float)
    assert np.abs(np.asarray(seen, float) - small).mean() < 2  # of 255


def test_tiles_share_the_visual_tokens():
    tiles = np.zeros((3, 3, 8, 8), np.float32)
    story = page.Story(*[None] * len(page.Story._fields))._replace(
        tiles=tiles, picture=scene(), runs={"full": page.Run(np.zeros((1, 2, 48)), None, None)}
    )  # fmt: skip
    html = page.tiles_html(story)
    assert html.count("<img") == 3 and html.count('class="patch"') == 48
    assert 'width="25.000"' in html  # 4 x 4 patches in each


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


def test_door_writes_the_page(picture, tmp_path):
    ran = run(report.main, picture, QUESTION, "-o", tmp_path / "out.html", "--withdraw", K)
    assert ran.code == 0 and "out.html" in ran.out
    assert data_of((tmp_path / "out.html").read_text(encoding="utf-8"))["layer"] == K
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.html", "scene.png"]


def test_bad_input_is_one_line_and_leaves_the_old_page(picture, tmp_path):
    old = tmp_path / "report.html"
    old.write_text("old")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    assert_one_line_error(run(report.main, tmp_path / "broken.png", QUESTION, "-o", old), "is not an image")
    assert_one_line_error(run(report.main, tmp_path / "none.png", QUESTION, "-o", old), "none.png")
    assert_one_line_error(run(report.main, picture, " ", "-o", old), "the prompt is empty")
    assert_one_line_error(run(report.main, picture, QUESTION, "-o", old, "--withdraw", 99), "from 0 to")
    assert_one_line_error(run(report.main, picture, QUESTION, "-o", tmp_path / "no" / "r.html"), "cannot write")
    assert_one_line_error(run(report.main, picture, QUESTION, "-o", tmp_path), "cannot write")
    assert old.read_text() == "old"
    assert not list(tmp_path.glob(".*"))


# --- in headless Chromium


@pytest.fixture(scope="module")
def opened(story, tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.html"
    path.write_text(page.page(story), encoding="utf-8")
    with Browser() as browser:
        yield browser, path


def fills(browser):
    return browser.run("return [...document.querySelectorAll('.patch')].map(patch => patch.style.fill)")


def slide(browser, layer):
    browser.run(
        "const s = document.getElementById('layer'); s.value = arguments[0]; s.dispatchEvent(new Event('input'))", layer
    )


@pytest.mark.browser
def test_slider_moves_the_overlay(opened, story):
    browser, path = opened
    browser.show(path)
    seen = []
    for layer in range(len(story.curve)):
        slide(browser, layer)
        seen.append(fills(browser))
        gone = browser.run("return document.getElementById('explorer').classList.contains('left')")
        assert gone == (layer >= K)
        share = story.runs["withdrawn"].maps[0, layer].sum()
        said = browser.run("return document.getElementById('says').textContent")
        assert (
            ("The image has left" in said)
            if gone
            else (float(said.split(" %")[0]) == pytest.approx(100 * share, abs=0.6))
        )
    assert all(shallow != deep for shallow, deep in zip(seen[:K], seen[1 : K + 1]))
    assert len({tuple(each) for each in seen[K:]}) == 1  # clear glass
    assert browser.console() == []


@pytest.mark.browser
def test_warmest_patch_is_the_one_looked_at_most(opened, story):
    browser, path = opened
    browser.show(path)
    slide(browser, 2)
    greens = browser.run("return [...document.querySelectorAll('.patch')].map(p => +p.style.fill.match(/[\\d.]+/g)[1])")
    assert story.runs["withdrawn"].maps[0, 2].argmax() in np.flatnonzero(np.array(greens) == max(greens))


@pytest.mark.browser
def test_image_can_be_made_to_stay(opened):
    browser, path = opened
    browser.show(path)
    slide(browser, K + 1)
    before = fills(browser)
    browser.run("document.querySelector('[data-run=full]').click()")
    assert fills(browser) != before
    assert browser.run("return [...document.querySelectorAll('[data-bars]')].map(bars => bars.hidden)") == [True, False]
    assert browser.console() == []


@pytest.mark.browser
def test_numbers_appear_on_hover_and_a_click_chooses_the_layer(opened):
    browser, path = opened
    browser.show(path, height=3000)  # nothing to scroll to
    area = browser.run(
        "const b = document.querySelector('[data-bars=withdrawn] [data-column=\"3\"]').getBoundingClientRect();"
        "return [b.x + b.width / 2, b.y + b.height / 2]"
    )
    for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
        browser.command("Input.dispatchMouseEvent", type=kind, x=area[0], y=area[1], button="left", clickCount=1)
    tip = browser.run("const t = document.getElementById('tip'); return t.hidden ? '' : t.textContent")
    assert tip.startswith("layer 3\nvisual: ") and tip.count("%") == 4
    assert browser.run("return document.getElementById('layer').value") == "3"


@pytest.mark.browser
def test_every_token_has_its_own_maps(opened, story):
    browser, path = opened
    browser.show(path)
    slide(browser, 1)
    buttons = browser.run("return [...document.querySelectorAll('#tokens button')].length")
    assert buttons == len(story.tokens)
    first = fills(browser)
    browser.run("[...document.querySelectorAll('#tokens button')].at(-1).click()")
    assert (fills(browser) != first) == (buttons > 1)


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
