"""Questions about images, read from a folder: to find a layer on, or to score a model on."""

import hashlib
import json
import os
import pathlib
from typing import Any, NamedTuple

from ..errors import InputError, reading
from ..model.cache import KVCache
from .files import text_of


class Question(NamedTuple):
    """One line of questions.jsonl. Samples to find a layer on need no family and no answer."""

    image: str  # the image's path
    question: str
    family: str = ""  # the kind of question; scores are averaged within it
    answer: str = ""  # the right one
    then: tuple["Question", ...] = ()  # what is asked next in the same chat, without an image
    where: str = "a question"  # the file and the line that it stands in


def read_questions(
    folder: str | pathlib.Path, needed: tuple[str, ...] = ("image", "question"), most: int | None = None
) -> list[Question]:
    """The first `most` lines of a folder's questions.jsonl, each an object with at least the `needed` fields, as text.

    `image` is a path beside that file. A chat is a line with `image` and `turns`, [[question, answer], …]; its families
    are turn 1, turn 2, …. Raises InputError for a broken line or a missing image.
    """
    path, questions = pathlib.Path(folder) / "questions.jsonl", []
    text = text_of(path)
    # A line ends where JSON Lines says: texts may hold what Unicode calls the end of a line.
    for number, line in enumerate(text.removesuffix("\n").split("\n")[:most] if text else [], 1):
        where = f"{path}, line {number}"
        try:
            turns = [{name: turn[name] for name in needed} for turn in turns_of(json.loads(line))]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise InputError(f"{where}: needs an object with {listed(needed)}") from error
        if not all(is_text(value) for turn in turns for value in turn.values()):
            raise InputError(f"{where}: {listed(needed)} must be text")
        image = path.parent / turns[0]["image"]
        if not os.path.isfile(image):  # never raises, whatever the name
            raise InputError(f"{where}: there is no image {turns[0]['image']}")
        first, *later = (Question(**{**turn, "image": str(image), "where": where}) for turn in turns)
        questions.append(first._replace(then=tuple(later)))
    if not questions:
        raise InputError(f"{path} holds no questions")
    return questions


def check_questions(vlm: Any, questions: list[Question]) -> None:
    """Raise InputError, with its line, for the first question that a model cannot take: before the work, not in it."""
    image, tiled = None, None
    for question in questions:
        try:
            if question.image != image:
                image, tiled = question.image, vlm.tile(question.image)
            prompt = vlm.prepare(tiled, question.question)
            KVCache(vlm.config).check_room(len(prompt.token_ids))
            for turn in question.then:
                vlm.prepare(None, turn.question, is_first=False)
        except InputError as error:
            raise InputError(f"{question.where}: {error}") from error


def is_text(value: Any) -> bool:
    """JSON can also say what no text holds: half of a surrogate pair."""
    return isinstance(value, str) and not any("\ud800" <= char <= "\udfff" for char in value)


def turns_of(content: dict[str, Any]) -> list[dict[str, Any]]:
    """A line of questions.jsonl as one object per turn; a question is a chat of one turn."""
    if "turns" not in content:
        return [content]
    if not content["turns"]:
        raise ValueError("a chat without turns")
    return [
        {"image": content["image"], "family": f"turn {number}", "question": question, "answer": answer}
        for number, (question, answer) in enumerate(content["turns"], 1)
    ]


def listed(names: tuple[str, ...]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]}"


def digest(questions: list[Question]) -> str:
    """SHA-256 of the images' files and the questions, one after the other. Raises InputError."""
    total = hashlib.sha256()
    for one in questions:
        with reading(one.image), open(one.image, "rb") as file:
            hashlib.file_digest(file, lambda: total)
        total.update(one.question.encode())
    return total.hexdigest()
