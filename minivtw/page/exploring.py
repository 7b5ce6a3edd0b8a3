"""What the page of `minivtw.explore` can ask the model for: each request is an object, and so is its answer."""

import collections
import hashlib
import io
import pathlib
import sys
import threading
from collections.abc import Callable
from typing import Any

from ..analysis.migration import layer_inputs, swapped
from ..checkpoints.hub import model_name
from ..errors import InputError
from ..inputs.opening import open_image
from ..inputs.questions import read_questions
from ..loading import embedded_folder
from ..methods.shelf import METHODS, method_of
from ..methods.text import Method, check, spec_of, withdrawal_layer
from ..methods.withdrawal import then
from ..model.cache import KVCache
from ..model.decoder import decoder_layer, forward
from ..model.tokens import arriving
from ..vlm import VLM
from . import watching
from .page import data_url, packed, thumbnail
from .unfolding import Called, unfolded

MOST_HELD = 500_000_000  # bytes of images' files and embedded questions; the oldest go first
SMALL = 96, 96  # pixels of a sample to choose


class Newest(collections.OrderedDict[str, Any]):
    """The newest of what was made, by the text that it was made from: MOST_HELD bytes of it, or the last alone."""

    size = 0

    def made(self, key: str, make: Callable[[], Any]) -> Any:
        """What is held for this key; made now if there is nothing."""
        if key not in self:
            self[key] = make()
            self.size += sys.getsizeof(key) + sys.getsizeof(self[key])
        self.move_to_end(key)
        while self.size > MOST_HELD and len(self) > 1:
            self.size -= sum(map(sys.getsizeof, self.popitem(last=False)))
        return self[key]


