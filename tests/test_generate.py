"""The door `python -m minivtw.generate`, and the library call behind it."""

import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import minivtw
from minivtw import InputError
from minivtw.counting import cache_bytes, plain_run, prompt_flops
from minivtw.generate import main
from minivtw.methods.withdrawal import random_tokens, withdraw
from minivtw.model.tokens import LayerCount
from tests.doors import assert_one_line_error, run
from tests.small_llava import CONFIG, random_tensors, write_folder

VISUAL = 9  # tokens of a picture in the small model
LAYERS = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("models") / "small")


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp("pictures") / "noise.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 30, 3), np.uint8)).save(path)
    return path


@pytest.fixture(scope="module")
def vlm(folder):
    return minivtw.load(folder)


def test_the_json_object_is_what_the_manual_says(folder, picture):
    ran = run(main, picture, "Hm?", "--model", folder, "--withdraw", "1", "--max-new-tokens", "5", "--json")
    assert ran.code == 0 and ran.err == ""
    content = json.loads(ran.out)
    assert set(content) == {
        "answer",
        "token_ids",
        "model",
        "layers",
        "method",
        "withdraw_layer",
        "tokens",
        "prefill",
        "cache",
        "flops",
        "seconds",
    }
    assert content["model"] == "small" and content["layers"] == LAYERS and content["withdraw_layer"] == 1
    text = len("<s>") - 2 + len("USER: ") + len("\nHm? ASSISTANT:")  # one token a byte, and <s>
    generated = len(content["token_ids"])
    assert content["tokens"] == {"visual": VISUAL, "text": text, "generated": generated}
    cached = text + generated - 1  # the last token is not fed back
    assert content["cache"]["tokens_per_layer"] == [VISUAL + cached] + [cached] * (LAYERS - 1)
    assert content["cache"]["bytes"] == 2 * 4 * 2 * 4 * sum(content["cache"]["tokens_per_layer"])
    assert content["cache"]["bytes_without_withdrawal"] == 2 * 4 * 2 * 4 * LAYERS * (VISUAL + cached)
    assert content["flops"]["prefill"] < content["flops"]["prefill_without_withdrawal"]
    assert set(content["flops"]) == {"prefill", "prefill_without_withdrawal", "decode"}
    assert set(content["seconds"]) == {"load", "vision", "prefill", "decode"}


def test_off_is_no_withdrawal_and_auto_is_half_the_depth_until_a_layer_is_stored(folder, picture, tmp_path):
    def layer_used(model, *options):
        return json.loads(run(main, picture, "Hm?", "--model", model, "--max-new-tokens", "0", "--json", *options).out)[
            "withdraw_layer"
        ]

    assert layer_used(folder, "--withdraw", "off") is None
    assert layer_used(folder) == layer_used(folder, "--withdraw", "auto") == LAYERS // 2
    stored = write_folder(tmp_path / "stored")
    (stored / "withdrawal.json").write_text('{"withdraw_layer": 3}', encoding="utf-8")
    assert layer_used(stored) == 3


def test_zero_new_tokens_is_a_prefill_only(vlm, picture):
    result = vlm.answer(picture, "Hm?", max_new_tokens=0)
    assert result.text == "" and result.token_ids == []
    assert result.stats["flops"]["decode"] == 0
    assert (
        result.stats["cache"]["tokens_per_layer"][0]
        == result.stats["tokens"]["visual"] + result.stats["tokens"]["text"]
    )


def test_what_streams_is_the_answer(folder, vlm, picture):
    pieces = []
    result = vlm.answer(picture, "Hm?", max_new_tokens=9, stream=pieces.append)
    assert "".join(pieces).strip() == result.text
    ran = run(main, picture, "Hm?", "--model", folder, "--max-new-tokens", "9")
    assert ran.out.strip() == result.text


