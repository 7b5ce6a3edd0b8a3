"""Pyodide, which is Python as WebAssembly, with its NumPy and Pillow: which files, where they are published, and their hashes."""

import hashlib
import os
import pathlib
import urllib.request

VERSION = "0.27.7"
NAME = f"pyodide-{VERSION}"
CORE, WHEELS = f"https://cdn.jsdelivr.net/npm/pyodide@{VERSION}/", f"https://cdn.jsdelivr.net/pyodide/v{VERSION}/full/"
PINNED = {  # file -> where it is published, its SHA-256
    "pyodide.mjs": (CORE, "04c052c815abb0bf2981fa38c2dfa58e3120ee5288c956df2b2a15e301782c5f"),
    "pyodide.asm.js": (CORE, "6b4c90de5b7172873f04f21884d0e9d2274e305fe32116558fe3e4fbe3618d51"),
    "pyodide.asm.wasm": (CORE, "a50dd1843f805a0b7c45b61037ee0d7b26dfe85efe0e18ef95a34ad24e401f5f"),
    "python_stdlib.zip": (CORE, "16611534726e5d8ac2bd8f926410b2dcb8d6f49aa24913463533b457a2115c16"),
    "numpy-2.0.2-cp312-cp312-pyodide_2024_0_wasm32.whl": (
        WHEELS, "ebb61241d962b98b21597d7ce43b67668a6d5bab3acec4fbe958657320d7cd08"),
    "pillow-10.2.0-cp312-cp312-pyodide_2024_0_wasm32.whl": (
        WHEELS, "43eab147a9355385a99eeac18fb577d4af2fe4bd0bbd23d3ba3ddb92e72c2815"),
}  # fmt: skip
# What Pyodide reads of its list of packages. The list itself is empty: our worker unpacks the wheels.
LOCK = {
    "info": {"abi_version": "2024_0", "arch": "wasm32", "platform": "emscripten_3_1_58", "python": "3.12.7", "version": VERSION},
    "packages": {},
}  # fmt: skip


def cached() -> pathlib.Path:
    """Where downloaded files are kept."""
    from minivtw.checkpoints.hub import own_cache

    return own_cache() / NAME


def is_genuine(name: str, data: bytes) -> bool:
    return hashlib.sha256(data).hexdigest() == PINNED[name][1]


def complete(folder: pathlib.Path) -> bool:
    """Whether a folder has all files, each with its hash."""
    return all((folder / name).is_file() and is_genuine(name, (folder / name).read_bytes()) for name in PINNED)


def download() -> pathlib.Path:
    """The files, from the cache or from where they are published. Raises SystemExit with what is wrong."""
    folder = cached()
    folder.mkdir(parents=True, exist_ok=True)
    for name, (address, _) in PINNED.items():
        if (folder / name).is_file() and is_genuine(name, (folder / name).read_bytes()):
            continue
        try:
            with urllib.request.urlopen(address + name) as answer:
                data = answer.read()
        except OSError as error:
            raise SystemExit(
                f"cannot download {address}{name}: {error}; or bring the files and pass --runtime"
            ) from error
        if not is_genuine(name, data):
            raise SystemExit(f"{address}{name} is not the file that is pinned here: its hash is another one")
        beside = folder / f"{name}.{os.getpid()}"
        beside.write_bytes(data)
        beside.replace(folder / name)
    return folder
