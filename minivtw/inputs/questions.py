"""Questions about pictures, read from a folder: to find a layer on, or to score a model on."""

import hashlib
import json
import pathlib
from typing import NamedTuple

from ..errors import InputError


class Question(NamedTuple):
    """One line of questions.jsonl. Samples to find a layer on need no family and no answer."""

    image: str  # the picture's path
    question: str
    family: str = ""  # the kind of question; scores are averaged within it
    answer: str = ""  # the right one


def read_questions(
    folder: str | pathlib.Path, needed: tuple[str, ...] = ("image", "question"), most: int | None = None
) -> list[Question]:
    """The first `most` lines of a folder's questions.jsonl, each an object with at least the `needed` fields, as text.

    `image` is a path beside that file. Raises InputError for a broken line or a missing picture.
    """
    path, questions = pathlib.Path(folder) / "questions.jsonl", []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()[:most]
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text") from error
    except OSError as error:
        raise InputError(f"cannot read {path}, one object with {listed(needed)} a line: {error.strerror}") from error
    for number, line in enumerate(lines, 1):
        try:
            content = json.loads(line)
            fields = {name: content[name] for name in needed}
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise InputError(f"{path}, line {number}: needs an object with {listed(needed)}") from error
        if not all(isinstance(value, str) for value in fields.values()):
            raise InputError(f"{path}, line {number}: {listed(needed)} must be text")
        picture = path.parent / fields["image"]
        if not picture.is_file():
            raise InputError(f"{path}, line {number}: there is no picture {fields['image']}")
        questions.append(Question(**{**fields, "image": str(picture)}))
    if not questions:
        raise InputError(f"{path} holds no questions")
    return questions


def listed(names: tuple[str, ...]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]}"


def digest(questions: list[Question]) -> str:
    """SHA-256 of the pictures' files and the questions, one after the other."""
    sha256 = hashlib.sha256()
    for question in questions:
        sha256.update(pathlib.Path(question.image).read_bytes() + question.question.encode())
    return sha256.hexdigest()
