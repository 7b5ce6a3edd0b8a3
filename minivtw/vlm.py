"""What a user holds: load a model, ask it about an image.

vlm = minivtw.load()
answer = vlm.answer("scene.png", "What color is the star?")
print(answer.text, answer.stats["flops"])
"""

import copy
import os
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from .checkpoints.parts import Parts
from .checkpoints.stored import resolve_method
from .counting import turn_stats
from .errors import InputError, check_functions, checked_int
from .inputs.marks import check_vocabulary, encode_words, refuse_marks
from .inputs.opening import open_image, refuse_swapped
from .inputs.prompts import Prompt, Tiled, expand_marks, spoken
from .inputs.streaming import TextStream
from .methods.text import Method, NamedMethod, check
from .model.cache import KVCache
from .model.decoder import forward, logits
from .model.layers import Observe, check_finite
from .model.sampling import Sampler
from .model.tokens import EmbeddedPrompt, LayerCount, Tokens, arriving, embedded_text
from .model.vision import Tower
from .model.vision import encode as encode_image
from .seen import Seen, begin, load


class Answer(NamedTuple):
    """`token_ids` includes the token that ends an answer if the model produced it; `stats` is what `--json` prints."""

    text: str
    token_ids: list[int]
    stats: dict[str, Any]
    images: Any = None  # as they were given


