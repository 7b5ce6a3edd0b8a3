"""Where a model is found: folders, the layout of the Hugging Face cache, and names on the hub, without any network."""

import json
import os
import pathlib
import shutil
import subprocess
import sys
from unittest import mock

import pytest

import minivtw
from minivtw import InputError, generate
from minivtw.checkpoints import hub
from tests.doors import assert_one_line_error, run
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


@pytest.fixture
def without_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # as if it were not installed


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


def test_a_cached_name_needs_neither_network_nor_extra(cached, without_extra):
    assert hub.model_folder(NAME) == cached / "snapshots" / "0123abc"
    ran = run(generate.main, "How many?", "--model", NAME, "--max-new-tokens", 2, "--json")
    assert ran.code == 0 and json.loads(ran.out)["model"] == NAME


def test_a_name_without_the_extra_says_what_to_install(cached, without_extra):
    shutil.rmtree(cached)
    ran = run(generate.main, "How many?", "--model", NAME)
    words = f"{NAME} is not in the Hugging Face cache ({cached.parent}); `pip install huggingface-hub`"
    assert_one_line_error(ran, words)


def test_a_missing_folder_is_no_name():
    for missing in ("nowhere", "a/b/c", "/nowhere/at-all", "some where/else"):
        with pytest.raises(InputError, match="there is no model folder"):
            hub.model_folder(missing)


def test_only_safetensors_json_and_a_template_are_asked_for(tmp_path):
    fake = mock.Mock()
    fake.snapshot_download.return_value = str(tmp_path)
    with mock.patch.dict(sys.modules, huggingface_hub=fake):
        assert hub.model_folder(NAME) == tmp_path
        assert hub.tokenizer_folder(tmp_path, NAME) == tmp_path
    asked = [call.kwargs["allow_patterns"] for call in fake.snapshot_download.call_args_list]
    assert asked == [["*.safetensors", "*.json", "chat_template.jinja"], ["*.json"]]


def test_what_the_hub_says_becomes_one_line(tmp_path):
    fake = mock.Mock()
    fake.snapshot_download.side_effect = OSError("the network is down\nand here are\nmany more lines")
    with mock.patch.dict(sys.modules, huggingface_hub=fake):
        ran = run(generate.main, "How many?", "--model", NAME)
        assert_one_line_error(ran, f"cannot download {NAME}: the network is down; or bring its files and pass their")


@pytest.mark.live
def test_offline_nothing_is_asked(tmp_path):
    """The offline switch of huggingface-hub, with the package itself: no file, no network, one line."""
    code = (
        "import sys; from minivtw.terminal import command; from minivtw.generate import main; "
        f"sys.argv = ['generate', 'Hi?', '--model', {NAME!r}]; command(main)"
    )
    root = pathlib.Path(__file__).parents[1]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path)}
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", env=environment, cwd=root)
    assert ran.returncode == 2 and ran.stderr.count("\n") == 1
    assert ran.stderr.startswith(f"minivtw: error: cannot download {NAME}: ")


def test_a_tokenizer_may_be_that_of_another_model(cached, tmp_path, without_extra):
    own, without = write_folder(tmp_path / "own"), tmp_path / "without"
    without.mkdir()
    assert hub.tokenizer_folder(own, NAME) == own
    assert hub.tokenizer_folder(without, None) == without
    assert hub.tokenizer_folder(without, NAME) == cached / "snapshots" / "0123abc"
    with pytest.raises(InputError, match="lacks tokenizer.json, the one of Other/one: Other/one is not in"):
        hub.tokenizer_folder(without, "Other/one")
