"""An image that has been seen: the prompt up to the image's end, prefilled once, for any number of questions.

Tokens see only those before them, and in most layouts the image comes before the question. So what the layers keep of
it does not depend on the question, unless a method lets the question choose which visual tokens go on. Visual Tokens
Withdrawal does not: its keys and values of an image are the same for every question.
"""

import contextlib
import copy
import hashlib
import os
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from . import saved
from .errors import InputError
from .inputs.prompts import Prompt, Tiled
from .methods.text import Method, check, spec_of
from .model.cache import KVCache
from .model.decoder import forward
from .model.layers import Observe
from .model.tokens import EmbeddedPrompt, LayerCount, Tokens, arriving

PROBE = "?"  # any question: what comes before it is the same
NOTHING_RAN = LayerCount(0, 0, 0, 0)
PROBES = (5, 64)  # words of the questions, drawn at random, that a method is shown before it may be reused


class WatchedTokens(Tokens):
    """Tokens that note whether a method asks where a token after the image looked."""

    def attention_to(self, entering: Tokens, rows: Any, index: int, keys: np.ndarray, sees: np.ndarray) -> np.ndarray:
        """As `Tokens.attention_to`."""
        self.notes["looks at the question"] |= bool((entering.positions[rows] >= self.notes["image ends"]).any())
        return super().attention_to(entering, rows, index, keys, sees)


class Beginning(NamedTuple):
    """A prompt up to the end of its image: what is the same for every question, and under every method."""

    token_ids: np.ndarray  # (tokens,)
    is_visual: np.ndarray  # (tokens,) booleans
    embedded: EmbeddedPrompt
    tiled: Tiled  # without the tiles
    tiles_sha256: str  # which image it is
    system: str | None

    def then(self, rest: np.ndarray) -> EmbeddedPrompt:
        """The whole prompt with the rest, (tokens, width)."""
        hidden, is_visual = np.concatenate([self.embedded.hidden, rest]), np.pad(self.is_visual, (0, len(rest)))
        return self.embedded._replace(hidden=hidden, is_visual=is_visual)


def begin(vlm: Any, images: Any, system: str | None = None) -> Beginning:
    """Run the vision tower; images: as for `VLM.tile`. Raises InputError."""
    tiled = vlm.tile(images)
    if not tiled.sizes:
        raise InputError("there is no image to be seen")
    prompt = vlm.prepare(tiled, PROBE, system=system)
    end = int(np.flatnonzero(prompt.is_visual)[-1]) + 1
    shared = prompt._replace(token_ids=prompt.token_ids[:end], is_visual=prompt.is_visual[:end])
    digest = hashlib.sha256(np.ascontiguousarray(tiled.tiles).data).hexdigest()
    without = tiled._replace(tiles=None)
    return Beginning(shared.token_ids, shared.is_visual, vlm.embed(shared), without, digest, system)


def rest_of(vlm: Any, seen: "Beginning | Seen", question: str) -> Prompt:
    """What a question adds to an image. Raises InputError where the prompt does not begin with that."""
    whole, end = vlm.prepare(seen.tiled, question, system=seen.system), len(seen.token_ids)
    begins_alike = np.array_equal(whole.token_ids[:end], seen.token_ids)
    if not begins_alike or (end and whole.is_visual[end:].any()):
        raise InputError("this question does not stand after the image; ask it with `answer`")
    return whole._replace(token_ids=whole.token_ids[end:], is_visual=whole.is_visual[end:])


def alike(one: list[list[np.ndarray]], other: list[list[np.ndarray]]) -> bool:
    """Whether a method made the same of the shared tokens twice, up to rounding."""
    pairs = [pair for layers in zip(one, other) for pair in zip(*layers)]
    return [*map(len, one)] == [*map(len, other)] and all(
        a.shape == b.shape and np.allclose(a, b, rtol=1e-2, atol=1e-3 * np.abs(b).max(initial=0)) for a, b in pairs
    )


