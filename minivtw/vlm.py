"""What a user holds: load a model, ask it about a picture.

    vlm = minivtw.load()
    result = vlm.answer("scene.png", "What color is the star?")
    print(result.text, result.stats["flops"])
"""

import time
from typing import NamedTuple

import numpy as np

from .counting import cache_bytes, decode_flops, prefill_flops
from .model.cache import KVCache
from .checkpoints.checkpoint import Checkpoint, read_json
from .model.decoder import logits
from .errors import InputError
from .checkpoints import family
from .checkpoints.fields import Fields
from .checkpoints.hub import embedded_folder, model_folder, model_name, tokenizer_folder
from .inputs.images import open_image
from .inputs.prompts import Prompt, TextStream, check_vocabulary, encode, expand_marks, load_tokenizer, refuse_marks
from .model.sampling import Sampler
from .search import forward_adaptive
from .model.vision import encode as encode_image
from .methods import Withdrawal, check, forward_with, staying


class Result(NamedTuple):
    """An answer. `token_ids` includes the end token if the model came to it; `stats` is what `--json` prints."""

    text: str
    token_ids: list[int]
    stats: dict


def load(model=None, low_memory=False, max_tiles=None):
    """A model folder, or a name on the Hugging Face hub -> `VLM`; without one, the embedded model.

    low_memory: hold one layer at a time, read from the files at every use; max_tiles: of an image, None for as many
    as the model takes. Raises InputError for a model that is not there or does not fit.
    """
    started = time.perf_counter()
    if max_tiles is not None and max_tiles < 1:
        raise InputError(f"max-tiles must be 1 or more, not {max_tiles}")
    folder = embedded_folder() if model is None else model_folder(model)
    fields = Fields(read_json(folder, "config.json"), f"{folder}/config.json")
    parts = family(fields).load(fields, folder, Checkpoint(folder, low_memory))
    tokenizer = load_tokenizer(tokenizer_folder(folder, parts.tokenizer), parts.extra_tokens)
    stop_ids = end_tokens(folder, fields) | {tokenizer.token_to_id(parts.layout.turn_end or "")} - {None}
    return VLM(folder, parts, tokenizer, stop_ids, time.perf_counter() - started, max_tiles)


def end_tokens(folder, fields):
    """The token ids that end an answer, from generation_config.json or else config.json."""
    if (folder / "generation_config.json").exists():
        generation = read_json(folder, "generation_config.json").get("eos_token_id")
    else:
        generation = None
    ids = generation if generation is not None else fields.raw("eos_token_id", [])
    ids = ids if isinstance(ids, list) else [ids]
    if not all(type(token) is int for token in ids):
        raise InputError(f"eos_token_id of {folder} must be a token id or a list of them, not {ids!r}")
    return frozenset(ids)


def stored_layer(folder, layers):
    """The withdrawal layer stored with a model by `minivtw.calibrate`; half the depth until one is stored."""
    if not (folder / "withdrawal.json").exists():
        return layers // 2
    fields = Fields(read_json(folder, "withdrawal.json"), f"{folder}/withdrawal.json")
    layer = fields.index("withdraw_layer")
    if not 0 <= layer <= layers:
        raise fields.error(f"says withdraw_layer {layer}, but the model has {layers} layers")
    return layer