def test_the_answer_ends_at_the_end_token(tmp_path, picture):
    """A model whose head prefers </s> whatever it sees says nothing more."""
    tensors, config = random_tensors(), json.loads(json.dumps(CONFIG))
    config["text_config"]["tie_word_embeddings"] = False
    tensors["language_model.model.norm.weight"][:] = 0
    tensors["language_model.lm_head.weight"] = np.zeros((300, 16), np.float32)
    folder = write_folder(tmp_path, tensors, config)
    (folder / "generation_config.json").write_text('{"eos_token_id": [0, 1]}', encoding="utf-8")
    result = minivtw.load(folder).answer(picture, "Hm?", max_new_tokens=9)
    assert result.token_ids == [0] and result.text == ""  # all logits equal: the first wins, and it ends


def test_observing_sees_everything_and_changes_nothing(vlm, picture):
    seen = {}
    observed = vlm.answer(
        picture, "Hm?", withdraw=2, max_new_tokens=1, observe=lambda name, array: seen.update({name: array.copy()})
    )
    assert observed.token_ids == vlm.answer(picture, "Hm?", withdraw=2, max_new_tokens=1).token_ids
    tokens = observed.stats["tokens"]["visual"] + observed.stats["tokens"]["text"]
    assert seen["vision.pixels"].shape == (1, 3, 12, 12)
    assert seen["connector.output"].shape == (VISUAL, 16)
    assert seen["decoder.embeddings"].shape == (tokens, 16)
    for index in range(LAYERS):
        entering = tokens if index < 2 else tokens - VISUAL
        assert seen[f"decoder.layers.{index}.hidden"].shape == (entering, 16)
        assert seen[f"decoder.layers.{index}.attention"].shape == (4, entering, entering)
        assert np.allclose(seen[f"decoder.layers.{index}.attention"].sum(axis=-1), 1, atol=1e-5)
    assert seen["decoder.logits"].shape == (300,)
    assert int(seen["decoder.logits"].argmax()) == observed.token_ids[0]


def test_trace_tells_where_the_visual_tokens_leave(folder, picture):
    lines = run(
        main, picture, "Hm?", "--model", folder, "--withdraw", "3", "--max-new-tokens", "2", "--trace"
    ).out.splitlines()
    leaving = [index for index, line in enumerate(lines) if "tokens withdrawn" in line]
    assert len(leaving) == 1  # in the prefill; decoded tokens are text
    assert lines[leaving[0] - 1].startswith("decoder.layers.2.hidden") and lines[leaving[0] + 1].startswith(
        "decoder.layers.3."
    )
    without = run(main, picture, "Hm?", "--model", folder, "--withdraw", "off", "--max-new-tokens", "2", "--trace").out
    assert "withdrawn" not in without


def test_stats_are_printed_after_the_answer(folder, picture):
    out = run(main, picture, "Hm?", "--model", folder, "--stats", "--max-new-tokens", "3").out
    for words in (
        "withdrawn before layer 2",
        "9 visual",
        "kB instead of",
        "MFLOP instead of",
        "seconds",
        "prefill",
        "tokens/s",
    ):
        assert words in out


def test_stats_count_what_was_saved(vlm, picture):
    with_image, config = vlm.answer(picture, "Hm?", withdraw=1, max_new_tokens=0).stats, vlm.config
    tokens = with_image["tokens"]["visual"] + with_image["tokens"]["text"]
    text = with_image["tokens"]["text"]
    withdrawn = [LayerCount(tokens, tokens, tokens, 0)] + [LayerCount(text, text, text, 0)] * (LAYERS - 1)
    assert with_image["flops"]["prefill"] == prompt_flops(config, withdrawn)
    assert with_image["flops"]["prefill_without_withdrawal"] == prompt_flops(config, plain_run(config, tokens))
    assert with_image["prefill"] == {
        "entered": [tokens] + [text] * (LAYERS - 1),
        "worked": [tokens] + [text] * (LAYERS - 1),
    }
    off = vlm.answer(picture, "Hm?", withdraw=None, max_new_tokens=0).stats
    assert off["flops"]["prefill"] == off["flops"]["prefill_without_withdrawal"]
    assert off["cache"]["bytes"] == off["cache"]["bytes_without_withdrawal"] == cache_bytes(config, [tokens] * LAYERS)