class Seen:
    """An image that a model has seen under a method: what is asked of it next costs the question alone.

    Whether a method looks at the question is tested with random words: one that does so only now and then may pass.
    Several threads may ask at once: each question has a copy of the cache, and what is shared is never written to.
    """

    seconds = 0.0  # that the image's prefill took, if it was prefilled alone
    token_ids: np.ndarray  # (tokens,) up to the image's end
    is_visual: np.ndarray  # (tokens,) booleans
    embedded: EmbeddedPrompt | None = None  # its features, for whole prompts (`fallback`)

    def __init__(self, vlm: Any, beginning: Beginning, method: Method | None = None, fallback: bool = False) -> None:
        """fallback: under a method that looks at the question, each runs its whole prompt, and only the image's features
        are reused.

        Raises InputError, also where the method looks at the question and there is no fallback.
        """
        self._belong(vlm, beginning, check(method, vlm.config.layers))
        cache, kept = KVCache(vlm.config), []
        room = vlm.config.max_positions - len(self.token_ids)  # where there is none, the cache says so
        trials = [(max(min(count, room), 1), KVCache(vlm.config)) for count in PROBES if method] + [(1, cache)]
        for count, trial in trials:
            question, started = self._random_words(count), time.perf_counter()
            ran, chosen = self._prefilled(beginning.then(question), trial)
            self.seconds = time.perf_counter() - started
            kept.append(chosen)
        if method and any(looks or not alike(chosen, kept[0][0]) for chosen, looks in kept):
            if not fallback:
                raise InputError(
                    f"the method {spec_of(self.method)} looks at the question; of an image nothing can be reused"
                )
            self.embedded, self.cache = beginning.embedded, KVCache(vlm.config)
            self.token_ids, self.is_visual = self.token_ids[:0], self.is_visual[:0]
            self.ran = [NOTHING_RAN] * vlm.config.layers
            return
        self._keep(cache, ran, 1)

    @classmethod
    def left_by(cls, chat: Any, beginning: Beginning, asked: int) -> "Seen":
        """What a chat keeps of the image after its first turn, a question of `asked` tokens: nothing runs a second time.

        Only for a method that is known not to look at the question, and that works on all of it.
        """
        seen = cls.__new__(cls)
        seen._belong(chat.vlm, beginning, chat.method)
        seen._keep(copy.deepcopy(chat.cache), chat.ran, asked)
        return seen

    def _belong(self, vlm: Any, beginning: Beginning, method: Method | None) -> None:
        """Note whose image this is, and under which method."""
        self.vlm, self.method = vlm, method
        self.token_ids, self.is_visual, _, self.tiled, self.tiles_sha256, self.system = beginning

    def _keep(self, cache: KVCache, ran: Sequence[LayerCount], asked: int) -> None:
        """Keep what a prefill left of the image: the `asked` tokens after it leave again."""
        cache.trim(len(self.token_ids))
        self.cache = cache
        self.ran = [
            LayerCount(one.entered - asked, one.worked - asked, one.cached - asked, one.extra_flops) for one in ran
        ]

    def _prefilled(self, prompt: EmbeddedPrompt, cache: KVCache) -> tuple[tuple[LayerCount, ...], tuple[Any, bool]]:
        """Prefill. Returns what each layer did, what the method made of the shared tokens before each layer, and whether it
        asked where tokens after them looked."""
        end, kept = len(self.token_ids), list[list[np.ndarray]]()

        def method(index: int, came: Tokens) -> Tokens:
            tokens = self.method(index, came) if self.method else came
            shared = tokens.positions < end  # (tokens,)
            works = shared if tokens.works is None else tokens.works & shared  # (tokens,)
            stayed = shared & np.isin(tokens.positions, came.positions)  # (tokens,) without those that have come late
            before = came.hidden[np.isin(came.positions, tokens.positions[stayed])]  # (stayed, width)
            changed = tokens.hidden[stayed] - before  # (stayed, width) by the method; layers differ in rounding
            kept.append([tokens.positions[shared], tokens.positions[works], tokens.rotary_positions[shared], changed])
            kept[-1] += [array for group in tokens.followed for array in group.among(tokens.positions[shared])]
            return tokens

        tokens = WatchedTokens(**vars(arriving(prompt, cache)))
        tokens.notes.update({"image ends": end, "looks at the question": False})
        ran = forward(self.vlm.decoder, tokens, method).ran
        return ran, (kept, tokens.notes["looks at the question"])

    def _random_words(self, count: int) -> np.ndarray:
        """An embedded question, (count, width), of random words: a method that looks at questions gives itself away."""
        token_ids = np.random.default_rng(count).integers(0, self.vlm.config.vocabulary, count)
        return self.vlm.decoder.embedding[token_ids]

    def ask(self, prompt: str, **options: Any) -> Any:
        """Answer a question as if it had been the only one; options: as for `Chat.ask`. Raises InputError."""
        return self.chat().ask(prompt, **options)

    def chat(self) -> Any:
        """A conversation that begins with this image."""
        return self.vlm.chat(self)

    def rest(self, question: str, image: Any = None) -> Prompt:
        """What a question adds to what is shared. Raises InputError where the prompt does not begin with that."""
        if image is not None:
            raise InputError("the image of this conversation has been seen; show another one with the next question")
        return rest_of(self.vlm, self, question)

    def embed(self, prompt: Prompt, observe: Observe | None = None) -> EmbeddedPrompt:
        """As `VLM.embed`; visual tokens that come without their tiles are those of the image that was seen."""
        if self.embedded and prompt.tiles is None and prompt.is_visual.any():
            return embed_after(self.vlm, prompt, self.embedded, observe)
        return self.vlm.embed(prompt, observe)

    def stands_before(self, question: str) -> bool:
        """Whether `ask` can answer a question: none that speaks of its image elsewhere than at the beginning."""
        with contextlib.suppress(InputError):
            return bool(len(self.rest(question).token_ids))
        return False

    def save(self, path: str | os.PathLike) -> None:
        """Write what the layers keep of the image into a safetensors file, for `VLM.seen`; whole or not at all.

        Raises InputError, also for a method that has no text to be read again.
        """
        if self.embedded:
            raise InputError(f"the method {spec_of(self.method)} looks at the question; there is nothing to be saved")
        saved.save(self, path)


def load(vlm: Any, path: str | os.PathLike) -> Seen:
    """What `Seen.save` wrote, checked against the model before any of it is used. Raises InputError."""
    seen = Seen.__new__(Seen)
    vars(seen).update(saved.load(vlm, path, PROBE), vlm=vlm)
    return seen


def embed_after(vlm: Any, prompt: Prompt, seen: EmbeddedPrompt, observe: Observe | None = None) -> EmbeddedPrompt:
    """As `VLM.embed`, with the features of images that were `seen` in another prompt: no tower runs."""
    embedded = vlm.embed(prompt._replace(tiles=None))._replace(tower=seen.tower)
    embedded.hidden[prompt.is_visual] = seen.hidden[seen.is_visual]
    if observe:
        observe("decoder.embeddings", embedded.hidden)
    return embedded
