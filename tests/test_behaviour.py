"""Answers, counts and cache lengths held still: what the doors and the library said before the house was rebuilt.

    python -m tests.test_behaviour        record anew, after a change that is meant (the embedded model's weights)

Two models: the embedded one, and a small random LLaVA that is written where the test runs. Each is asked without
withdrawal, with the stored layer, at several layers K, by the attention's own rule, and with both of the paper's
ablations; alone and in a chat of three turns with a second image.
"""

import json
import pathlib
import tempfile

import pytest

import minivtw
from minivtw.methods.withdrawal import adaptive, random_tokens, renumber, then, withdraw

from .small_llava import write_folder

ROOT = pathlib.Path(__file__).parent.parent
RECORDED = ROOT / "tests" / "golden" / "behaviour.json"
PICTURES = [ROOT / "docs" / "pictures" / name for name in ("scene.png", "three.png")]
QUESTIONS = ["What color is the star?", "How many objects are there?", "Describe the image."]
METHODS = {
    "off": {"withdraw": None},
    "auto": {"withdraw": "auto"},
    "0": {"withdraw": 0},
    "2": {"withdraw": 2},
    "3": {"withdraw": 3},
    "adaptive": {"method": adaptive()},
    "renumbered": {"method": then(withdraw(2), renumber(2))},
    "random": {"method": random_tokens(2, seed=5)},
}


def told(result):
    """A result as the doors print it, less what depends on the clock and on the folder's name."""
    kept = ("layers", "tokens", "cache", "flops")
    return {"answer": result.text, "token_ids": result.token_ids, **{name: result.stats[name] for name in kept}}


def single(vlm, method):
    """One question a picture."""
    return [
        told(vlm.answer(picture, question, max_new_tokens=12, **METHODS[method]))
        for picture, question in zip(PICTURES, QUESTIONS)
    ]


def conversation(vlm, method):
    """A question about the first picture, one without a picture, one about both that have been shown by then."""
    if method == "adaptive":  # was decided by the first picture of a conversation, is now decided by each
        return []
    chat, turns = minivtw.Chat(vlm, **METHODS[method]), []
    for picture, question in zip([PICTURES[0], None, PICTURES[1]], QUESTIONS):
        turns.append(told(chat.ask(question, picture, max_new_tokens=4)))
    return turns


def recordings(vlm):
    return {method: {"single": single(vlm, method), "chat": conversation(vlm, method)} for method in METHODS}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return {"embedded": minivtw.load(), "random": minivtw.load(roomy(tmp_path_factory.mktemp("random")))}


def roomy(folder):
    """The small random model with positions enough for a chat."""
    write_folder(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["text_config"]["max_position_embeddings"] = 512
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["embedded", "random"])
def test_behaviour_is_what_it_was(models, name, method):
    expected = json.loads(RECORDED.read_text(encoding="utf-8"))[name][method]
    assert single(models[name], method) == expected["single"]
    assert conversation(models[name], method) == expected["chat"]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        folders = {"embedded": None, "random": roomy(pathlib.Path(scratch))}
        content = {name: recordings(minivtw.load(folder)) for name, folder in folders.items()}
    RECORDED.write_text(json.dumps(content, indent=None, separators=(",", ":")) + "\n", encoding="utf-8")
