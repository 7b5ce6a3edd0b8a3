"""The recipe trains on what the library sends, and leaves visual tokens out as the library does."""

import pathlib
import sys

import numpy as np
import pytest

import minivtw
from minivtw.model.tokens import EmbeddedPrompt

RECIPE = pathlib.Path(__file__).parent.parent / "weights" / "recipe"
EMBEDDED = RECIPE.parent / "minivtw-tiny"
PICTURE = EMBEDDED / "samples" / "00-attribute.png"
CHAT = [
    ("What color is the star?", "red"),
    ("Where is the blue ring?", "bottom left"),
    ("Describe the image.", "a red star."),
]

pytestmark = pytest.mark.live


@pytest.fixture(scope="module")
def recipe():
    """The recipe's modules, by name."""
    sys.path.insert(0, str(RECIPE))
    import llama
    import model
    import questions
    import tokenizer
    import turns

    return {"llama": llama, "model": model, "questions": questions, "tokenizer": tokenizer, "turns": turns}


@pytest.fixture(scope="module")
def packed(recipe):
    """The chat behind one image as training lays it out: `Turns`, and the run of visual tokens."""
    maker = recipe["turns"].TurnMaker(recipe["tokenizer"].exported_tokenizer(EMBEDDED))
    chat = tuple(recipe["questions"].Question("attribute", *turn) for turn in CHAT)
    return maker.pack([[[chat]]], (len(maker.encode(chat).ids),)), maker.prefix.visual


@pytest.fixture(scope="module")
def sent():
    """The same chat as the library sends it: token ids, which are visual, and the decoder's input."""
    vlm = minivtw.load(EMBEDDED)
    ids, visual, hidden = [], [], []
    for number, (question, answer) in enumerate(CHAT):
        prompt = vlm.prepare(PICTURE if number == 0 else None, question, is_first=number == 0)
        said = vlm.tokenizer.encode(f" {answer}</s>", add_special_tokens=False).ids
        ids += [*prompt.token_ids, *said]
        visual += [*prompt.is_visual, *[False] * len(said)]
        hidden += [vlm.embed(prompt).hidden, vlm.decoder.embedding[said]]
    return vlm, np.array(ids), np.array(visual), np.concatenate(hidden)


def test_training_reads_the_chats_that_the_library_sends(packed, sent):
    turns, visual = packed
    _, ids, is_visual, _ = sent
    assert turns.ids[0].tolist() == ids.tolist()
    assert turns.positions.tolist() == list(range(len(ids)))
    assert np.flatnonzero(is_visual).tolist() == list(range(visual.start, visual.stop))
    weighted = vlm_text(sent, turns.ids[0][turns.weights[0] > 0])
    assert weighted == "".join(f" {answer}</s>" for _, answer in CHAT)


def vlm_text(sent, token_ids):
    return sent[0].tokenizer.decode(token_ids, skip_special_tokens=False)


@pytest.mark.parametrize("layer", [None, 0, 5, 12])
def test_training_withdraws_as_the_library_does(recipe, packed, sent, layer):
    """Logits of the last token, for a chat whose first two turns stand in the cache."""
    import torch

    turns, visual = packed
    vlm, _, is_visual, hidden = sent
    model = recipe["model"].load_exported(EMBEDDED)
    last = model.text.num_hidden_layers
    with torch.no_grad():
        state = model.decoder.start(torch.from_numpy(hidden)[None], torch.from_numpy(turns.positions), turns.layout)
        if layer is not None:
            state = model.decoder.run(state, 0, layer)
            state = recipe["llama"].withdraw(state, visual)
        state = model.decoder.run(state, 0 if layer is None else layer, last)
        expected = model.logits(state.hidden[:, -1:])[0, 0].numpy()  # (vocabulary,)
    chat = minivtw.Chat(vlm, layer)
    logits, _ = vlm.advance(EmbeddedPrompt(hidden, is_visual), chat.cache, chat.method)
    np.testing.assert_allclose(logits, expected, atol=1e-4)
