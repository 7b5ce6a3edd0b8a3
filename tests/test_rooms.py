"""The house keeps its shape: imports go one way, and what is to be read in one sitting stays that short."""

import importlib.util
import pathlib

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "minivtw"
ORDER = (
    "model",
    "methods",
    "inputs",
    "checkpoints",
    "held",
    "cli",
    "search",
    "analysis",
    "timing",
    "page",
    "commands",
    "plug",
)  # fmt: skip  each imports only earlier ones


def rooms():
    """docs/pictures/rooms.py, which reads the imports."""
    spec = importlib.util.spec_from_file_location("rooms", ROOT / "docs" / "pictures" / "rooms.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def lines(*paths):
    return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in paths)


def test_imports_between_rooms_go_one_way():
    _, arrows = rooms().read()
    assert arrows
    wrong = [arrow for arrow in arrows if ORDER.index(arrow[0]) < ORDER.index(arrow[1])]
    assert not wrong


def test_no_two_files_import_each_other():
    imports, read = {}, rooms()
    names = {".".join(path.relative_to(PACKAGE).with_suffix("").parts) for path in PACKAGE.rglob("*.py")}
    for path in PACKAGE.rglob("*.py"):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        imports[name] = {target for target in read.imports_of(path) if target in names}

    def reaches(start, goal, seen=()):
        return any(nxt == goal or (nxt not in seen and reaches(nxt, goal, (*seen, nxt))) for nxt in imports[start])

    assert not [name for name in imports if reaches(name, name)]


def test_what_is_read_in_one_sitting_stays_short_and_the_readme_says_how_long_it_is():
    """Numbers to be lowered, and raised only on purpose."""
    model = [*(PACKAGE / "model").glob("*.py")]
    path = [file for file in model if file.name != "blocks.py"]  # which is about speed alone
    path += [PACKAGE / name for name in ("methods/withdrawal.py", "vlm.py", "inputs/images.py", "inputs/prompts.py")]
    assert lines(*model) <= 934
    assert lines(*path) <= 1386
    assert lines(*PACKAGE.rglob("*.py")) <= 11218
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert f"on one page of {lines(ROOT / 'docs' / 'pico.py')} lines" in readme
    assert f"then the {lines(*path):,} lines that do it properly" in readme
    assert f"tokens through layers; {lines(*model)} lines" in readme


def test_no_file_is_longer_than_300_lines():
    paths = [*PACKAGE.rglob("*.py"), *(ROOT / "weights" / "recipe").glob("*.py")]
    too_long = {path.name: lines(path) for path in paths if lines(path) > 300}
    assert not too_long


def test_the_drawing_of_the_rooms_is_that_of_these_rooms():
    drawn = (ROOT / "docs" / "pictures" / "rooms.svg").read_text(encoding="utf-8")
    assert drawn == rooms().draw(*rooms().read())