def test_a_question_without_an_image_withdraws_nothing(vlm):
    stats = vlm.answer(None, "Hm?", max_new_tokens=2).stats
    assert stats["tokens"]["visual"] == 0 and stats["withdraw_layer"] is None
    assert stats["cache"]["bytes"] == stats["cache"]["bytes_without_withdrawal"]


def test_ablations_are_reachable_from_the_library(vlm, picture):
    lengths = [
        vlm.answer(picture, "Hm?", method=method, max_new_tokens=0).stats["cache"]["tokens_per_layer"]
        for method in (withdraw(2), "withdraw:layer=2+renumber:layer=2", random_tokens(2, seed=1))
    ]
    assert lengths[0] == lengths[1] == lengths[2]


def test_the_same_seed_draws_the_same_answer(folder, picture):
    options = (
        picture,
        "Hm?",
        "--model",
        folder,
        "--temperature",
        "2",
        "--top-k",
        "50",
        "--top-p",
        "0.9",
        "--max-new-tokens",
        "12",
    )
    first, again, other = (run(main, *options, "--seed", seed).out for seed in (1, 1, 2))
    assert first == again != other


def test_several_images_stand_where_they_are_marked(vlm, picture):
    prompt = vlm.prepare([picture, picture], "first <image> then <image>?")
    runs = np.flatnonzero(np.diff(prompt.is_visual.astype(int)))
    assert prompt.is_visual.sum() == 2 * VISUAL and len(runs) == 4  # two runs, text around each
    unmarked = vlm.prepare([picture, picture], "both?")
    assert unmarked.is_visual.sum() == 2 * VISUAL
    assert vlm.answer([picture, picture], "both?", withdraw=1, max_new_tokens=1).stats["tokens"]["visual"] == 2 * VISUAL


@pytest.mark.parametrize(
    "options, words",
    [
        (("--withdraw", "5"), "from 0 to 4"),
        (("--withdraw", "-1"), "layer must be 0 or more"),
        (("--method", "forget"), "there is no method 'forget'"),
        (("--method", "withdraw"), "needs layer"),
        (("--method", "withdraw:layer=two"), "cannot be 'two'"),
        (("--method", "withdraw:depth=2"), "takes layer, not 'depth'"),
        (("--method", "freeze:layers=1-9"), "from 0 to 4"),
        (("--method", "nowhere.py:mine"), "cannot run nowhere.py"),
        (("--withdraw", "half"), "auto, off or a layer"),
        (("--max-new-tokens", "-1"), "max-new-tokens"),
        (("--max-new-tokens", "many"), "max-new-tokens"),
        (("--temperature", "-0.5"), "temperature"),
        (("--temperature", "nan"), "temperature"),
        (("--top-p", "0"), "top-p"),
        (("--top-k", "-3"), "top-k"),
        (("--seed", "-3"), "seed"),
        (("--json", "--trace"), "--json and --trace"),
        (("--colour",), "--colour"),
    ],
)
def test_options_that_make_no_sense(folder, picture, options, words):
    assert_one_line_error(run(main, picture, "Hm?", "--model", folder, *options), words)


@pytest.mark.parametrize(
    "prompt, words",
    [
        ("", "the prompt is empty"),
        (" \n", "the prompt is empty"),
        ("word " * 50, "the model has 64 positions"),
        ("<image> and <image>?", "marks 2 places for an image, but 1"),
    ],
)
def test_prompts_that_cannot_be_asked(folder, picture, prompt, words):
    assert_one_line_error(run(main, picture, prompt, "--model", folder), words)


def test_generation_stops_at_the_last_position(vlm, picture):
    result = vlm.answer(picture, "Hm?", temperature=5.0, max_new_tokens=500)
    tokens = result.stats["tokens"]
    assert tokens["visual"] + tokens["text"] + tokens["generated"] <= 64 + 1


def test_an_answer_without_end_uses_every_position(vlm, picture, monkeypatch):
    monkeypatch.setattr(vlm, "stop_ids", frozenset())
    result = vlm.answer(picture, "Hm?", withdraw=None, max_new_tokens=500)
    tokens = result.stats["tokens"]
    assert tokens["visual"] + tokens["text"] + tokens["generated"] == 64 + 1  # the last token is not fed back
    assert result.stats["cache"]["tokens_per_layer"] == 4 * [64]