class Explorer:
    """The model behind the page. Every request says all that it is about, so any number of tabs can ask in turns."""

    def __init__(self, vlm: VLM, method: Method | None, image: str | None = None):
        if not vlm.parts.vision:
            raise InputError(f"{vlm.folder} is a text-only model: the page needs one that sees images")
        self.vlm, self.method, self.own = vlm, method, spec_of(method)
        self.held = Newest()
        self.lock = threading.Lock()  # one computation at a time
        self.samples = [] if image is None else [self.sample(image, "What color is the star?", "")]
        shipped = read_questions(embedded_folder() / "samples")
        self.samples += [self.sample(each.image, each.question, each.answer) for each in shipped]
        self.kept = dict(self.held)  # these are never forgotten

    def sample(self, image: str, question: str, answer: str) -> dict[str, str]:
        small = open_image(image)
        small.thumbnail(SMALL)
        name = self.hold(pathlib.Path(image).read_bytes())
        return {"picture": name, "question": question, "answer": answer, "small": data_url(small)}

    def hold(self, content: bytes) -> str:
        """Keep an image's file. Returns its name, its digest."""
        name = hashlib.sha256(content).hexdigest()[:32]
        self.held.made(name, lambda: content)
        return name

    def picture(self, name: str) -> io.BytesIO:
        """An image's file, which is far smaller than its pixels; it is opened when it is asked about."""
        content = self.kept.get(name) or self.held.get(name)
        if not isinstance(content, bytes):
            raise InputError("this image is no longer held; choose it again")
        return io.BytesIO(self.held.made(name, lambda: content))  # whatever is asked about is among the newest

    def question(self, content: dict, which: str = "picture") -> watching.EmbeddedQuestion:
        name, words = required_text(content, which), required_text(content, "question")
        picture, seen = self.picture(name), f"seen {name}"
        image = lambda: self.held.made(seen, lambda: watching.see(self.vlm, picture))
        question = self.held.made(f"{name} {words}", lambda: watching.ask(self.vlm, image(), words))
        for key in filter(self.held.__contains__, (seen, name)):  # what questions share outlives them
            self.held.move_to_end(key)
        return question

    def requested_method(self, content: dict) -> Method | None:
        """The method of a request: patches clicked away, an image swapped, then what was chosen."""
        spec, swap, parts = required_text(content, "method"), content.get("swap") or {}, list[Method]()
        if not isinstance(swap, dict):
            raise InputError("the request has a swap that is no object")
        if spec:  # its text is checked before anything runs; a file may only be the one that the page was started with
            parts.append(check(method_of(spec, files=spec == self.own), self.vlm.config.layers) or then())
        if swap:
            first, stop = sorted(indices([swap.get("first"), swap.get("stop")], self.vlm.config.layers + 1))
            both = self.question(content), self.question(content | swap, "other")
            own, other = (layer_inputs(self.vlm.decoder, each.embedded) for each in both)
            parts.insert(0, swapped(own, other, range(first, stop)))
        if content.get("gone"):
            places = len(self.question(content).embedded.hidden)
            parts.insert(0, watching.without(indices(content["gone"], places)))
        return then(*parts) if len(parts) > 1 else parts[0] if parts else None

    # The requests.

    def start(self, content: dict) -> dict:
        """What the page begins with."""
        layer = withdrawal_layer(self.method)
        return {
            "model": model_name(self.vlm.folder),
            "layers": self.vlm.config.layers,
            "layer": self.vlm.config.layers if layer is None else layer,
            "own": self.own,
            "begins": self.own if self.own and layer is None else "withdraw:layer=K",
            "methods": {name: (make.__doc__ or "").split("\n")[0] for name, make in METHODS.items()},
            "samples": self.samples,
        }

    def upload(self, content: bytes) -> dict:
        """An image's file; returns the name to ask about it by."""
        try:
            open_image(io.BytesIO(content))
        except InputError as error:
            raise InputError(str(error).replace("the stream", "this file")) from None
        return {"picture": self.hold(content)}

    def ask(self, content: dict) -> dict:
        """A question about an image: its tokens, the image as the model sees it, what it says left alone."""
        question = self.question(content)
        return watching.shown(self.vlm, question) | {"full": question.answer.text}

    def frame(self, content: dict) -> dict:
        """The answer under a method, and what it took: `watching.frame`. Where the image is tampered with, also how
        likely the answer stays that the model gives when it is left alone, and the one about the image swapped in."""
        question, method, swap = self.question(content), self.requested_method(content), content.get("swap")
        frame, sides = watching.frame(self.vlm, question, method), []
        if swap or content.get("gone"):
            rivals = [question, self.question(content | swap, "other")] if swap else [question]
            answers = [each.answer.token_ids for each in rivals]
            sides = [watching.probability(self.vlm.decoder, question.embedded, answer, method) for answer in answers]
        return frame | {"method": content["method"] or None, "sides": sides}

    def eyes(self, content: dict) -> dict:
        """One token: what it attends to, what attends to it, what the lens reads there, layer by layer."""
        question, answer = self.question(content), content.get("ids")
        ids = indices(answer, self.vlm.config.vocabulary)[: watching.LONGEST_ANSWER] or [0]
        token = indices([content.get("token")], len(question.embedded.hidden) + len(ids) - 1)
        traces = watching.traces(self.vlm.decoder, question.embedded, ids, self.requested_method(content), token)
        return packed(traces.attention[0]) | {
            "heads": self.vlm.config.heads,
            "tokens": traces.attention.shape[-1],
            "seen": packed(traces.received[0]),
            "readings": watching.readings(self.vlm, traces.states[0]),
        }

    def layer(self, content: dict) -> dict:
        """The arithmetic of a layer under a method: every statement that ran, with its arrays."""
        prompt, method = self.question(content).embedded, self.requested_method(content)
        (layer,) = indices([content.get("layer")], self.vlm.config.layers)
        tokens = forward(self.vlm.decoder, arriving(prompt, KVCache(self.vlm.config)), method, stop=layer)
        tokens = method(layer, tokens) if method else tokens
        return called_json(unfolded(decoder_layer, self.vlm.decoder, layer, tokens))


def called_json(called: Called) -> dict:
    """A function that ran as the page gets it, with each array as a small image."""
    steps = []
    for step in called.steps:
        arrays = [{"name": name, **thumbnail(array)} for name, array in step.arrays.items()]
        steps.append(step._asdict() | {"arrays": arrays, "inside": [called_json(each) for each in step.inside]})
    return called._asdict() | {"steps": steps}


def required_text(content: dict, name: str) -> str:
    """Raise InputError unless the request has this text."""
    if not isinstance(content.get(name), str):
        raise InputError(f"the request lacks {name}")
    return content[name]


def indices(values: Any, stop: int) -> list[int]:
    """Raise InputError unless these are integers from 0 to stop - 1."""
    if not isinstance(values, list) or not all(type(value) is int and 0 <= value < stop for value in values):
        raise InputError(f"this request names layers or tokens that are not there: they go from 0 to {stop - 1}")
    return values
