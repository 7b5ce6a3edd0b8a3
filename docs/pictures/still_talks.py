"""Is minivtw-smol still the chat model that it was? Perplexity on a fixed text and ten chats, beside SmolLM2's own.

    python docs/pictures/still_talks.py

Needs both models: `python -m minivtw.fetch smollm2` and `… smol`. Fills in the
tables `perplexity` and `chats` of chapter 7's data.
"""

import pathlib

import numpy as np
from drawing import options
from filling import fill, table

import minivtw
from minivtw.inputs.prompts import encode
from minivtw.model.cache import KVCache
from minivtw.model.decoder import forward, logits
from minivtw.model.tokens import arriving, embedded_text
from minivtw.search.layer import log_softmax

PAGE = "data/07-a-language-model-that-sees.md"
TEXT = pathlib.Path(__file__).with_name("english.txt")
QUESTIONS = (
    "What is the capital of France?",
    "Why is the sky blue?",
    "Write a sentence about a lighthouse.",
    "What is 12 + 30?",
    "Name three fruits.",
    "Who wrote Hamlet?",
    "How do I boil an egg?",
    "Is the sun a star?",
    "Translate into French: Good morning.",
    "What should I do when it rains?",
)


def losses(vlm, text):
    """-log p of each token of a text but its first, nats, (tokens - 1,)."""
    token_ids = encode(vlm.tokenizer, text)
    tokens = arriving(embedded_text(vlm.decoder, token_ids), KVCache(vlm.config))
    said = log_softmax(logits(vlm.decoder, forward(vlm.decoder, tokens).hidden[:-1]))  # (tokens - 1, vocabulary)
    return -said[np.arange(len(said)), token_ids[1:]]


def perplexities(models):
    """One row per paragraph of the text, each read on its own, and one for all."""
    paragraphs = TEXT.read_text(encoding="utf-8").strip().split("\n\n")
    read = {name: [losses(vlm, paragraph) for paragraph in paragraphs] for name, vlm in models.items()}
    rows = []
    for number, paragraph in enumerate(paragraphs):
        each = [np.exp(read[name][number].mean()) for name in models]
        rows.append(
            [
                f"{paragraph.split('.')[0][:48].rsplit(' ', 1)[0]} …",
                *(f"{value:.2f}" for value in each),
                f"{each[1] / each[0] - 1:+.1%}",
            ]
        )
    base, grafted = (np.exp(np.concatenate(read[name]).mean()) for name in models)
    rows.append(
        [
            f"**all, {sum(map(len, read['smol'])):,} tokens**",
            f"**{base:.2f}**",
            f"**{grafted:.2f}**",
            f"**{grafted / base - 1:+.1%}**",
        ]
    )
    fill(PAGE, "perplexity", table(["paragraph", "SmolLM2-135M", "minivtw-smol", "change"], rows))


def chats(models):
    """Greedy answers side by side, cut at 60 tokens."""
    rows = []
    for question in QUESTIONS:
        said = [vlm.answer(None, question, max_new_tokens=60).text for vlm in models.values()]
        rows.append([question, *(" ".join(text.split()).replace("|", "\\|") for text in said)])
    fill(PAGE, "chats", table(["asked", "SmolLM2-135M", "minivtw-smol"], rows))


if __name__ == "__main__":
    options(__doc__).parse_args()
    models = {"smollm2": minivtw.load("smollm2"), "smol": minivtw.load("smol")}
    perplexities(models)
    chats(models)