@pytest.mark.parametrize("withdraw", ["half", 2.5, True, -1, 5])
def test_layers_that_make_no_sense_in_the_library(vlm, picture, withdraw):
    with pytest.raises(InputError, match="must be"):
        vlm.answer(picture, "Hm?", withdraw=withdraw)


def test_off_means_the_same_in_the_library_as_on_the_command_line(vlm, picture):
    off, none = (vlm.answer(picture, "Hm?", withdraw=withdraw, max_new_tokens=3) for withdraw in ("off", None))
    assert off.token_ids == none.token_ids and off.stats["method"] is None


def test_a_question_that_is_missing_or_stands_first(folder, picture):
    assert_one_line_error(run(main, picture, "--model", folder), f"the question is missing: {picture} is a file")
    assert_one_line_error(run(main, "Hm?", picture, "--model", folder), "first the image, then the question")


def test_files_that_are_not_there(folder, picture, tmp_path):
    assert_one_line_error(run(main, tmp_path / "no.png", "Hm?", "--model", folder), "no.png")
    assert_one_line_error(run(main, picture, "Hm?", "--model", tmp_path / "nowhere"), "nowhere")
    assert_one_line_error(run(main, picture, "Hm?", "--model", tmp_path), "config.json")
    assert_one_line_error(run(main), "required")


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "preprocessor_config.json", "model.safetensors", "generation_config.json"]
)
@pytest.mark.parametrize("content", [None, b"", b"{", b"[1]", b"\xff\xfe\x00", b'{"a": 1}'])
def test_missing_and_broken_files_of_a_model(tmp_path, picture, name, content):
    folder = write_folder(tmp_path / "broken")
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content)
    ran = run(main, picture, "Hm?", "--model", folder, "--max-new-tokens", "1")
    if name == "generation_config.json" and content in (None, b'{"a": 1}'):
        assert ran.code == 0  # it need not be there, nor say anything
    else:
        assert_one_line_error(ran, str(folder))


@pytest.mark.parametrize("content", ['{"withdraw_layer": 9}', '{"withdraw_layer": "3"}', "{}", "[]"])
def test_a_stored_layer_that_does_not_fit(tmp_path, picture, content):
    folder = write_folder(tmp_path)
    (folder / "withdrawal.json").write_text(content, encoding="utf-8")
    assert_one_line_error(run(main, picture, "Hm?", "--model", folder), "withdrawal.json")
    assert run(main, picture, "Hm?", "--model", folder, "--withdraw", "off", "--max-new-tokens", "1").code == 0


def test_a_model_folder_runs_nothing(tmp_path, picture, monkeypatch):
    """Code runs only if the user names its file."""
    folder = write_folder(tmp_path / "theirs")
    (folder / "code.py").write_text(
        "import pathlib; pathlib.Path('ran').touch()\ndef method(index, tokens): return tokens", encoding="utf-8"
    )
    monkeypatch.chdir(tmp_path)
    for method in ("freeze:layers=1+theirs/code.py:method", "theirs/code.py", " theirs/code.py:method"):
        (folder / "withdrawal.json").write_text(json.dumps({"method": method}), encoding="utf-8")
        ran = run(main, picture, "Hm?", "--model", "theirs")
        assert_one_line_error(ran, "names a Python file; code is run only if --method names it when a command starts")
    assert not (tmp_path / "ran").exists()
    named = run(main, picture, "Hm?", "--model", "theirs", "--method", "theirs/code.py:method", "--max-new-tokens", "1")
    assert named.code == 0 and (tmp_path / "ran").exists()


def test_weights_that_are_not_numbers(tmp_path, picture):
    tensors = random_tensors()
    tensors["language_model.model.norm.weight"][3] = np.nan
    assert_one_line_error(run(main, picture, "Hm?", "--model", write_folder(tmp_path, tensors)), "finite")