class VLM:
    """A vision-language model: parts, tokenizer, and the steps from a question to its answer."""

    def __init__(self, folder, parts, tokenizer, stop_ids, load_seconds, max_tiles=None):
        self.folder = folder
        self.parts = parts
        self.decoder = parts.decoder
        self.config = parts.decoder.config
        self.tokenizer = tokenizer
        self.stop_ids = stop_ids
        self.load_seconds = load_seconds
        self.max_tiles = max_tiles
        self.turn_end_id = tokenizer.token_to_id(parts.layout.turn_end or "")  # closes an answer that was cut short
        self.image_token = tokenizer.token_to_id(parts.vision.image_token) if parts.vision else None
        if parts.vision and parts.vision.image_token_id not in (None, self.image_token):
            raise InputError(f"the tokenizer and the config of {folder} disagree on the token of <image>")

    def answer(self, image, prompt, withdraw="auto", **options):
        """Answer one question about an image: a path, a Pillow image, a list of these, or None.

        withdraw: "auto" (the layer stored with the model), "adaptive" (the layer where this prompt's attention has left
        the image), None (never), a layer, or a `Withdrawal`; the other options are those of `Chat.ask`.
        Returns a `Result`; raises InputError.
        """
        return Chat(self, withdraw).ask(image, prompt, **options)

    def withdrawal(self, withdraw):
        """What the argument `withdraw` means for this model, as a checked `Withdrawal`; "adaptive" is decided in prefill."""
        if withdraw == "adaptive":
            return Withdrawal("adaptive")
        if withdraw == "auto":
            withdraw = stored_layer(self.folder, self.config.layers)
        if not isinstance(withdraw, Withdrawal):
            withdraw = Withdrawal(withdraw)
        return check(withdraw, self.config.layers)

    def prepare(self, images, text, is_first=True, system=None):
        """Images and a question -> `Prompt`: the chat around them, and each image's tiles and visual tokens.

        system: a message before the first turn, None for what the model's own layout puts there.
        """
        images = [] if images is None else images if isinstance(images, list | tuple) else [images]
        if images and not self.parts.vision:
            raise InputError(f"{self.folder} is a language model that sees nothing; ask it without an image")
        refuse_marks(f"{system or ''}\n{text}", self.tokenizer)
        turn = self.parts.layout.turn(text, len(images), is_first, system)
        vision, tiles, expansions = self.parts.vision, None, []
        if images:
            tiles, expansions = vision.tile([open_image(image) for image in images], self.max_tiles)
        token_ids = encode(self.tokenizer, expand_marks(turn, expansions), opens=is_first)
        is_visual = token_ids == self.image_token
        if is_visual.sum() != sum(expansion.count(vision.image_token) for expansion in expansions):
            raise InputError(f"the prompt says {vision.image_token}, which stands for an image and cannot be said")
        check_vocabulary(token_ids[~is_visual], self.config.vocabulary)
        return Prompt(token_ids, is_visual, tiles)

    def embed(self, prompt, observe=None):
        """The decoder's input, (tokens, width): embedded text, and what it sees at the visual tokens' places."""
        # A visual token's own embedding is never used, and some models have none: any row stands in for it.
        hidden = self.decoder.embedding[np.where(prompt.is_visual, 0, prompt.token_ids)]  # (tokens, width)
        if prompt.tiles is not None:
            if observe:
                observe("vision.pixels", prompt.tiles)
            vision = self.parts.vision
            visual = np.concatenate([vision.connect(encode_image(vision.encoder, tile, observe)) for tile in prompt.tiles])
            hidden[prompt.is_visual] = visual  # (visual tokens, width)
            if observe:
                observe("connector.output", visual)
        if observe:
            observe("decoder.embeddings", hidden)
        return hidden

    def advance(self, hidden, is_visual, cache, withdrawal, observe=None):
        """Carry new tokens through the decoder: the prompt (prefill), or one token fed back (decode).

        hidden: (tokens, width); is_visual: (tokens,) booleans. Returns the last token's logits, (vocabulary,).
        """
        positions = cache.claim(len(hidden))  # (tokens,)
        stays = staying(is_visual, withdrawal)  # (tokens,)
        hidden = forward_with(self.decoder, hidden, positions, cache, withdrawal, stays, observe)
        return self._last_logits(hidden, observe)

    def advance_adaptive(self, hidden, is_visual, cache, observe=None):
        """`advance` for a prompt with an image, deciding on the way where the visual tokens leave.

        Returns the last token's logits, (vocabulary,), and the layer, None if they stay to the end.
        """
        positions = cache.claim(len(hidden))  # (tokens,)
        hidden, layer = forward_adaptive(self.decoder, hidden, positions, cache, is_visual, observe)
        return self._last_logits(hidden, observe), layer

    def _last_logits(self, hidden, observe):
        last = logits(self.decoder, hidden[-1:])[0]  # (vocabulary,)
        if observe:
            observe("decoder.logits", last)
        return last


