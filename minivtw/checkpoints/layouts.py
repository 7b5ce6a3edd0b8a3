"""How a conversation is written down: the chat layouts of the published models, and which one a folder asks for.

A folder says it in a chat template, which is a program in Jinja. It is never run. What it can write is read off it (its
`sketch`), and if that is one of the layouts known here, the layout is filled in with the template's own line breaks.
"""

import pathlib
import re
import warnings
from typing import Any, NamedTuple

from ..errors import InputError, counted
from ..inputs.marks import with_words
from ..inputs.prompts import MARK
from .files import read_fields, read_text

SYSTEMS = {  # what `--system` may be called by name
    # Vicuna's own. The hub's template leaves it out; the paper's measurements have it.
    "vicuna": "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
    "detailed, and polite answers to the user's questions.",
}


class Layout(NamedTuple):
    """The pieces of a conversation, in the order in which they follow each other."""

    user: str  # before a user's turn
    closes: str  # after it, up to where the answer begins
    opens: str = ""  # before the first turn
    between: str = ""  # after an answer, before the next turn
    turn_end: str | None = None  # the token that closes an answer; None: an answer is followed by the next turn
    image: str = f"{MARK}\n"  # an image whose place the user leaves open; they come before the words
    words: str = ""  # before the words
    space: str = ""  # before a turn that does not begin with an image
    system: tuple[str, str] = ("", " ")  # around a system message
    default_system: str = ""  # what stands there where none is given, as a whole
    images_move: bool = False  # images come first even where the user marks another place

    def turn(self, text: str, images: int, is_first: bool, system: str | None = None) -> str:
        """One turn of a user as text, in which each `<image>` stands for an image, up to where the answer begins.

        images: how many; text: the words, perhaps with marks of where they go. Raises InputError.
        """
        text, system = with_words(text), system and with_words(system)
        if system is not None and not is_first:
            raise InputError("a system message can only open a conversation")
        if MARK in (system or ""):
            raise InputError(f"{MARK} marks a place in a question; a system message shows no image")
        turn = place_images(text, images, self)
        space = "" if turn.startswith(MARK) else self.space
        before, after = self.system
        opening = self.opens + (self.default_system if system is None else f"{before}{system}{after}")
        return f"{opening if is_first else self.between}{self.user}{space}{turn}{self.closes}"

    def marks(self) -> set[str]:
        """What it writes in angle brackets: not for a question to say, whether or not the tokenizer calls it special."""
        return set(re.findall(r"<[^<>\s]+>", "".join(map(str, self)))) - {MARK}


def place_images(text: str, images: int, layout: Layout) -> str:
    """The words of a turn with one mark for each image: as placed, or else all of them first."""
    marks, words = text.count(MARK), text.replace(MARK, "")
    if not words.strip():
        raise InputError("the prompt is empty")
    if marks and marks != images:
        came = f"{counted(images, 'image')} came with it; \\{MARK} is the word itself"
        raise InputError(f"the prompt marks {marks} places for an image, but {came}")
    if MARK in words:
        raise InputError(f"the prompt nests {MARK} in itself")
    if layout.images_move:
        text, marks = words.strip(), 0
    return f"{layout.words}{text}" if marks else f"{layout.image * images}{layout.words}{text}"


# LLaVA 1.5 as it was trained (Vicuna's conversation): the end token stays between an answer and the next turn.
VICUNA = Layout("USER: ", " ASSISTANT:", turn_end="</s>")
# ... and as the hub's template writes it: a space in place of that token.
VICUNA_SPACED = VICUNA._replace(turn_end=None, between=" ")
CHATML = Layout(
    "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n", between="\n", turn_end="<|im_end|>",
    system=("<|im_start|>system\n", "<|im_end|>\n"),
)  # fmt: skip
INTERLEAVE = CHATML._replace(  # LLaVA-Interleave's model card: ChatML without its line breaks
    user="<|im_start|>user ", closes="<|im_end|><|im_start|>assistant", between="",
    system=("<|im_start|>system ", "<|im_end|>"),
)  # fmt: skip
SMOLVLM = Layout(
    "User:", "<end_of_utterance>\nAssistant:", opens="<|im_start|>", between="\n", turn_end="<end_of_utterance>",
    image=MARK, space=" ", system=("System: ", "<end_of_utterance>\n"),
)  # fmt: skip
GRANITE = Layout(
    "<|start_of_role|>user<|end_of_role|>", "<|end_of_text|>\n<|start_of_role|>assistant<|end_of_role|>", between="\n",
    turn_end="<|end_of_text|>", image=MARK, system=("<|start_of_role|>system<|end_of_role|>", "<|end_of_text|>\n"),
)  # fmt: skip

MOST_TEMPLATE = 20_000  # characters; what is longer is not looked at
TAG = re.compile(r"(\{%.*?%\}|\{#.*?#\}|\{\{.*?\}\})", re.DOTALL)
QUOTED = re.compile(r"\[\s*(?:'[^']*'|\"[^\"]*\")\s*\]|'([^']*)'|\"([^\"]*)\"")  # a key in brackets, or a text