def test_a_failed_turn_leaves_the_conversation_as_it_was(vlm, picture):
    chat = minivtw.Chat(vlm, withdraw=2)
    chat.ask("Hm?", picture, max_new_tokens=2)
    before = chat.cache.tokens_per_layer
    with pytest.raises(InputError):
        chat.ask("x" * 100)
    assert chat.cache.tokens_per_layer == before


def test_the_module_runs_as_a_program(folder, picture):
    command = [sys.executable, "-m", "minivtw.generate", picture, "Hm?", "--model", folder, "--max-new-tokens", "2"]
    done = subprocess.run(command, capture_output=True, encoding="utf-8")
    assert done.returncode == 0 and done.stderr == ""
    wrong = subprocess.run([*command, "--withdraw", "99"], capture_output=True, encoding="utf-8")
    assert wrong.returncode == 2 and wrong.stderr.startswith("minivtw: error: ") and "Traceback" not in wrong.stderr


def test_the_core_imports_only_what_it_may():
    """numpy, safetensors, pillow and tokenizers at run time; everything else is an optional extra."""
    code = "import sys, minivtw.generate, minivtw.evaluate; print(*{name.partition('.')[0] for name in sys.modules})"
    loaded = set(
        subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=True).stdout.split()
    )
    assert not loaded & {"torch", "transformers", "matplotlib", "huggingface_hub", "scipy", "gguf"}


def test_a_system_message_opens_the_conversation(folder, vlm, picture):
    text = run(main, picture, "Hm?", "--model", folder, "--system", "Be brief.", "--max-new-tokens", "0", "--json").out
    plain = run(main, picture, "Hm?", "--model", folder, "--max-new-tokens", "0", "--json").out
    added = json.loads(text)["tokens"]["text"] - json.loads(plain)["tokens"]["text"]
    assert added == len("Be brief. ")  # one token a byte
    chat = minivtw.Chat(vlm, system="Be brief.")
    first, second = (chat.ask("Hm?", max_new_tokens=0).stats["tokens"]["text"] for _ in range(2))
    assert first > second  # it opens the conversation, and is not said again


QUESTIONS = "Hm?", "And now?", "Hm?"


@pytest.mark.parametrize(
    "method, reused",
    [((), True), (("--withdraw", "1"), True), (("--method", "fastv:layer=2"), False), (("--trace",), False)],
)
def test_several_questions_are_answered_one_by_one_as_if_each_were_the_only_one(folder, picture, method, reused):
    options = ("--model", folder, "--max-new-tokens", "4", *method)
    alone = [run(main, picture, question, *options).out for question in QUESTIONS]
    assert run(main, picture, *QUESTIONS, *options).out == "".join(alone)
    if "--trace" not in method:
        lines = run(main, picture, QUESTIONS[0], *options, *QUESTIONS[1:], "--json").out.splitlines()
        answers = [json.loads(line) for line in lines]
        assert [answer["answer"] for answer in answers] == [line.removesuffix("\n") for line in alone]
        assert [("reused" in answer) for answer in answers] == [reused] * 3
    tables = run(main, picture, *QUESTIONS, *options, "--stats").out
    assert tables.count("tokens   ") == 3 and tables.count("reused   ") == 3 * reused


def test_a_question_that_places_the_images_is_asked_whole(folder, picture):
    options = ("--image", picture, "--model", folder, "--max-new-tokens", "2", "--json")
    ran = run(main, picture, "Hm?", "<image> or <image>", "Hm?", *options)
    first, placed, last = map(json.loads, ran.out.splitlines())
    assert "reused" in first and "reused" not in placed and first["token_ids"] == last["token_ids"]
    assert first["tokens"]["visual"] == placed["tokens"]["visual"] == 2 * VISUAL


@pytest.mark.parametrize("twice", [(), ("Hm?",)])
def test_what_cannot_be_asked_several_times_is_one_line(folder, picture, twice):
    options = ("--model", folder, "--max-new-tokens", "2")
    assert_one_line_error(run(main, picture, *twice, picture, *options), "the question is missing")
    assert_one_line_error(run(main, "nope.png", "Hm?", *twice, *options), "nope.png")
    assert_one_line_error(run(main, picture, "Hm?", *twice, *options, "--method", "nope"), "there is no method")