class VLM:
    """A vision-language model: parts, tokenizer, and the steps from a question to its answer."""

    def __init__(
        self,
        folder: pathlib.Path,
        parts: Parts,
        tokenizer: Tokenizer,
        stop_ids: frozenset[int],
        load_seconds: float = 0.0,
        max_tiles: int | None = None,
    ):
        self.folder = folder
        self.parts = parts
        self.decoder = parts.decoder
        self.config = parts.decoder.config
        self.tokenizer = tokenizer
        self.stop_ids = stop_ids
        self.load_seconds = load_seconds
        self.max_tiles = max_tiles
        self.turn_end_id = tokenizer.token_to_id(parts.layout.turn_end or "")  # closes an answer that was cut short
        self.image_token_id = tokenizer.token_to_id(parts.vision.image_token) if parts.vision else None
        if parts.vision and parts.vision.image_token_id not in (None, self.image_token_id):
            raise InputError(f"the tokenizer and the config of {folder} disagree on the token of <image>")

    def answer(
        self,
        image: Any,
        prompt: str,
        *,
        withdraw: str | int | None = "auto",
        method: Method | str | None = None,
        system: str | None = None,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        observe: Observe = None,
        stream: Callable[[str], None] | None = None,
    ) -> Answer:
        """Answer one question about an image: a path, a Pillow image, a list of these, or None.

        withdraw: "auto" (what is stored with the model), None or "off" (never), or K, the layer before which the
        visual tokens leave; method: any other, a function or its text (`methods/withdrawal.py`), instead of `withdraw`; system: as
        for `Chat`; the rest is as for `Chat.ask`. Raises InputError.
        """
        return Chat(self, withdraw, method, system).ask(
            prompt, image, max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p,
            seed=seed, observe=observe, stream=stream,
        )  # fmt: skip

    def method(self, withdraw: str | int | None = "auto", method: Method | str | None = None) -> NamedMethod | None:
        """What the two arguments of `answer` mean for this model, checked; None: every token goes through every layer."""
        return resolve_method(self.folder, self.config.layers, withdraw, method)

    def tile(self, images: Any) -> Tiled:
        """Images (a path, a Pillow image, a list of these, None) as the vision tower takes them. Raises InputError."""
        images = [] if images is None else images if isinstance(images, list | tuple) else [images]
        if images and not self.parts.vision:
            raise InputError(f"{self.folder} is a text-only model: ask it without an image")
        opened = [open_image(image) for image in images]
        if not opened or not self.parts.vision:
            return Tiled(None, [], ())
        tiles, expansions = self.parts.vision.tile(opened, self.max_tiles)  # (tiles, channels, side, side)
        return Tiled(tiles, expansions, tuple((image.height, image.width) for image in opened))

    def prepare(self, images: Any, text: str, is_first: bool = True, system: str | None = None) -> Prompt:
        """Images and a question -> `Prompt`: the chat around them, and each image's tiles and visual tokens.

        images: as for `tile`, or what it gave; system: a message before the first turn; None for what the model's own
        layout puts there. Raises InputError.
        """
        refuse_swapped(images, text)
        for said in (text,) if system is None else (text, system):
            refuse_marks(said, self.tokenizer, self.parts.layout.marks())
        tiled = images if isinstance(images, Tiled) else self.tile(images)
        turn, vision = self.parts.layout.turn(text, len(tiled.sizes), is_first, system), self.parts.vision
        token_ids = encode_words(self.tokenizer, expand_marks(turn, tiled.expansions), opens=is_first)  # (tokens,)
        is_visual = token_ids == self.image_token_id  # (tokens,)
        if vision and is_visual.sum() != sum(one.count(vision.image_token) for one in tiled.expansions):
            raise InputError(f"the prompt says {vision.image_token}, which stands for an image and cannot be said")
        check_vocabulary(token_ids[~is_visual], self.config.vocabulary)
        return Prompt(token_ids, is_visual, tiled.tiles, tiled.sizes)

    @np.errstate(all="ignore")  # as in `decoder_layer`
    def embed(self, prompt: Prompt, observe: Observe = None) -> EmbeddedPrompt:
        """The decoder's input: embedded text, with the image's features at the visual tokens' places."""
        # A visual token's own embedding is never used, and some models have none: any row stands in for it.
        hidden = self.decoder.embedding[np.where(prompt.is_visual, 0, prompt.token_ids)]  # (tokens, width)
        vision, tower, show = self.parts.vision, None, observe or (lambda name, array: None)
        if vision and prompt.tiles is not None:
            show("vision.pixels", prompt.tiles)
            if not vision.pack:  # else, as in LLaVA-OneVision, visual tokens are not the tower's patches one by one
                tower = Tower(vision.encoder, [])
            seen = [vision.connect(encode_image(vision.encoder, tile, observe, tower)) for tile in prompt.tiles]
            pack = vision.pack or (lambda tiles, *_: np.concatenate(tiles))
            visual = pack(seen, prompt.sizes, self.max_tiles)  # (visual tokens, width)
            hidden[prompt.is_visual] = visual
            show("connector.output", visual)
        show("decoder.embeddings", hidden)
        return EmbeddedPrompt(check_finite(hidden, "what enters the decoder"), prompt.is_visual, tower)

    def see(
        self,
        image: Any,
        withdraw: str | int | None = "auto",
        method: Method | str | None = None,
        system: str | None = None,
        fallback: bool = False,
    ) -> Seen:
        """Prefill an image, or a list of them, once, for any number of questions (`Seen.ask`). Arguments as for `answer`.

        Raises InputError, also for a method that lets the question choose among the visual tokens; with `fallback`, each
        question then runs its whole prompt, after a vision tower that ran once.
        """
        return Seen(self, begin(self, image, system), self.method(withdraw, method), fallback=fallback)

    def seen(self, path: str | os.PathLike) -> Seen:
        """What `Seen.save` wrote. Raises InputError for another model's file, and for a broken one."""
        return load(self, path)

    def chat(self, seen: Seen) -> "Chat":
        """A conversation that begins with what has been seen."""
        return Chat(self, None, seen.method, seen.system, seen)

    def advance(
        self, prompt: EmbeddedPrompt, cache: KVCache, method: Method | None = None, observe: Observe = None
    ) -> tuple[np.ndarray, Tokens]:
        """Carry new tokens through the decoder: the prompt (prefill), or one token fed back (decode).

        cache: gains the tokens. Returns the last token's logits, (vocabulary,), and the `Tokens` at the end. Raises
        InputError where a method let the last one go, or `methods.text.check` refuses it.
        """
        method = check(method, self.config.layers)
        tokens = forward(self.decoder, arriving(prompt, cache), method, observe=observe)
        if not len(tokens) or tokens.positions[-1] != cache.next_position - 1:
            raise InputError("the method withdrew the prompt's last token, whose state becomes the answer")
        last = logits(self.decoder, tokens.hidden[-1:])[0]  # (vocabulary,)
        if observe:
            observe("decoder.logits", last)
        return last, tokens


