"""An image that has been seen: the prompt up to the image's end, prefilled once, for any number of questions.

Tokens see only those before them, and in most layouts the image comes before the question. So what the layers keep of
it does not depend on the question, unless a method lets the question choose which visual tokens go on. Visual Tokens
Withdrawal does not: its keys and values of an image are the same for every question.
"""

import hashlib
import json
import os
import pathlib
from typing import Any

import numpy as np
import safetensors.numpy

from .checkpoints.fields import MOST, Fields
from .checkpoints.stored import fingerprint
from .counting import cache_bytes
from .errors import InputError, reading
from .inputs.prompts import Prompt, Tiled
from .inputs.writing import write_whole
from .methods.shelf import method_of
from .methods.text import Method, check, spec_of
from .model.cache import KVCache
from .model.decoder import forward
from .model.tokens import EmbeddedPrompt, LayerCount, Tokens, arriving

PROBE = "?"  # any question: what comes before it is the same
SAVED = "minivtw.seen"  # where a file's metadata say what was seen
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

    def __init__(self, vlm: Any, images: Any, method: Method | None = None, system: str | None = None) -> None:
        """images: as for `VLM.tile`, or what it gave. Raises InputError, also where the method looks at the question."""
        self.vlm, self.system = vlm, system
        self.method = check(method, vlm.config.layers)
        tiled = images if isinstance(images, Tiled) else vlm.tile(images)
        if not tiled.sizes:
            raise InputError("there is no image to be seen")
        prompt = vlm.prepare(tiled, PROBE, system=system)
        end = int(np.flatnonzero(prompt.is_visual)[-1]) + 1
        self.token_ids, self.is_visual = prompt.token_ids[:end], prompt.is_visual[:end]  # (tokens,) of what is shared
        self.tiles_sha256 = hashlib.sha256(np.ascontiguousarray(tiled.tiles).data).hexdigest()  # which image this was
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
        if any(chosen[-1] or chosen != kept[0] for chosen in kept):
            raise InputError(
                f"the method {spec_of(self.method)} looks at the question; of an image nothing can be reused"
            )
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
        if not np.array_equal(whole.token_ids[:end], self.token_ids) or whole.is_visual[end:].any():
            raise InputError("this question does not stand after the image; ask it with `answer`")
        return whole._replace(token_ids=whole.token_ids[end:], is_visual=whole.is_visual[end:])

    def save(self, path: str | os.PathLike) -> None:
        """Write what the layers keep of the image into a safetensors file, for `VLM.seen`; whole or not at all.

        Raises InputError, also for a method that has no text to be read again.
        """
        text, tensors = spec_of(self.method), {"token_ids": self.token_ids, "ran": np.array(self.ran, np.int64)}
        try:
            method_of(text, files=False) if text else None
        except InputError as error:
            raise InputError(f"the method {text} is your own; of an image seen under it no file is written") from error
        for index, layer in enumerate(self.cache.layers):
            tensors |= {f"layers.{index}.{name}": getattr(layer, name) for name in ("keys", "values", "positions")}
        about: dict[str, Any] = {"model": fingerprint(self.vlm.folder), "tiles": self.tiles_sha256, "method": text}
        about |= {"system": self.system, "expansions": self.tiled.expansions, "sizes": self.tiled.sizes}
        contiguous = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
        write_whole(path, safetensors.numpy.save(contiguous, {SAVED: json.dumps(about)}))


def load(vlm: Any, path: str | os.PathLike) -> Seen:
    """What `Seen.save` wrote, checked against the model before any of it is used. Raises InputError."""
    about, tensors = contents(path, cache_bytes(vlm.config, [vlm.config.max_positions] * vlm.config.layers))
    if about.text("model") != fingerprint(vlm.folder):
        raise about.error(f"was not written with the model {vlm.folder}")
    seen, config, expansions = Seen.__new__(Seen), vlm.config, about.raw("expansions")
    sizes = about.pairs("sizes", 1000, MOST)  # (height, width) of each image
    if not isinstance(expansions, list) or [type(one) for one in expansions] != [str] * len(sizes):
        raise about.error("must say for each image the text that stands for it")
    seen.vlm, seen.system, seen.tiles_sha256 = vlm, about.text("system", None), about.text("tiles")
    seen.tiled, seen.cache, text = Tiled(None, expansions, sizes), KVCache(config), about.text("method", None)
    try:
        seen.method = check(None if text is None else method_of(text, files=False), config.layers)
        prompt = vlm.prepare(seen.tiled, PROBE, system=seen.system)
        end = int(np.flatnonzero(prompt.is_visual)[-1:].sum()) + 1
        seen.cache.claim(end)
    except InputError as error:
        raise about.error(f"cannot be used: {error}") from error
    seen.token_ids, seen.is_visual = prompt.token_ids[:end], prompt.is_visual[:end]

    def tensor(name: str, dtype: Any, *shape: int) -> np.ndarray:
        found = tensors.pop(name, None)
        if found is None or (found.dtype, found.shape) != (dtype, shape) or not np.isfinite(found).all():
            raise about.error(f"does not hold {name} as finite {np.dtype(dtype)}, of shape {shape}")
        return found

    if not np.array_equal(tensor("token_ids", np.int64, end), seen.token_ids):
        raise about.error("holds other tokens than the model's tokenizer makes")
    ran = tensor("ran", np.int64, config.layers, 4)
    for index, layer in enumerate(seen.cache.layers):
        count = tensors.get(f"layers.{index}.positions", np.empty(0)).size
        positions = tensor(f"layers.{index}.positions", np.int64, count)
        size = config.kv_heads, count, config.head_dim
        keys, values = (tensor(f"layers.{index}.{name}", np.float32, *size) for name in ("keys", "values"))
        entered, worked, cached, extra = ran[index].tolist()
        if (np.diff(positions, prepend=-1, append=end) <= 0).any():
            raise about.error(f"holds positions of layer {index} that do not ascend within the prompt")
        if not entered == cached == count >= worked >= 0 <= extra:
            raise about.error(f"does not count what layer {index} did")
        layer.append(keys, values, positions)
    if tensors:
        raise about.error(f"holds tensors that nobody needs, such as {min(tensors)[:80]}")
    seen.ran = [LayerCount(*one) for one in ran.tolist()]
    return seen


def contents(path: str | os.PathLike, most_bytes: int) -> tuple[Fields, dict[str, np.ndarray]]:
    """What a file says of itself, and its tensors by name. Raises InputError for what `Seen.save` has not written."""
    with reading(path):
        size, most = os.stat(path).st_size, 2 * most_bytes + MOST  # a position takes no more than its keys and values
        if not os.path.isfile(path) or size > most:
            raise InputError(f"{path} is not a file of at most {most / 1e6:,.0f} MB, all that an image takes")
        data = pathlib.Path(path).read_bytes()
    try:
        tensors = safetensors.numpy.load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        about = json.loads(header["__metadata__"][SAVED])
    except (safetensors.SafetensorError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise InputError(f"{path} is not what `Seen.save` writes: {type(error).__name__}: {error}") from error
    if not isinstance(about, dict):
        raise InputError(f"{path} is not what `Seen.save` writes: it says nothing of the image")
    return Fields(about, str(path)), tensors
