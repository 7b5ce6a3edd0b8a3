"""Where a model is found: folders, the layout of the Hugging Face cache, and names on the hub, without any network."""

import json
import os
import pathlib
import subprocess
import sys
from unittest import mock

import pytest

import minivtw
from minivtw import InputError, calibrate, doctor, generate
from minivtw.checkpoints import hub
from tests.doors import assert_one_line_error, copied, run
from tests.families.test_families import GOLDEN as FAMILIES
from tests.small_llava import write_folder

NAME = "Some-Owner/some.model-1B"


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """A model in a Hugging Face cache, two revisions of it, and no variable but HF_HUB_CACHE to find it by."""
    for variable in ("HF_HOME", "XDG_CACHE_HOME", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    model = tmp_path / "models--Some-Owner--some.model-1B"
    write_folder(model / "snapshots" / "0123abc")
    (model / "snapshots" / "456def").mkdir()
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text("0123abc\n", encoding="utf-8")
    return model


def test_a_folder_is_itself(tmp_path):
    assert hub.model_folder(str(tmp_path)) == tmp_path


def test_a_cache_folder_stands_for_its_main_revision(cached):
    assert hub.model_folder(cached) == cached / "snapshots" / "0123abc"
    assert minivtw.load(cached).answer(None, "How many?", max_new_tokens=2).stats["model"] == NAME


def test_without_a_main_revision_the_only_one_counts(cached):
    (cached / "refs" / "main").unlink()
    with pytest.raises(InputError, match="holds 2 revisions"):
        hub.model_folder(cached)
    (cached / "snapshots" / "456def").rmdir()
    assert hub.model_folder(cached) == cached / "snapshots" / "0123abc"


def generated(cache, name):
    """`minivtw.generate` with the hub's library itself, which reads its variables when it is imported, offline."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(cache)}
    command = [sys.executable, "-m", "minivtw.generate", "Hi?", "--model", name, "--max-new-tokens", "2", "--json"]
    root = pathlib.Path(__file__).parents[1]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=root)


def test_a_cached_name_needs_no_network(cached):
    (cached / "refs" / "main").write_bytes(b"0123abc")  # as the hub's library writes it
    ran = generated(cached.parent, NAME)
    assert ran.returncode == 0 and json.loads(ran.stdout)["model"] == NAME


def test_a_missing_folder_is_no_name():
    for missing in ("nowhere", "a/b/c", "/nowhere/at-all", "some where/else"):
        with pytest.raises(InputError, match="there is no model folder"):
            hub.model_folder(missing)


def test_only_safetensors_json_and_a_template_are_asked_for(tmp_path):
    fake = mock.Mock()
    fake.snapshot_download.return_value = str(tmp_path)
    with mock.patch.dict(sys.modules, huggingface_hub=fake):
        assert hub.model_folder(NAME) == tmp_path
        assert hub.tokenizer_folder(tmp_path, NAME, downloads=True) == tmp_path
    asked = [call.kwargs["allow_patterns"] for call in fake.snapshot_download.call_args_list]
    assert asked == [["*.safetensors", "*.json", "chat_template.jinja"], ["*.json"]]
    assert not any(call.kwargs["local_files_only"] for call in fake.snapshot_download.call_args_list)


def test_what_the_hub_says_becomes_one_line(tmp_path):
    fake = mock.Mock()
    fake.snapshot_download.side_effect = OSError("the network is down\nand here are\nmany more lines")
    with mock.patch.dict(sys.modules, huggingface_hub=fake):
        ran = run(generate.main, "How many?", "--model", NAME)
        assert_one_line_error(ran, f"cannot download {NAME}: the network is down; or bring its files and pass their")


def test_offline_nothing_is_asked(tmp_path):
    """No file, no network, one line."""
    ran = generated(tmp_path, NAME)
    assert ran.returncode == 2 and ran.stderr.count("\n") == 1
    assert ran.stderr.startswith(f"minivtw: error: cannot download {NAME}: ")


@pytest.fixture
def asked(monkeypatch):
    """What the hub's library was asked for, with `local_files_only`. It has nothing."""
    asked = []

    def snapshot_download(name, allow_patterns, local_files_only):
        asked.append((name, local_files_only))
        raise FileNotFoundError(f"no {name}")

    monkeypatch.setitem(sys.modules, "huggingface_hub", mock.Mock(snapshot_download=snapshot_download))
    return asked


@pytest.mark.parametrize("door", [generate.main, doctor.main])
def test_a_folder_never_asks_the_hub(tmp_path, asked, door):
    """nanoVLM's folders have no tokenizer, and what their config names may be anybody's."""
    folder = tmp_path / "model"
    copied(FAMILIES / "nanovlm-first", folder)
    (folder / "tokenizer.json").unlink()
    config = json.loads((folder / "config.json").read_text(encoding="utf-8")) | {"lm_tokenizer": "Some-Owner/tracker"}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    ran = run(door, *["How many?", "--model"] * (door is generate.main), folder)
    assert_one_line_error(
        ran, f"{folder} has no tokenizer.json, and Some-Owner/tracker's cannot be fetched: it is not in the Hugging"
    )
    assert asked == [("Some-Owner/tracker", True)]


def test_a_model_that_is_asked_for_by_name_may_have_another_ones_tokenizer(tmp_path, asked):
    (tmp_path / "tokenizer.json").write_bytes(b"{}")
    assert hub.tokenizer_folder(tmp_path, NAME, downloads=True) == tmp_path
    (tmp_path / "tokenizer.json").unlink()
    assert hub.tokenizer_folder(tmp_path, None, downloads=True) == tmp_path
    with pytest.raises(InputError, match=f"has no tokenizer.json, and {NAME}'s cannot be fetched: cannot download"):
        hub.tokenizer_folder(tmp_path, NAME, downloads=True)
    assert asked == [(NAME, False)]


@pytest.mark.parametrize("model", ["", 5, b"x", [], 1.5, object(), ("a", "b"), {}])
def test_what_is_no_model_is_an_input_error(model):
    with pytest.raises(InputError, match="a model is a folder or a name, not"):
        minivtw.load(model)


def test_an_empty_name_is_not_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(write_folder(tmp_path))
    for main, arguments in ((generate.main, ["Hi?", "--model", ""]), (doctor.main, [""]), (calibrate.main, [""])):
        assert_one_line_error(run(main, *arguments), "a model is a folder or a name, not ''")
    assert minivtw.load(".").folder.samefile(tmp_path)