def sketch(template: str) -> str:
    """What a Jinja template can write, piece by piece: a fingerprint of it, not a rendering.

    A piece is what stands between two control tags, with `{}` for what is filled in: branches follow each other, a loop
    is written once. The pieces are joined by `¦`.
    """
    texts, tags = TAG.split(template)[::2], TAG.findall(template)
    sketched = ""
    for text, before, after in zip(texts, ["", *tags], [*tags, ""]):
        # As transformers renders them: a minus takes white space away, a control tag the line break after it.
        text = text.lstrip() if before[-3:-2] == "-" else text
        text = text.removeprefix("\n") if before[-2:] in ("%}", "#}") else text
        sketched += text.rstrip() if after[2:3] == "-" else text
        sketched += {"{{": written(after.strip("{}- \n")), "{%": "¦"}.get(after[:2], "")
    pieces = [piece for piece in sketched.replace("\\n", "\n").split("¦") if piece]
    return "¦".join(piece for piece, last in zip(pieces, [None, *pieces]) if piece != last)


def written(expression: str) -> str:
    """The sketch of one expression: its texts as they are, `{}` for each part between them."""
    sketched, end = "", 0
    for quoted in QUOTED.finditer(expression):
        text = next((group for group in quoted.groups() if group is not None), None)
        if text is not None:
            sketched += ("{}" if expression[end : quoted.start()].strip(" +\n") else "") + text
            end = quoted.end()
    return sketched + ("{}" if expression[end:].strip(" +\n") else "")


VICUNA_SKETCH = re.compile(r"\{\}: ¦<image>\n¦\{\} ¦ASSISTANT:\s*")
SMOLVLM_PIECES = {":", ": ", "{}", "<image>", "<end_of_utterance>\n", "Assistant:"}  # among others, for video and tools
GRANITE_SKETCH = re.compile(
    r"<\|start_of_role\|>\{\}<\|end_of_role\|>¦\{\}¦<image>¦<\|end_of_text\|>\n¦"
    r"<\|start_of_role\|>assistant<\|end_of_role\|>\s*"
)
CHATML_SKETCH = re.compile(
    r"(?:(?P<default><\|im_start\|>system\n[^{}<¦]*<\|im_end\|>\n)¦)?<\|im_start\|>\{\}(?P<role>\s)¦?(?:\{\}¦)?"
    r"(?:(?P<image><image>\s?)¦)?(?:<video>\s?¦)?(?P<words>\s?)\{\}¦?<\|im_end\|>(?P<end>\s?)¦"
    r"<\|im_start\|>assistant(?P<answer>\s?)\s*"
)


def layout_of(template: str) -> Layout | None:
    """The layout that a chat template writes, or None if it is not one of those known here."""
    seen = sketch(template)
    if VICUNA_SKETCH.fullmatch(seen):
        return VICUNA_SPACED
    pieces = seen.split("¦")
    if pieces[0] == "<|im_start|>" and {*pieces, pieces[-1].rstrip()} >= SMOLVLM_PIECES:
        closed = "System: ¦{}¦<|im_end|>\n" in seen  # SmolVLM2 closes a system message otherwise
        return SMOLVLM._replace(system=("System: ", "<|im_end|>\n")) if closed else SMOLVLM
    if GRANITE_SKETCH.fullmatch(seen):
        return GRANITE
    if found := CHATML_SKETCH.fullmatch(seen):
        role, words, end = found["role"], found["words"], found["end"]
        return CHATML._replace(
            user=f"<|im_start|>user{role}", closes=f"<|im_end|>{end}<|im_start|>assistant{found['answer']}",
            between=end, image=found["image"] or MARK, words=words, default_system=found["default"] or "",
            system=(f"<|im_start|>system{role}{words}", f"<|im_end|>{end}"),
        )  # fmt: skip
    return None


def folder_template(folder: pathlib.Path) -> str | None:
    """The text of a model folder's chat template, None without one. Raises InputError."""
    template: Any = read_text(folder, "chat_template.jinja")
    for name in ("chat_template.json", "processor_config.json", "tokenizer_config.json"):
        if not isinstance(template, str):
            template = read_fields(folder, name, optional=True).raw("chat_template")
        if isinstance(template, list):  # several, by name
            named = [one for one in template if isinstance(one, dict) and one.get("name") == "default"]
            template = named[0].get("template") if named else None
    return template if isinstance(template, str) else None


def folder_layout(folder: pathlib.Path, own: Layout) -> Layout:
    """The layout that a folder's template asks for; the family's own where it has none, or one that is not known."""
    template = folder_template(folder)
    return own if template is None else known_layout(template, folder, own)


def known_layout(template: str, where: pathlib.Path | str, own: Layout) -> Layout:
    """The layout that a template asks for or, with a warning, the family's own."""
    layout = layout_of(template) if len(template) <= MOST_TEMPLATE else None
    if layout is None:
        unknown = f"{where} writes a chat in a way that is not known here; the family's own layout is used"
        warnings.warn(unknown, stacklevel=2)
    return layout or own