class Chat:
    """A conversation about one or more images. The cache stays between turns: deep layers keep what a method left them.

    system: a message before the first turn; None for what the model's own layout puts there; seen: what the conversation
    begins with (`Seen.chat`). After a turn, `ran` is what each layer did with its prompt.
    """

    def __init__(
        self,
        vlm: VLM,
        withdraw: str | int | None = "auto",
        method: Method | str | None = None,
        system: str | None = None,
        seen: Seen | None = None,
    ):
        self.vlm, self.system = vlm, system
        self.method = vlm.method(withdraw, method)
        self.cache = copy.deepcopy(seen.cache) if seen else KVCache(vlm.config)
        self.seen = seen
        self._said: list[int] = []  # the newest token, which no layer has seen yet

    def __copy__(self) -> "Chat":
        """The same conversation, to be continued in another way: the copy has a cache of its own."""
        twin = Chat(self.vlm, None, self.method, self.system)
        twin.cache, twin.seen, twin._said = copy.deepcopy(self.cache), self.seen, self._said
        return twin

    def ask(
        self,
        prompt: str,
        image: Any = None,
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        observe: Observe = None,
        stream: Callable[[str], None] | None = None,
    ) -> Answer:
        """The next turn: a question and, if there is a new one, an image (a path, a Pillow image, a list of these).

        max_new_tokens: 0 prefills only; temperature 0 is greedy; top_k 0 and top_p 1 draw from every token; `observe`
        sees every intermediate array by its name; `stream` gets the answer piece by piece. Raises InputError. Whatever
        goes wrong, in here or in the callbacks, the conversation is then as it was before.
        """
        sampler, started = Sampler(temperature, top_k, top_p, seed), time.perf_counter()
        max_new_tokens = checked_int(max_new_tokens, "max-new-tokens")
        check_functions(observe=observe, stream=stream)
        embed = (self.seen or self.vlm).embed
        embedded = embed(self.prepare(prompt, image), observe)  # 1. tokens, and 2. what the vision tower sees
        seconds = {"load": self.vlm.load_seconds, "vision": time.perf_counter() - started}
        return self.respond(embedded, sampler, max_new_tokens, observe, stream, seconds)._replace(images=image)

    def respond(
        self,
        prompt: EmbeddedPrompt,
        sampler: Callable[[np.ndarray], int],
        max_new_tokens: int,
        observe: Observe = None,
        stream: Callable[[str], None] | None = None,
        seconds: dict[str, float] | None = None,
    ) -> Answer:
        """3. prefill, 4. decode until a stop token, `max_new_tokens` or the last position: answer an embedded prompt.

        sampler: logits (vocabulary,) to a token id; seconds: of the phases before, for the answer's stats.
        """
        vlm, cache, start, began = self.vlm, self.cache, self.cache.next_position, time.perf_counter()
        token_ids, decoded, words = list[int](), list[Sequence[LayerCount]](), TextStream(vlm.tokenizer, vlm.stop_ids)
        try:
            next_logits, tokens = vlm.advance(prompt, cache, self.method, observe)
            prefilled = time.perf_counter()
            while len(token_ids) < max_new_tokens:
                token_ids.append(sampler(next_logits))
                if stream:
                    stream(words.add(token_ids[-1]))
                is_full = cache.next_position == vlm.config.max_positions
                if token_ids[-1] in vlm.stop_ids or len(token_ids) == max_new_tokens or is_full:
                    break
                newest = embedded_text(vlm.decoder, token_ids[-1:])
                next_logits, said = vlm.advance(newest, cache, self.method, observe)
                decoded.append(said.ran)
            if stream:
                stream(words.end())
            text, ended = spoken(vlm.tokenizer, token_ids, vlm.stop_ids).strip(), time.perf_counter()
        except BaseException:  # a broken callback, Ctrl-C, numbers that are not finite: the turn has not happened
            cache.trim(start)
            raise
        self._said, self.ran = token_ids[-1:], tokens.ran
        seconds = {**(seconds or {}), "prefill": prefilled - began, "decode": ended - prefilled}
        stats = turn_stats(self, prompt.is_visual, start, tokens.ran, decoded, len(token_ids), seconds)
        return Answer(text, token_ids, stats)

    def prepare(self, prompt: str, image: Any = None) -> Prompt:
        """The next turn's tokens after the last turn's newest one. Raises InputError where they find no positions."""
        is_first = self.cache.next_position == (len(self.seen.token_ids) if self.seen else 0)
        if is_first and self.seen:
            turn = self.seen.rest(prompt, image)
        else:
            turn = self.vlm.prepare(image, prompt, is_first, self.system if is_first else None)
        before = list(self._said)
        if self.vlm.parts.layout.turn_end is None:  # nothing stands between an answer and the next turn
            before = [token for token in before if token not in self.vlm.stop_ids]
        elif not (is_first or self.vlm.stop_ids.intersection(before) or self.vlm.turn_end_id is None):  # cut short
            before.append(self.vlm.turn_end_id)
        token_ids = np.concatenate([np.array(before, np.int64), turn.token_ids])  # (tokens,)
        self.cache.check_room(len(token_ids))
        return turn._replace(token_ids=token_ids, is_visual=np.pad(turn.is_visual, (len(before), 0)))
