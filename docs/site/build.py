"""The live page as a site that needs no server: python docs/site/build.py FOLDER [--runtime FOLDER]

The page of `minivtw.explore` with the package itself, which runs in the browser (Pyodide: Python and NumPy as WebAssembly),
and the chapters where Zensical is installed (`pip install -e '.[site]'`). Any static host serves the folder; to try it:
python -m http.server -d FOLDER
"""

import argparse
import base64
import gzip
import hashlib
import importlib.util
import inspect
import json
import pathlib
import re
import sys
import textwrap
import zipfile
from html import escape

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(ROOT))

import minivtw  # noqa: E402
from docs.site import chapters, runtime  # noqa: E402
from minivtw.explore import SCRIPTS  # noqa: E402
from minivtw.methods import withdrawal  # noqa: E402
from minivtw.model import decoder  # noqa: E402
from minivtw.page.exploring import Explorer  # noqa: E402
from minivtw.page.page import PACKAGE, explore_html, page_css, part, source_html  # noqa: E402

OURS = "live.js", "mine.js", "worker.js", "service.js", "site.css"
DOCS = f"{chapters.REPOSITORY}/blob/main/docs"
SCENE, QUESTION = ROOT / "docs" / "pictures" / "scene.png", "What color is the star?"
# The page, and so the worker that it starts from a blob, reaches nothing but this site.
POLICY = (
    "default-src 'none'; img-src 'self' data: blob:; style-src 'self'; script-src 'self' 'wasm-unsafe-eval'; "
    "worker-src 'self' blob:; connect-src 'self'; manifest-src 'none'; base-uri 'none'; form-action 'none'"
)


def zipped(path: pathlib.Path, files: list[pathlib.Path]) -> None:
    """Files of the repository; the same files make the same bytes."""
    with zipfile.ZipFile(path, "w", compresslevel=9) as archive:
        for file in sorted(files):
            name = zipfile.ZipInfo(file.relative_to(ROOT).as_posix())
            archive.writestr(name, file.read_bytes(), zipfile.ZIP_DEFLATED)


def recorded() -> dict[str, dict]:
    """What the page asks for first, and at every K: request -> answer."""
    vlm = minivtw.load()
    explorer = Explorer(vlm, vlm.method("auto"), str(SCENE))
    about = {"picture": explorer.samples[0]["picture"], "question": QUESTION}
    requests: list[tuple[str, dict]] = [("start", {}), ("ask", about)]
    for layer in range(vlm.config.layers + 1):
        requests.append(("frame", about | {"method": f"withdraw:layer={layer}", "gone": [], "swap": None}))
    as_sent = lambda content: json.dumps(content, separators=(",", ":"))
    return {f"{name} {as_sent(content)}": getattr(explorer, name)(content) for name, content in requests}


def card(has_chapters: bool) -> str:
    """The cell for a reader's own method, and beside it the code that calls it."""
    lines, first = inspect.getsourcelines(decoder.forward)
    start = next(number for number, line in enumerate(lines) if line.lstrip().startswith("for index"))
    loop = textwrap.dedent("".join(lines[start:-1]))
    text = (HERE / "mine.html").read_text(encoding="utf-8")
    for gap, content in {
        "cell": (HERE / "cell.py").read_text(encoding="utf-8"),
        "line": str(first + start),
        "chapter": "course/08-your-own-method/" if has_chapters else f"{DOCS}/08-your-own-method.md",
        "source": f"{inspect.getsource(withdrawal.withdraw)}\n\n{loop}",
    }.items():
        text = text.replace(f"<!--{gap}-->", escape(content))
    return text


def hashed(page: str, folder: pathlib.Path) -> str:
    """A page whose scripts and style sheets say their hash, and are asked for by it: no older copy is taken for them."""

    def one(found: re.Match) -> str:
        digest = hashlib.sha256((folder / found[2]).read_bytes())
        integrity = base64.b64encode(digest.digest()).decode()
        return f'{found[1]}="{found[2]}?{digest.hexdigest()}" integrity="sha256-{integrity}"'

    return re.sub(r'(src|href)="([a-z]+\.(?:js|css))"', one, page)


