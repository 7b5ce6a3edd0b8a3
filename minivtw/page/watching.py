"""A question watched: what the model says under a method, what every layer carries, what a token attends to.

One `EmbeddedQuestion` holds what all methods share, the embedded prompt and the answer of the model that is left alone. `frame`
is one position of the wall: an answer with what it took. The page of `minivtw.explore` asks for frames as a hand moves,
`minivtw.report` writes all of them into its page beforehand.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ..analysis.migration import answer_probability
from ..analysis.tracing import traces, worked_on
from ..inputs.prompts import Prompt, Tiled
from ..methods.text import Method, NamedMethod, spec_of
from ..model.decoder import Decoder, logits
from ..model.layers import softmax
from ..model.tokens import EmbeddedPrompt, Tokens
from ..search.layer import divergence
from ..seen import PROBE, embed_after
from ..vlm import VLM, Answer, Chat
from .page import as_seen, data_url, patches

LONGEST_ANSWER = 32  # tokens
READINGS = 3  # tokens shown of what a layer would say
GONE, READ, WORKED = 0, 1, 2  # what becomes of a token in a layer: left before it, only read there, worked on


class SeenImage(NamedTuple):
    """What all questions about an image share."""

    tiled: Tiled
    embedded: EmbeddedPrompt  # with any question
    urls: list[str]  # its tiles, as the model sees them

    def __sizeof__(self) -> int:
        """Bytes of its arrays and drawings, which are nearly all of it."""
        tower = self.embedded.tower
        arrays = self.embedded.hidden, self.tiled.tiles, *(tower.entering if tower else [])
        return sum(array.nbytes for array in arrays if array is not None) + sum(map(len, self.urls))


class EmbeddedQuestion(NamedTuple):
    """A question about an image, embedded, and what the model says to it when it is left alone."""

    image: SeenImage
    prompt: Prompt
    embedded: EmbeddedPrompt
    answer: Answer
    logits: np.ndarray  # (vocabulary,) of the answer's first token

    def __sizeof__(self) -> int:
        """Bytes of its own arrays, which are nearly all of it; those of the image are the image's."""
        return self.embedded.hidden.nbytes + self.logits.nbytes


def see(vlm: VLM, image: Any) -> SeenImage:
    """Run the vision tower on an image. Raises InputError."""
    tiled, vision = vlm.tile(image), vlm.parts.vision
    assert vision and tiled.tiles is not None  # there was an image
    urls = [data_url(tile) for tile in as_seen(vision, tiled.tiles)]
    return SeenImage(tiled, vlm.embed(vlm.prepare(tiled, PROBE)), urls)


def ask(vlm: VLM, image: SeenImage, text: str) -> EmbeddedQuestion:
    """Embed a question and answer it with every token in every layer. Raises InputError."""
    prompt = vlm.prepare(image.tiled, text)
    embedded = embed_after(vlm, prompt, image.embedded)
    answer, first, _ = responded(vlm, embedded, None)
    return EmbeddedQuestion(image, prompt, embedded, answer, first)


def shown(vlm: VLM, question: EmbeddedQuestion) -> dict[str, Any]:
    """What a page shows of a question: its tokens, and the image as the model sees it."""
    prompt, vision = question.prompt, vlm.parts.vision
    assert vision and prompt.tiles is not None  # there was an image
    tokens = zip(prompt.token_ids.tolist(), prompt.is_visual)
    return {
        "words": [None if is_visual else token_text(vlm, token) for token, is_visual in tokens],
        "tiles": question.image.urls,
        "patches": patches(vision, len(prompt.tiles), int(prompt.is_visual.sum())),
    }


def responded(vlm: VLM, prompt: EmbeddedPrompt, method: Method | None) -> tuple[Answer, np.ndarray, np.ndarray]:
    """The greedy answer under a method, its first token's logits (vocabulary,), and what became of each token of the
    prompt in each layer: (layers, tokens) of GONE, READ, WORKED."""
    marks: list[np.ndarray] = []
    first: list[np.ndarray] = []

    def marking(index: int, tokens: Tokens) -> Tokens:
        tokens = method(index, tokens) if method else tokens
        if index == len(marks):  # the prompt comes first; tokens that are fed back find every layer marked
            marks.append(np.full(len(prompt.hidden), GONE, np.uint8))
            marks[index][tokens.positions] = READ
            marks[index][worked_on(tokens)] = WORKED
        return tokens

    def likeliest_token(scores: np.ndarray) -> int:
        first.append(scores)
        return int(np.argmax(scores))

    answer = Chat(vlm, method=NamedMethod(marking, "marking")).respond(prompt, likeliest_token, LONGEST_ANSWER)
    return answer, first[0], np.array(marks)


def frame(vlm: VLM, question: EmbeddedQuestion, method: Method | None) -> dict[str, Any]:
    """One position of the wall: the answer under a method, what each layer carried, and what that cost and changed."""
    answer, first, marks = responded(vlm, question.embedded, method)
    flops, cache = answer.stats["flops"], answer.stats["cache"]
    return {
        "method": spec_of(method),
        "answer": answer.text,
        "ids": answer.token_ids,
        "tokens": [token_text(vlm, token) for token in answer.token_ids],
        "layers": ["".join(map(str, mark)) for mark in marks],  # a digit per token
        "flops": [flops["prefill"], flops["prefill_without_withdrawal"]],
        "cache": [cache["bytes"], cache["bytes_without_withdrawal"]],
        "kl": max(float(divergence(first, question.logits)), 0.0),  # nats; rounding can take it below 0
        "next": likeliest(vlm, first[None])[0],
    }


def probability(decoder: Decoder, prompt: EmbeddedPrompt, answer: Sequence[int], method: Method | None) -> float:
    """How likely a whole answer is under a method, token after token."""
    predicting = range(len(prompt.hidden) - 1, len(prompt.hidden) + len(answer) - 1)
    return answer_probability(decoder, traces(decoder, prompt, answer, method, predicting).states[:, -1], answer)


def likeliest(vlm: VLM, scores: np.ndarray) -> list[list[tuple[str, float]]]:
    """The likeliest tokens by logits (rows, vocabulary), with their probabilities."""
    probabilities = softmax(scores)
    best = np.argsort(-probabilities, axis=1)[:, :READINGS]
    return [
        [(token_text(vlm, int(token)), round(float(row[token]), 4)) for token in tokens]
        for row, tokens in zip(probabilities, best)
    ]


def token_text(vlm: VLM, token: int) -> str:
    """A token as people would write it."""
    return vlm.tokenizer.decode([token], skip_special_tokens=False)


def readings(vlm: VLM, states: np.ndarray) -> list[list[tuple[str, float]] | None]:
    """The lens: what each state (layers + 1, width) would say through the final norm and head; None for no state."""
    there = ~np.isnan(states).any(1)
    said = iter(likeliest(vlm, logits(vlm.decoder, states[there])))
    return [next(said) if one else None for one in there]


def without(gone: Sequence[int]) -> Method:
    """Visual tokens that are clicked away: they never enter. gone: their places in the prompt."""
    return lambda index, tokens: tokens[~(np.isin(tokens.positions, gone) & tokens.is_visual)] if index == 0 else tokens
