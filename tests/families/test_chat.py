"""Several turns: the cache that stays between them gives what recomputing the whole conversation gives."""

import copy
import json
import pathlib

import numpy as np
import pytest

import minivtw
from minivtw import chat as door
from minivtw import generate
from minivtw.inputs.prompts import Prompt, encode
from minivtw.model.cache import KVCache
from minivtw.model.tokens import embedded_text
from minivtw.vlm import Chat
from tests.doors import run

from .conversation import picture
from .test_families import FOLDERS, GOLDEN, NAMES, each_model, meta

LLAVA = pathlib.Path(__file__).parent.parent / "golden" / "llava" / "clip-plain"
each_family = pytest.mark.parametrize("folder", [*FOLDERS, LLAVA], ids=[*NAMES, LLAVA.name])
TURNS = [
    ([picture(67, 40)], "What color is the star?"),
    (None, "And the ring?"),
    ([picture(20, 90), picture(9, 9)], "Which one?"),
]
NEW_TOKENS = 9


def recomputed(vlm, prompt, method):
    """Greedy ids after a whole conversation, from an empty cache."""
    cache = KVCache(vlm.config)
    logits, _ = vlm.advance(vlm.embed(prompt), cache, method)
    said = []
    while len(said) < NEW_TOKENS:
        said.append(int(logits.argmax()))
        if said[-1] in vlm.stop_ids:
            break
        logits, _ = vlm.advance(embedded_text(vlm.decoder, said[-1:]), cache, method)
    return said


def said_before(vlm, answer):
    """An answer as the next turn finds it: closed."""
    return answer if answer[-1] in vlm.stop_ids else [*answer, vlm.turn_end_id]


@each_family
@pytest.mark.parametrize(
    "spec",
    [
        None,
        "withdraw:layer=0",
        "withdraw:layer=1",
        "withdraw:layer=2",
        "freeze:layers=0+withdraw:layer=2",
        "freeze:layers=1-2",
    ],
)
def test_every_turn_says_what_the_whole_conversation_recomputed_says(folder, spec):
    vlm = minivtw.load(folder)
    chat = Chat(vlm, None, spec)
    token_ids, is_visual, tiles = [], [], []
    for images, question in TURNS:
        prompt = vlm.prepare(images, question, is_first=not token_ids)
        token_ids += prompt.token_ids.tolist()
        is_visual += prompt.is_visual.tolist()
        tiles += [] if prompt.tiles is None else [prompt.tiles]
        answer = chat.ask(question, images, max_new_tokens=NEW_TOKENS).token_ids
        whole = Prompt(np.array(token_ids), np.array(is_visual), np.concatenate(tiles))
        assert recomputed(vlm, whole, chat.method) == answer
        text, leaves = sum(not visual for visual in is_visual), (spec or "").partition("withdraw:layer=")[2]
        for layer, held in enumerate(chat.cache.tokens_per_layer):  # all but the newest token, which is yet to be fed
            assert held == (text if leaves and layer >= int(leaves) else len(token_ids)) + len(answer) - 1
        token_ids += said_before(vlm, answer)
        is_visual += [False] * len(said_before(vlm, answer))


@each_model
def test_the_layout_of_a_conversation_is_that_of_the_published_template(folder):
    recorded = meta(folder)["conversation"]
    if recorded is None:
        assert folder.name == "nanovlm-first"  # the first layout knows one question only
        return
    vlm = minivtw.load(folder)
    question, answer, next_question = recorded["turns"]
    first = vlm.prepare([picture(*size) for size in recorded["sizes"]], question).token_ids.tolist()
    space = "" if folder.name.startswith("nanovlm") else " "  # SmolVLM's answers begin with one
    said = encode(vlm.tokenizer, space + answer, opens=False).tolist()
    second = vlm.prepare(None, next_question, is_first=False).token_ids.tolist()
    assert first + said_before(vlm, said) + second == recorded["token_ids"]