def index_html(folder: pathlib.Path, has_chapters: bool = False) -> str:
    """The live page with its policy, where it has come with loading, the cell, and the site's scripts."""
    status = '<p class="soft" id="live" role="status">Recorded answers; the model is being fetched …</p>'
    course = "course/" if has_chapters else f"{DOCS}/README.md"
    links = f'<nav class="soft"><a href="{course}">The course</a><a href="{chapters.REPOSITORY}">The code</a></nav>'
    page = explore_html()
    for place, is_before, added in (
        ('<meta name="viewport"', True, f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'),
        ('<link rel="stylesheet" href="page.css">', False, '\n<link rel="stylesheet" href="site.css">'),
        ("</header>", True, f"{links}\n{status}"),
        ('<section class="card wide" id="arithmetic">', True, card(has_chapters)),
        ('<script src="wall.js">', True, '<script src="live.js"></script>\n'),
        ('<script src="tour.js"></script>', False, '\n<script src="mine.js"></script>'),
    ):
        assert page.count(place) == 1, place
        page = page.replace(place, added + place if is_before else place + added)
    return hashed(page, folder)


def write_sources(folder: pathlib.Path) -> None:
    """Every file of the package with numbered lines, in a folder of its name: the page's links hold on any host."""
    for path in PACKAGE.rglob("*.py"):
        name = path.relative_to(PACKAGE).as_posix()
        (folder / name).mkdir(parents=True, exist_ok=True)
        page = (source_html(name) or "").replace('href="../', 'href="../../')
        (folder / name / "index.html").write_text(page, encoding="utf-8")


def build(folder: pathlib.Path, files: pathlib.Path, has_chapters: bool = False) -> None:
    """Write the site. files: the folder of Pyodide's files, which are checked already."""
    python = folder / runtime.NAME
    python.mkdir(parents=True, exist_ok=True)
    for name in runtime.PINNED:
        data = (files / name).read_bytes()
        if name.endswith(".wasm"):  # not every host would compress it
            name, data = f"{name}.gz", gzip.compress(data, mtime=0)
        (python / name).write_bytes(data)
    (python / "pyodide-lock.json").write_text(json.dumps(runtime.LOCK), encoding="utf-8")
    for name in SCRIPTS:
        (folder / name).write_text(part(name), encoding="utf-8")
    (folder / "page.css").write_text(page_css(), encoding="utf-8")
    for name in OURS:
        (folder / name).write_bytes((HERE / name).read_bytes())
    code = [*PACKAGE.rglob("*.py"), *PACKAGE.glob("page/files/*"), *ROOT.glob("docs/from_scratch/*.py")]
    zipped(folder / "package.zip", [*code, HERE / "here.py", SCENE])
    zipped(folder / "model.zip", [path for path in ROOT.glob("weights/minivtw-tiny/**/*") if path.is_file()])
    (folder / "recorded.json").write_text(json.dumps(recorded()), encoding="utf-8")
    write_sources(folder / "source")
    (folder / "index.html").write_text(index_html(folder, has_chapters), encoding="utf-8")
    write_list(folder)
    if has_chapters:
        chapters.build(folder / "course")


def broken_links(folder: pathlib.Path) -> list[str]:
    """What the pages of the site link to within it, and is not there."""
    broken = []
    for page in folder.rglob("*.html"):
        targets = re.findall(r'(?:href|src)="([^"#?]+)', page.read_text(encoding="utf-8"))
        inside = [target for target in targets if not re.match("[a-z]+:|//", target)]
        broken += [f"{page}: {one}" for one in inside if not (page.parent / one).exists() and page.name != "404.html"]
    return broken


def write_list(folder: pathlib.Path) -> None:
    """files.json: what a visit needs, with sizes and hashes, and the part that the page calls it by while it loads."""
    large = {path for path in (folder / runtime.NAME).iterdir() if path.suffix not in (".js", ".mjs")}
    parts = dict.fromkeys(large, "Python") | {folder / "package.zip": "package", folder / "model.zip": "model"}
    listed = []
    for path in [*parts, *(folder / name for name in (*SCRIPTS, "page.css", *OURS))]:
        data = path.read_bytes()
        name, digest = path.relative_to(folder).as_posix(), hashlib.sha256(data).hexdigest()
        listed.append({"name": name, "bytes": len(data), "sha256": digest, "part": parts.get(path)})
    text = json.dumps({"runtime": runtime.NAME, "files": sorted(listed, key=lambda one: one["name"])}, indent=1)
    (folder / "files.json").write_text(text, encoding="utf-8")


def main() -> None:
    options = argparse.ArgumentParser(description=(__doc__ or "").split(":")[0])
    options.add_argument("folder", type=pathlib.Path)
    options.add_argument("--runtime", type=pathlib.Path, metavar="FOLDER", help="take Pyodide's files from here")
    chosen = options.parse_args()
    if chosen.runtime and not runtime.complete(chosen.runtime):
        sys.exit(f"{chosen.runtime} lacks {', '.join(runtime.PINNED)}, or one of them is not the published file")
    has_chapters = bool(importlib.util.find_spec("zensical"))
    build(chosen.folder, chosen.runtime or runtime.download(), has_chapters)
    if broken := broken_links(chosen.folder):
        sys.exit("\n".join(["links that lead nowhere:", *broken]))
    visit = [path for path in [*chosen.folder.glob("*"), *chosen.folder.glob("pyodide-*/*")] if path.is_file()]
    if not has_chapters:
        print("without the chapters: pip install -e '.[site]' brings what makes pages of them", file=sys.stderr)
    print(f"{chosen.folder}: a first visit fetches {sum(path.stat().st_size for path in visit) / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
