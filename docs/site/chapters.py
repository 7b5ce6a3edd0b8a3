"""The chapters as pages with a search: python docs/site/chapters.py FOLDER (needs `pip install -e '.[site]'`)

The Markdown in docs/ stays the source. Zensical makes pages of a copy, in which links out of docs/ lead to the repository, or, for
a file of the package, to its numbered lines on this site.
"""

import argparse
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parent.parent
DOCS = ROOT / "docs"
REPOSITORY = "https://github.com/minivtw/minivtw"
PAGES = {".md", ".svg", ".png", ".webp", ".html"}  # of docs/, what the site has itself
LINK = re.compile(r"""(?<=\]\()([^)#\s]+)|(?<=href=")([^"#]+)""")
CONFIG = f"""
[project]
site_name = "minivtw"
site_description = "A vision-language model in NumPy, and where its visual tokens can be spared"
docs_dir = "docs"
site_dir = "site"
copyright = '<a href="../">The live page</a> · <a href="{REPOSITORY}">The code</a>, Apache-2.0 · <a href="{REPOSITORY}/blob/main/CITATION.cff">Cite</a>'

[project.theme]
font = false  # the reader's own: nothing comes from another host

[[project.theme.palette]]
media = "(prefers-color-scheme)"
toggle = {{ icon = "lucide/sun-moon", name = "As the system has it; choose light" }}

[[project.theme.palette]]
media = "(prefers-color-scheme: light)"
scheme = "default"
toggle = {{ icon = "lucide/sun", name = "Light; choose dark" }}

[[project.theme.palette]]
media = "(prefers-color-scheme: dark)"
scheme = "slate"
toggle = {{ icon = "lucide/moon", name = "Dark; as the system has it" }}
"""


def is_copied(path: pathlib.Path) -> bool:
    """Whether the site has a file of docs/ itself."""
    return path.is_relative_to(DOCS) and not path.is_relative_to(HERE) and path.suffix in PAGES


def elsewhere(page: pathlib.Path, target: str) -> str:
    """Where a link of a page in docs/ leads on the site."""
    if "://" in target or target.startswith("mailto:"):
        return target
    path = (page.parent / target).resolve()
    if is_copied(path):
        return target
    name = path.relative_to(ROOT).as_posix()
    if name.startswith("minivtw/") and path.suffix == ".py":
        return f"{'../' * len(page.relative_to(DOCS).parts)}source/{name.removeprefix('minivtw/')}/"
    return f"{REPOSITORY}/{'tree' if path.is_dir() else 'blob'}/main/{name}"


def copy(target: pathlib.Path) -> None:
    """What the site has of docs/, with its links changed."""
    for path in DOCS.rglob("*"):
        if not is_copied(path):
            continue
        there = target / path.relative_to(DOCS)
        there.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".md":
            text = path.read_text(encoding="utf-8")
            there.write_text(LINK.sub(lambda found: elsewhere(path, found[0]), text), encoding="utf-8")
        else:
            shutil.copy(path, there)


def build(folder: pathlib.Path) -> None:
    """Write the pages into a folder."""
    with tempfile.TemporaryDirectory() as scratch:
        work = pathlib.Path(scratch)
        copy(work / "docs")
        (work / "zensical.toml").write_text(CONFIG, encoding="utf-8")
        command = [sys.executable, "-m", "zensical", "build", "--strict", "-f", str(work / "zensical.toml")]
        if subprocess.run(command, cwd=work).returncode:
            sys.exit("the chapters were not built; is zensical installed? pip install -e '.[site]'")
        shutil.copytree(work / "site", folder, dirs_exist_ok=True)


def main() -> None:
    options = argparse.ArgumentParser(description=(__doc__ or "").split(":")[0])
    options.add_argument("folder", type=pathlib.Path)
    build(options.parse_args().folder)


if __name__ == "__main__":
    main()