class Chat:
    """A conversation about one or more images. The cache stays between turns: deep layers keep its text only."""

    def __init__(self, vlm, withdraw="auto"):
        self.vlm = vlm
        self.withdrawal = vlm.withdrawal(withdraw)
        self.cache = KVCache(vlm.config.layers)
        self._said = np.empty(0, np.int64)  # the newest token, which no layer has seen yet

    def ask(
        self,
        image,
        prompt,
        max_new_tokens=128,
        temperature=0.0,
        top_k=0,
        top_p=1.0,
        seed=0,
        observe=None,
        stream=None,
    ):
        """The next turn: a question, and a new image (a path, a Pillow image, a list of these) or None.

        temperature 0 is greedy; observe(name, array) sees every intermediate array; stream(text) gets the answer
        piece by piece. Returns a `Result`; raises InputError, and then the conversation is as it was.
        """
        vlm = self.vlm
        sampler = Sampler(temperature, top_k, top_p, seed)
        if max_new_tokens < 0:
            raise InputError(f"max-new-tokens must be 0 or more, not {max_new_tokens}")
        clock = Clock(vlm.load_seconds)
        asked = self._continued(vlm.prepare(image, prompt, is_first=self.cache.next_position == 0))
        hidden = vlm.embed(asked, observe)  # (tokens, width)
        clock.stop("vision")
        return self.respond(asked, hidden, sampler, max_new_tokens, clock, observe, stream)

    def respond(self, asked, hidden, sampler, max_new_tokens, clock, observe=None, stream=None):
        """Answer a `Prompt` that is embedded already, hidden (tokens, width): prefill, then decode."""
        before = self.cache.tokens_per_layer
        if self.withdrawal.layer == "adaptive" and asked.is_visual.any():  # the first image decides for the conversation
            next_logits, layer = self.vlm.advance_adaptive(hidden, asked.is_visual, self.cache, observe)
            self.withdrawal = Withdrawal(layer)
        else:
            next_logits = self.vlm.advance(hidden, asked.is_visual, self.cache, self.withdrawal, observe)  # (vocabulary,)
        clock.stop("prefill")
        after = self.cache.tokens_per_layer
        token_ids, text = self._decode(next_logits, sampler, max_new_tokens, observe, stream)
        clock.stop("decode")
        return Result(text, token_ids, self._stats(asked, token_ids, before, after, clock.seconds))

    def _continued(self, prompt):
        """The prompt behind the last turn's newest token, if they find room in the model's positions."""
        used, room = self.cache.next_position, self.vlm.config.max_positions
        before = self._said.tolist()
        if self.vlm.parts.layout.turn_end is None:  # nothing closes an answer in this layout
            before = [token for token in before if token not in self.vlm.stop_ids]
        elif used and self.vlm.turn_end_id is not None and not self.vlm.stop_ids.intersection(before):  # it was cut short
            before.append(self.vlm.turn_end_id)
        token_ids = np.concatenate([np.array(before, np.int64), prompt.token_ids])  # (tokens,)
        if used + len(token_ids) > room:
            raise InputError(f"the prompt ends at token {used + len(token_ids)}; the model has {room} positions")
        is_visual = np.concatenate([np.zeros(len(before), bool), prompt.is_visual])
        return Prompt(token_ids, is_visual, prompt.tiles)

    def _decode(self, next_logits, sampler, max_new_tokens, observe, stream):
        """Token by token until the answer ends, is long enough, or no position is left. Returns (token_ids, text)."""
        vlm, cache = self.vlm, self.cache
        token_ids, words = [], TextStream(vlm.tokenizer)
        while len(token_ids) < max_new_tokens:
            token_ids.append(sampler(next_logits))
            if stream:
                stream(words.add(token_ids[-1]))
            is_full = cache.next_position == vlm.config.max_positions
            if token_ids[-1] in vlm.stop_ids or len(token_ids) == max_new_tokens or is_full:
                break
            hidden = vlm.decoder.embedding[token_ids[-1:]]  # (1, width): decoded tokens are text, they pass every layer
            next_logits = vlm.advance(hidden, np.zeros(1, bool), cache, self.withdrawal, observe)
        self._said = np.array(token_ids[-1:], np.int64)
        return token_ids, vlm.tokenizer.decode(token_ids).strip()

    def _stats(self, prompt, token_ids, before, after, seconds):
        """What the turn took: the object that `--json` prints beside the answer."""
        config, cache = self.vlm.config, self.cache
        tokens, visual = len(prompt.token_ids), int(prompt.is_visual.sum())
        fed_back = max(len(token_ids) - 1, 0)
        start = cache.next_position - fed_back - tokens  # where the turn began
        layer = self.withdrawal.layer if cache.next_position > min(cache.tokens_per_layer) or visual else None
        return {
            "model": model_name(self.vlm.folder),
            "layers": config.layers,
            "withdraw_layer": layer,
            "tokens": {"visual": visual, "text": tokens - visual, "generated": len(token_ids)},
            "cache": {
                "tokens_per_layer": cache.tokens_per_layer,
                "bytes": cache.nbytes,
                "bytes_without_withdrawal": cache_bytes(config, [cache.next_position] * config.layers),
            },
            "flops": {
                "prefill": prefill_flops(config, tokens, tokens - visual, layer, before),
                "prefill_without_withdrawal": prefill_flops(config, tokens, cached=[start] * config.layers),
                "decode": decode_flops(config, after, fed_back),
            },
            "seconds": {name: round(value, 4) for name, value in seconds.items()},
        }


class Clock:
    """Seconds of each phase, one after the other."""

    def __init__(self, load_seconds):
        self.seconds = {"load": load_seconds}
        self._last = time.perf_counter()

    def stop(self, phase):
        """The phase that ends now began when the one before it ended."""
        now = time.perf_counter()
        self.seconds[phase] = now - self._last
        self._last = now
