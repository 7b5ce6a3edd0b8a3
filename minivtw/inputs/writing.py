"""Files that are written whole or not at all; devices and pipes, which are written into."""

import os
import pathlib
import secrets
import stat
import sys

from ..errors import InputError, reading


def check_writable(path: str | os.PathLike) -> pathlib.Path:
    """Raise InputError where a file cannot be written: before the work, not after it. Returns the path."""
    path = pathlib.Path(path)
    with reading(path, "write"):
        kind, folder = kind_of(path), pathlib.Path(os.path.realpath(path)).parent
        is_replaced = kind in (None, stat.S_IFREG) and not is_output(path)
        if kind not in (None, stat.S_IFREG, stat.S_IFCHR, stat.S_IFIFO):
            why = "it is a folder, or nothing to write into"
        elif kind is None and not folder.is_dir():
            why = "there is no such folder"
        elif not os.access(folder if is_replaced else path, os.W_OK):
            why = "it is not yours to write"
        else:
            return path
    raise InputError(f"cannot write {path}: {why}")


def kind_of(path: str | os.PathLike) -> int | None:
    """What a path leads to, through links: `stat.S_IFREG` and so on; None: nothing yet."""
    try:
        return stat.S_IFMT(os.stat(path).st_mode)
    except FileNotFoundError:
        return None


def is_output(path: str | os.PathLike) -> bool:
    """Whether a path leads to where standard output goes: /dev/stdout, or the file that it was redirected to."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(sys.stdout.fileno()))
    except (OSError, ValueError):  # there is no such file, or standard output is none
        return False


def write_whole(path: str | os.PathLike, content: str | bytes) -> None:
    """Write a file whole or not at all: beside its place, then moved there; the old one stays until then.

    A link stays, and what it leads to is written. A device or a pipe stays too, and gets the content. Raises InputError.
    """
    check_writable(path)
    with reading(path, "write"):
        if is_output(path) and isinstance(content, str):
            print(content, end="", flush=True)
        elif kind_of(path) in (None, stat.S_IFREG) and not is_output(path):
            replace_file(pathlib.Path(os.path.realpath(path)), content)
        else:
            pathlib.Path(path).write_bytes(in_bytes(content))


def in_bytes(content: str | bytes) -> bytes:
    return content.encode() if isinstance(content, str) else content


def replace_file(path: pathlib.Path, content: str | bytes) -> None:
    """A file's new content, in one step for whoever looks; what is half done goes away, whatever interrupts.

    A link is replaced too, and never followed: so a file is written into a folder that may be a stranger's.
    """
    partial = path.with_name(f".minivtw-{secrets.token_hex(8)}")  # the name itself may be as long as names can be
    try:
        with reading(path, "write"):
            with open(partial, "xb") as file:
                file.write(in_bytes(content))
                file.flush()
                os.fsync(file.fileno())
            if path.exists():
                os.chmod(partial, stat.S_IMODE(path.stat().st_mode))
            os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