def test_an_error_leaves_the_conversation_as_it_was():
    vlm = minivtw.load(GOLDEN / "idefics3-tiles")
    chat, undisturbed = Chat(vlm, 2), Chat(vlm, 2)
    for one in (chat, undisturbed):
        one.ask(*TURNS[0][::-1], max_new_tokens=NEW_TOKENS)
    for images, question in ((None, " "), ([], "Where is <image>?"), ("nowhere.png", "What?"), (None, "long " * 2000)):
        with pytest.raises(minivtw.InputError):
            chat.ask(question, images)
    answers = [one.ask(*TURNS[2][::-1], max_new_tokens=NEW_TOKENS).token_ids for one in (chat, undisturbed)]
    assert answers[0] == answers[1]


def test_a_question_cannot_pretend_to_be_an_image():
    vlm = minivtw.load(GOLDEN / "nanovlm-later")
    with pytest.raises(minivtw.InputError, match=r"<\|image\|>, which is a mark of the model's own"):
        vlm.prepare(picture(5, 5), "What is <|image|>?")


@pytest.fixture
def pictures(tmp_path):
    paths = [tmp_path / "one.png", tmp_path / "two.png"]
    for path, size in zip(paths, [(67, 40), (20, 90)]):
        picture(*size).save(path)
    return paths


def test_the_chat_door_holds_a_conversation(pictures):
    one, two = pictures
    typed = f"What color is the star?\n\n/image {two}\n/image nowhere.png\nAnd the ring?\n/quit\nnever read\n"
    model = GOLDEN / "idefics3-tiles"
    options = ("--model", model, "--withdraw", 2, "--max-new-tokens", NEW_TOKENS, "--stats")
    ran = run(door.main, one, *options, stdin=typed)
    chat = Chat(minivtw.load(GOLDEN / "idefics3-tiles"), 2)
    assert ran.code == 0
    for image, text in ((one, "What color is the star?"), (two, "And the ring?")):
        pieces = []
        stats = chat.ask(text, [image], max_new_tokens=NEW_TOKENS, stream=pieces.append).stats
        assert "".join(pieces).lstrip() in ran.out and f"{stats['tokens']['visual']} visual" in ran.out
    assert ran.out.count("visual tokens withdrawn before layer 2") == 2
    assert ran.err.startswith("minivtw: error: cannot read the image nowhere.png") and ran.err.count("\n") == 1


def test_images_are_repeatable_and_stand_where_they_are_marked(pictures):
    one, two = pictures
    model = ("--model", GOLDEN / "idefics3-tiles", "--max-new-tokens", 4, "--json")
    asked = lambda *arguments: json.loads(run(generate.main, *arguments, *model).out)
    both = asked("--image", one, "--image", two, "What is it?")
    assert both == {**asked(one, "What is it?", "--image", two), "seconds": both["seconds"]}
    marked = asked("--image", one, "--image", two, "<image>What is <image>it?")
    assert marked["tokens"]["visual"] == both["tokens"]["visual"] and marked["token_ids"] != both["token_ids"]
    assert asked("--image", one, "What is it?", "--max-tiles", 1)["tokens"]["visual"] == 4


def test_most_tiles_below_one_is_an_input_error():
    with pytest.raises(minivtw.InputError, match="max-tiles must be 1 or more, not 0"):
        minivtw.load(GOLDEN / "idefics3-tiles", max_tiles=0)


@each_family
def test_a_copied_conversation_goes_its_own_way(folder):
    """What is asked of a copy is not in the cache of the other; each says what it says alone."""
    alone = {}
    for question in ("And the ring?", "Which one, then?"):
        talk = Chat(minivtw.load(folder), withdraw=1)
        talk.ask("What?", picture(20, 30), max_new_tokens=3)
        alone[question] = talk.ask(question, max_new_tokens=5).token_ids
    talk = Chat(minivtw.load(folder), withdraw=1)
    talk.ask("What?", picture(20, 30), max_new_tokens=3)
    copied, before = copy.copy(talk), talk.cache.next_position
    answers = [one.ask(question, max_new_tokens=5).token_ids for one, question in zip((copied, talk), alone)]
    assert answers == list(alone.values()) and talk.cache.next_position > before
