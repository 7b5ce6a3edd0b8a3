"""Renew docs/notebook.ipynb from docs/notebook.md, and the exercises in the chapters: python docs/notebook.py

A block of Python in the text is a cell and is run, all of them in one namespace; what it prints and shows becomes its
output. `<!-- exercise NAME -->` stands for the task, the stub, the check and the solution of docs/exercises/NAME.py; in a
chapter the exercise is written out, up to `<!-- end -->`. The picture of the first page is made from the notebook by

    jupyter nbconvert --to html docs/notebook.ipynb --stdout > notebook.html
    chromium --headless --hide-scrollbars --window-size=1000,1280 --screenshot=docs/pictures/notebook.png notebook.html
"""

import argparse
import ast
import base64
import contextlib
import hashlib
import inspect
import io
import json
import pathlib
import re
import sys
from types import ModuleType
from typing import Any

DOCS = pathlib.Path(__file__).parent
sys.path[:0] = [str(DOCS), str(DOCS.parent)]

from exercises import exercise  # noqa: E402

SOURCE, NOTEBOOK = DOCS / "notebook.md", DOCS / "notebook.ipynb"
MARK = re.compile(r"<!-- exercise (\w+) -->\n")


def title_and_task(module: ModuleType) -> tuple[str, str]:
    """An exercise's heading and what is to be done, in Markdown."""
    title, _, task = inspect.getdoc(module).partition("\n\n")
    return title, task


def code(module: ModuleType, which: str) -> str:
    """The stub or the solution as a reader writes it: under the exercise's name."""
    return inspect.getsource(getattr(module, which)).replace(f"def {which}(", f"def {name_of(module)}(").rstrip()


def name_of(module: ModuleType) -> str:
    return module.__name__.rpartition(".")[2]


def imports(module: ModuleType) -> str:
    """The imports that stub and solution need, as the exercise's file has them."""
    tree = ast.parse(inspect.getsource(module))
    functions = [node for node in tree.body if getattr(node, "name", "") in ("stub", "solution")]
    used = {node.id for function in functions for node in ast.walk(function) if isinstance(node, ast.Name)}
    lines, last = [], None
    for node in tree.body:
        if not isinstance(node, ast.Import | ast.ImportFrom):
            continue
        node.names = [name for name in node.names if (name.asname or name.name) in used]
        if node.names:
            ours = isinstance(node, ast.ImportFrom) and (node.module or "").startswith("minivtw")
            group = "ours" if ours else "numpy" if "numpy" in ast.unparse(node) else "standard"
            lines += [""] * (last not in (None, group)) + [ast.unparse(node)]
            last = group
    return "\n".join(lines)


def solution(module: ModuleType, before: str = "") -> str:
    """A solution, folded away."""
    return f"<details><summary>Solution</summary>\n\n```python\n{before}{code(module, 'solution')}\n```\n\n</details>"


def in_chapter(module: ModuleType) -> str:
    """An exercise as a chapter has it: what is in its blocks can be saved as a file."""
    title, task = title_and_task(module)
    before = f"{imports(module)}\n\n\n" if imports(module) else ""
    return f"### {title}\n\n{task}\n\n```python\n{before}{code(module, 'stub')}\n```\n\n{solution(module, before)}\n"


def renewed(page: str) -> str:
    """A chapter with its exercises as they stand in docs/exercises."""
    return re.sub(
        MARK.pattern + r".*?(?=<!-- end -->)",
        lambda found: f"<!-- exercise {found[1]} -->\n\n{in_chapter(exercise(found[1]))}\n",
        page,
        flags=re.S,
    )


def cells(source: str) -> list[tuple[str, str]]:
    """The notebook's text as ("markdown" or "code", text)."""

    def written_out(found: re.Match[str]) -> str:
        module = exercise(found[1])
        title, task = title_and_task(module)
        lacking = "".join(f"{line}\n" for line in imports(module).splitlines() if line not in source)
        before = f"{lacking}\n\n" if lacking else ""
        stub = f"```python\n{before}{code(module, 'stub')}\n```\n\n```python\ncheck({name_of(module)})\n```"
        return f"### Exercise: {title}\n\n{task}\n\n{stub}\n\n{solution(module)}\n"

    found = list[tuple[str, str]]()
    cut = r"(<details>.*?^</details>$|^```python\n.*?^```$)"  # what is folded away is not run
    for part in re.split(cut, MARK.sub(written_out, source), flags=re.S | re.M):
        if part.startswith("```python"):
            found.append(("code", part.removeprefix("```python\n").removesuffix("\n```")))
        elif part.strip():
            found.append(("markdown", part.strip()))
    return found


def shown(value: Any) -> dict[str, Any]:
    """What a notebook shows for a cell's last value, by kind."""
    data = {"text/plain": re.sub(r" at 0x[0-9A-Fa-f]+", "", repr(value)).splitlines(keepends=True)}
    if hasattr(value, "_repr_html_"):
        data["text/html"] = value._repr_html_().splitlines(keepends=True)
    if hasattr(value, "_repr_png_"):
        file = io.BytesIO()
        value.save(file, "PNG", optimize=True)
        data["image/png"] = base64.b64encode(file.getvalue()).decode()
    return data


def run(text: str, names: dict[str, Any], number: int) -> list[dict[str, Any]]:
    """A code cell's outputs: what it prints, and its last value."""
    tree, printed, outputs = ast.parse(text), io.StringIO(), list[dict[str, Any]]()
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, f"cell {number}", "exec"), names)
        value = eval(compile(ast.Expression(last.value), f"cell {number}", "eval"), names) if last else None
    if printed.getvalue():
        lines = printed.getvalue().splitlines(keepends=True)
        outputs.append({"name": "stdout", "output_type": "stream", "text": lines})
    if value is not None:
        result = {"data": shown(value), "execution_count": number, "metadata": {}, "output_type": "execute_result"}
        outputs.append(result)
    return outputs


def notebook(source: str, names: dict[str, Any] | None = None) -> dict[str, Any]:
    """The notebook of a text, run from docs in a namespace of its own; `names` keeps what it defines."""
    names = {} if names is None else names
    made, number, seen = list[dict[str, Any]](), 0, set[str]()
    with contextlib.chdir(DOCS):
        for kind, text in cells(source):
            digest = hashlib.sha256(text.encode()).hexdigest()
            cell: dict[str, Any] = {"cell_type": kind, "id": digest[:8], "metadata": {}}
            assert cell["id"] not in seen, f"this cell is there twice: {text}"
            seen.add(cell["id"])
            if kind == "code":
                number += 1
                cell |= {"execution_count": number, "outputs": run(text, names, number)}
            made.append(cell | {"source": text.splitlines(keepends=True)})
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    return {"cells": made, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}


if __name__ == "__main__":
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    ).parse_args()
    for path in sorted(DOCS.glob("[0-9]*.md")):
        path.write_text(renewed(path.read_text(encoding="utf-8")), encoding="utf-8")
    made = json.dumps(notebook(SOURCE.read_text(encoding="utf-8")), ensure_ascii=False, indent=1)
    NOTEBOOK.write_text(made + "\n", encoding="utf-8")
