"""An image that has been seen: the prompt up to the image's end, prefilled once, for any number of questions.

Tokens see only those before them, and in most layouts the image comes before the question. So what the layers keep of
it does not depend on the question, unless a method lets the question choose which visual tokens go on. Visual Tokens
Withdrawal does not: its keys and values of an image are the same for every question.
"""

from typing import Any

import numpy as np

from .errors import InputError
from .inputs.prompts import Prompt, Tiled
from .methods.text import Method, check, spec_of
from .model.cache import KVCache
from .model.decoder import forward
from .model.layers import Observe
from .model.tokens import EmbeddedPrompt, LayerCount, Tokens, arriving

PROBE = "?"  # any question: what comes before it is the same
NOTHING_RAN = LayerCount(0, 0, 0, 0)
PROBES = 2  # how many questions, of random words, a method is shown before it may be reused


class WatchedTokens(Tokens):
    """Tokens that note whether a method asks where a token after the image looked."""

    def attention_to(self, entering: Tokens, rows: Any, index: int, keys: np.ndarray, sees: np.ndarray) -> np.ndarray:
        """As `Tokens.attention_to`."""
        self.notes["looks at the question"] |= bool((entering.positions[rows] >= self.notes["image ends"]).any())
        return super().attention_to(entering, rows, index, keys, sees)


class Seen:
    """An image that a model has seen under a method: what is asked of it next costs the question alone.

    Several threads may ask at once: each question has a copy of the cache, and what is shared is never written to.
    """

    def __init__(
        self, vlm: Any, images: Any, method: Method | None = None, system: str | None = None, fallback: bool = False
    ) -> None:
        """images: as for `VLM.tile`, or what it gave; fallback: under a method that looks at the question, each question
        runs its whole prompt, and only the image's features are reused. Raises InputError, also there without it.
        """
        self.vlm, self.system = vlm, system
        self.method = check(method, vlm.config.layers)
        tiled = images if isinstance(images, Tiled) else vlm.tile(images)
        if not tiled.sizes:
            raise InputError("there is no image to be seen")
        prompt = vlm.prepare(tiled, PROBE, system=system)
        end = int(np.flatnonzero(prompt.is_visual)[-1]) + 1
        self.token_ids, self.is_visual = prompt.token_ids[:end], prompt.is_visual[:end]  # (tokens,) of what is shared
        self.tiled = tiled._replace(tiles=None)  # which stand in the cache now
        self.cache = KVCache(vlm.config)
        embedded = vlm.embed(prompt._replace(token_ids=self.token_ids, is_visual=self.is_visual))
        kept = []
        for count, cache in enumerate([KVCache(vlm.config) for _ in range(PROBES if method else 0)] + [self.cache]):
            question = self._random_words(1 if cache is self.cache else 4 * count + 4)
            hidden, is_visual = (
                np.concatenate([embedded.hidden, question]),
                np.pad(embedded.is_visual, (0, len(question))),
            )
            ran, chosen = self._prefilled(embedded._replace(hidden=hidden, is_visual=is_visual), cache)
            kept.append(chosen)
        self.embedded: EmbeddedPrompt | None = None  # what each question's prompt needs of it, where all of that runs
        if any(chosen[-1] or chosen != kept[0] for chosen in kept):
            if not fallback:
                raise InputError(
                    f"the method {spec_of(self.method)} looks at the question; of an image nothing can be reused"
                )
            self.embedded, self.cache, self.ran = embedded, KVCache(vlm.config), [NOTHING_RAN] * vlm.config.layers
            self.token_ids, self.is_visual = self.token_ids[:0], self.is_visual[:0]
            return
        self.cache.trim(end)  # the one word after the image leaves again
        self.ran = [LayerCount(one.entered - 1, one.worked - 1, one.cached - 1, one.extra_flops) for one in ran]

    def _prefilled(self, prompt: EmbeddedPrompt, cache: KVCache) -> tuple[tuple[LayerCount, ...], list[Any]]:
        """Prefill; what each layer did, and what the method made of the shared tokens before each layer."""
        end, kept = len(self.token_ids), list[Any]()

        def method(index: int, tokens: Tokens) -> Tokens:
            tokens = self.method(index, tokens) if self.method else tokens
            shared = tokens.positions < end
            works = shared if tokens.works is None else tokens.works & shared
            kept.append(
                [list(tokens.positions[shared]), list(tokens.positions[works]), list(tokens.rotary_positions[shared])]
            )
            return tokens

        tokens = WatchedTokens(**vars(arriving(prompt, cache)))
        tokens.notes.update({"image ends": end, "looks at the question": False})
        ran = forward(self.vlm.decoder, tokens, method).ran
        return ran, [*kept, tokens.notes["looks at the question"]]

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
        whole, end = self.vlm.prepare(self.tiled, question, system=self.system), len(self.token_ids)
        begins_alike = np.array_equal(whole.token_ids[:end], self.token_ids)
        if not begins_alike or (whole.is_visual[end:].any() and not self.embedded):
            raise InputError("this question does not stand after the image; ask it with `answer`")
        return whole._replace(token_ids=whole.token_ids[end:], is_visual=whole.is_visual[end:])

    def embed(self, prompt: Prompt, observe: Observe | None = None) -> EmbeddedPrompt:
        """As `VLM.embed`; visual tokens that come without their tiles are those of the image that was seen."""
        if self.embedded and prompt.tiles is None and prompt.is_visual.any():
            return embed_after(self.vlm, prompt, self.embedded, observe)
        return self.vlm.embed(prompt, observe)


def embed_after(vlm: Any, prompt: Prompt, seen: EmbeddedPrompt, observe: Observe | None = None) -> EmbeddedPrompt:
    """As `VLM.embed`, with the features of images that were `seen` in another prompt: no tower runs."""
    embedded = vlm.embed(prompt._replace(tiles=None))._replace(tower=seen.tower)
    embedded.hidden[prompt.is_visual] = seen.hidden[seen.is_visual]
    if observe:
        observe("decoder.embeddings", embedded.hidden)
    return embedded
