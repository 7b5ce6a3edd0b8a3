"""Files that commands write: whole or not at all, through links, into devices and pipes; nothing is left behind."""

import os
import pathlib
import socket
import stat
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minivtw import InputError, calibrate, evaluate, generate, report
from minivtw.inputs.writing import check_writable, write_whole
from tests.doors import assert_one_line_error, interrupted, make_world, run


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


def test_a_file_takes_the_old_ones_place_and_keeps_its_rights(tmp_path):
    path = tmp_path / "page.html"
    write_whole(path, "é")
    assert path.read_text(encoding="utf-8") == "é" and os.listdir(tmp_path) == ["page.html"]
    path.chmod(0o640)
    write_whole(path, "new")
    assert path.read_text(encoding="utf-8") == "new" and stat.S_IMODE(path.stat().st_mode) == 0o640


@pytest.mark.parametrize("exists", [True, False])
def test_a_link_stays_and_what_it_leads_to_is_written(tmp_path, exists):
    (tmp_path / "elsewhere").mkdir()
    target = tmp_path / "elsewhere" / "target"
    if exists:
        target.write_text("old", encoding="utf-8")
    (tmp_path / "link").symlink_to("elsewhere/target")
    write_whole(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and target.read_text(encoding="utf-8") == "new" and not target.is_symlink()
    assert os.listdir(tmp_path / "elsewhere") == ["target"]


def test_a_device_stays_a_device_and_gets_the_text(tmp_path):
    master, slave = os.openpty()
    name = os.ttyname(slave)
    (tmp_path / "link").symlink_to(name)
    for path in (name, tmp_path / "link", f"/dev/fd/{slave}"):
        write_whole(path, "page")
        assert os.read(master, 99) == b"page" and stat.S_ISCHR(os.stat(name).st_mode)
    os.close(slave)
    os.close(master)


def test_a_pipe_gets_the_text(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    read = []
    reader = threading.Thread(target=lambda: read.append((tmp_path / "pipe").read_text(encoding="utf-8")))
    reader.start()
    write_whole(tmp_path / "pipe", "page")
    reader.join()
    assert read == ["page"] and stat.S_ISFIFO(os.stat(tmp_path / "pipe").st_mode)


def test_standard_output_by_its_file_is_written_in_order(tmp_path, monkeypatch):
    """`-o /dev/stdout > file`: what was printed before stays before, and what is printed later comes later."""
    path = tmp_path / "everything"
    with open(path, "w", encoding="utf-8") as out:
        monkeypatch.setattr("sys.stdout", out)
        print("first")
        write_whole(f"/proc/self/fd/{out.fileno()}", "page\n")
        print("last")
    assert path.read_text(encoding="utf-8") == "first\npage\nlast\n"


@pytest.mark.parametrize(
    "path", ["", ".", "/", "loop", "gone", "file/below", "socket", "no/where", "x" * 300, "/dev/full"]
)
def test_places_that_cannot_be_written_are_refused(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    pathlib.Path("loop").symlink_to("loop")
    pathlib.Path("gone").symlink_to("no/where")
    pathlib.Path("file").write_text("", encoding="utf-8")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
    before = sorted(os.listdir())
    for attempt in [lambda: write_whole(path, "text")] + [lambda: check_writable(path)] * (path != "/dev/full"):
        with pytest.raises(InputError, match="^cannot write "):  # that /dev/full is full shows when it is written
            attempt()
    assert sorted(os.listdir()) == before


def test_a_name_as_long_as_names_can_be(tmp_path):
    write_whole(tmp_path / ("x" * 255), "text")
    assert os.listdir(tmp_path) == ["x" * 255]


def test_a_disk_that_fills_up_leaves_the_old_file(tmp_path, monkeypatch):
    (tmp_path / "page").write_text("old", encoding="utf-8")

    def no_room(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_room)
    with pytest.raises(InputError, match="No space left on device"):
        write_whole(tmp_path / "page", "new")
    assert os.listdir(tmp_path) == ["page"] and (tmp_path / "page").read_text(encoding="utf-8") == "old"


def test_a_folder_that_is_not_yours(tmp_path, monkeypatch):
    """As the superuser, who may write anywhere, sees it; the system's own answer is asked for."""
    asked = []
    monkeypatch.setattr(os, "access", lambda path, mode: asked.append((pathlib.Path(path), mode)))
    with pytest.raises(InputError, match="not yours to write"):
        check_writable(tmp_path / "page")
    assert asked == [(tmp_path, os.W_OK)]


def test_what_cannot_be_written_is_said_before_the_work(world, monkeypatch):
    def work(*_, **__):
        raise AssertionError("the work was begun")

    for module in (report, evaluate, calibrate):
        monkeypatch.setattr(module, "load", work)
    for output in (world.folder, "/", world.folder / "no" / "where"):
        assert_one_line_error(run(report.main, world.picture, "Hm?", "-o", output), "cannot write")
        assert_one_line_error(run(evaluate.main, world.questions, "--json", output), "cannot write")


def test_locked_folders_are_one_line(world, monkeypatch):
    """What a user who is not the superuser meets, in whatever call."""

    def locked(path, *_, **__):
        raise PermissionError(13, "Permission denied", str(path))

    for name in ("is_dir", "is_file", "read_text", "stat"):
        with monkeypatch.context() as patch:
            patch.setattr(pathlib.Path, name, locked)
            ran = run(generate.main, world.picture, "Hm?", "--model", world.model, "--max-new-tokens", 1)
            assert_one_line_error(ran, "Permission denied")
    with monkeypatch.context() as patch:
        patch.setattr(pathlib.Path, "is_dir", locked)
        assert_one_line_error(run(calibrate.main, world.model), "Permission denied")


@given(st.integers(0, 60))
def test_an_interrupted_write_leaves_the_old_file_or_the_new(tmp_path_factory, calls):
    folder = tmp_path_factory.mktemp("folder")
    (folder / "page").write_text("old", encoding="utf-8")
    try:
        with interrupted(calls):
            write_whole(folder / "page", "new")
    except KeyboardInterrupt:
        pass
    assert os.listdir(folder) == ["page"] and (folder / "page").read_text(encoding="utf-8") in ("old", "new")
