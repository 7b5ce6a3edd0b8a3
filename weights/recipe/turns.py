"""Many turns behind one image, as arrays of a fixed size: token ids, positions and which tokens are answers."""

import functools
import re
from typing import NamedTuple

import numpy as np
from lessons import GROUPS, Group, draw_lessons
from llama import Layout
from pool import COLOR_NAMES, KINDS
from questions import Question, Things
from tokenizer import AFTER_IMAGE, BEFORE_ANSWER, BEFORE_IMAGE, END, VISUAL_TOKENS
from tokenizers import Tokenizer
from world import Thing

WEIGHTS = {"caption": 0.5, "choice": 2.0}  # of an answer's tokens in the loss, 1 in the other families
END_WEIGHT = 0.2
ANY = -1
NOUN_PHRASE = re.compile(
    rf"(?:\b(?P<color>{'|'.join(COLOR_NAMES)}) )?\b(?:(?P<kind>{'|'.join(KINDS)})(?:e?s)?|objects?|thing)\b"
)


class Chat(NamedTuple):
    """How a chat is laid out; what stands before the question is shared by all questions about an image."""

    before_image: str
    after_image: str
    before_later: str  # before a question that is not the first
    before_answer: str
    answer: str  # "{}" and what stands around it
    pad: str


VICUNA = Chat(BEFORE_IMAGE, AFTER_IMAGE, BEFORE_IMAGE, BEFORE_ANSWER, f" {{}}{END}", "<pad>")
CHATML = Chat(
    "<|im_start|>user\n",
    "\n",
    "\n<|im_start|>user\n",
    "<|im_end|>\n<|im_start|>assistant\n",
    "{}<|im_end|>",
    "<|endoftext|>",
)


class Prefix(NamedTuple):
    """What all turns share: what stands before the image, the image, what stands behind it."""

    ids: tuple[int, ...]
    visual: slice


class Noun(NamedTuple):
    """A noun phrase of a question, such as `red star`, `star` or `red objects`."""

    token: int  # the place of its last token in the turn
    kind: int  # in pool.KINDS, or ANY
    color: int  # in pool.COLOR_NAMES, or ANY


class Turn(NamedTuple):
    """What stands behind the image: a question with its answer, or a chat of several."""

    ids: tuple[int, ...]
    weights: tuple[float, ...]  # of each token as a target; 0 in the question
    nouns: tuple[Noun, ...]


class Turns(NamedTuple):
    """A batch: all sequences share layout and positions."""

    ids: np.ndarray  # (batch, tokens) int64
    weights: np.ndarray  # (batch, tokens) float32, of each token as a target
    positions: np.ndarray  # (tokens,) int64
    layout: Layout
    nouns: np.ndarray  # (nouns, 4) int64: row, token, kind, color of every noun phrase in the batch


class TurnMaker:
    """Scenes to batches of turns."""

    def __init__(self, tokenizer: Tokenizer, chat: Chat = VICUNA, groups: tuple[Group, ...] = GROUPS):
        self.tokenizer, self.chat, self.groups = tokenizer, chat, groups
        self._encode = functools.lru_cache(200_000)(self._encode)
        image, pad = tokenizer.token_to_id("<image>"), tokenizer.token_to_id(chat.pad)
        ids = tokenizer.encode(f"{chat.before_image}<image>{chat.after_image}").ids
        start = ids.index(image)
        visual = slice(start, start + VISUAL_TOKENS)
        self.prefix = Prefix((*ids[:start], *[image] * VISUAL_TOKENS, *ids[start + 1 :]), visual)
        self.pad = pad

    def encode(self, chat: tuple[Question, ...]) -> Turn:
        """A question with its answer, or several, one after the other."""
        turn = self._encode(chat[0], "")
        for question in chat[1:]:
            later = self._encode(question, self.chat.before_later)
            nouns = (noun._replace(token=len(turn.ids) + noun.token) for noun in later.nouns)
            turn = Turn(turn.ids + later.ids, turn.weights + later.weights, (*turn.nouns, *nouns))
        return turn

    def _encode(self, question: Question, before: str) -> Turn:
        text = f"{before}{question.question}"
        asked = self.tokenizer.encode(text + self.chat.before_answer, add_special_tokens=False)
        ends = [end for _, end in asked.offsets]
        nouns = tuple(
            Noun(
                token=ends.index(phrase.end()),
                kind=KINDS.index(phrase["kind"]) if phrase["kind"] else ANY,
                color=COLOR_NAMES.index(phrase["color"]) if phrase["color"] else ANY,
            )
            for phrase in NOUN_PHRASE.finditer(text)
        )
        ids = asked.ids
        answer = self.tokenizer.encode(self.chat.answer.format(question.answer), add_special_tokens=False).ids
        weight = WEIGHTS.get(question.family, 1.0)
        return Turn((*ids, *answer), (*[0.0] * len(ids), *[weight] * (len(answer) - 1), END_WEIGHT), nouns)

    def pack(self, scenes: list[list[list[tuple[Question, ...]]]], lengths: tuple[int, ...]) -> Turns:
        """For each scene a list of chats for each of the `lengths`, as many for every scene."""
        layout = Layout(len(self.prefix.ids), tuple(zip(map(len, scenes[0]), lengths)))
        tokens = layout.prefix + sum(turns * length for turns, length in layout.turns)
        ids = np.full((len(scenes), tokens), self.pad, np.int64)
        weights = np.zeros((len(scenes), tokens), np.float32)
        ids[:, : layout.prefix] = self.prefix.ids
        nouns = []
        for row, groups in enumerate(scenes):
            start = layout.prefix
            for chats, length in zip(groups, lengths):
                for chat in chats:
                    turn = self.encode(chat)
                    ids[row, start : start + len(turn.ids)] = turn.ids
                    weights[row, start : start + len(turn.ids)] = turn.weights
                    nouns += [(row, start + noun.token, noun.kind, noun.color) for noun in turn.nouns]
                    start += length
        runs = [np.arange(layout.prefix)]
        runs += [np.tile(layout.prefix + np.arange(length), turns) for turns, length in layout.turns]
        return Turns(ids, weights, np.concatenate(runs), layout, np.array(nouns, np.int64).reshape(-1, 4))

    def lessons(self, things: np.ndarray, rng: np.random.Generator) -> Turns:
        """A training batch for the objects (batch, MOST_THINGS, 5) of the pool."""
        lengths = tuple(group.length for group in self.groups)
        return self.pack([draw_lessons(objects_of(rows), rng, self.groups) for rows in things], lengths)


def objects_of(rows: np.ndarray) -> Things:
    """Objects from the rows (MOST_THINGS, 5) of the pool, without turn and exact colour, which no question asks for."""
    return tuple(
        Thing(KINDS[int(kind)], COLOR_NAMES[int(color)], float(x), float(y), float(radius), 0.0, (0, 0, 0))
        for kind, color, x, y, radius in rows
        if kind >= 0
    )
