"""Where `python -m minivtw.step` stops on the way from an image to the next token, and what is to be seen there.

The table of chapter 1 and the breakpoints of an editor are made from this list (docs/stepping.py).
"""

import ast
import importlib
import inspect
import textwrap
from typing import Any, NamedTuple

MAP = ("image", "prompt", "patches", "tower", "connector", "layers", "logits", "token")


def is_docstring(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


class Stop(NamedTuple):
    """A line of the package, named by its function and by what it begins with, and what a reader may look at there."""

    place: str  # of MAP
    title: str
    function: str  # in a file of the package, such as model/vision.py:patchify
    statement: str  # what the line begins with; "" for the first one of the function
    says: str
    look: tuple[str, ...]  # expressions worth printing
    when: str = ""  # a condition there; {layer} stands for the layer before which the image leaves
    needs_image: bool = False

    def code(self) -> Any:
        """The function that is stopped in."""
        path, name = self.function.split(":")
        found: Any = importlib.import_module("minivtw." + path.removesuffix(".py").replace("/", "."))
        for part in name.split("."):
            found = getattr(found, part)
        return inspect.unwrap(found)

    def line(self) -> int:
        """The line's number in its file."""
        lines, first = inspect.getsourcelines(self.code())
        if self.statement:
            return first + next(i for i, line in enumerate(lines) if line.strip().startswith(self.statement))
        function = ast.parse(textwrap.dedent("".join(lines))).body[0]
        statements = [one for one in ast.walk(function) if isinstance(one, ast.stmt) and one is not function]
        return first - 1 + min(one.lineno for one in statements if not is_docstring(one))

    def breakpoint(self, layer: int) -> str:
        """The stop as pdb's `b` takes it: file, line, and the condition."""
        condition = self.when.format(layer=layer)
        return f"minivtw/{self.function.split(':')[0]}:{self.line()}" + (f", {condition}" if condition else "")


STOPS = (
    Stop(
        "image", "An image file", "inputs/opening.py:open_image", "",
        "The file's bytes become an upright RGB image, whatever the format. What is broken, empty or too large ends here, "
        "in one line.",
        ("source",), needs_image=True,
    ),
    Stop(
        "prompt", "Words and places", "vlm.py:VLM.prepare", "token_ids = encode_words(",
        "An image has become tiles of pixels, and stands in the text as one placeholder per visual token. Now the text "
        "becomes token ids.",
        ("turn", "tiled"),
    ),
    Stop(
        "patches", "Pixels to patches", "model/vision.py:patchify", "",
        "A tile is cut into square patches, row by row, each laid out as one row of numbers. A single matrix product will "
        "embed them all: the convolution whose stride is its kernel.",
        ("pixels.shape", "patch_size"), needs_image=True,
    ),
    Stop(
        "tower", "The vision tower", "model/vision.py:encode", "hidden = vision_layer(",
        "One of the layers in which every patch sees every other. A class token, if the tower has one, stands in front of "
        "the patches.",
        ("hidden.shape", "config.heads"), needs_image=True, when="index == 0",
    ),
    Stop(
        "connector", "Visual tokens", "vlm.py:VLM.embed", "hidden[prompt.is_visual]",
        "The connector has made each patch's feature as wide as the decoder. The features take their places between the "
        "words: from here on, an image is a run of tokens like any other.",
        ("visual.shape", "hidden.shape", "np.count_nonzero(prompt.is_visual)"), needs_image=True,
    ),
    Stop(
        "layers", "The decoder's loop", "model/decoder.py:forward", "if method:",
        "Before each layer the method is asked which tokens go on; without a method all do, through every layer. Visual "
        "Tokens Withdrawal answers, before its layer K: the text alone (type `s` four times to be inside a method).",
        ("index", "len(tokens)", "np.count_nonzero(tokens.is_visual)"), when="index == {layer}",
    ),
    Stop(
        "layers", "A decoder layer", "model/decoder.py:decoder_layer", "queries, keys, values = project(",
        "The same code runs for any number of tokens: queries, keys and values of those that are here, attention over what "
        "the cache holds, then the feed-forward.",
        ("tokens.hidden.shape", "tokens.positions[:6]"), when="index == {layer}",
    ),
    Stop(
        "layers", "The cache", "model/decoder.py:decoder_layer", "keys, values = cache.append(",
        "Each layer keeps the keys and values of the tokens that reached it, with the positions that they had from the "
        "start. Tokens that left before this layer never come here.",
        ("keys.shape", "tokens.positions", "cache"), when="index == {layer}",
    ),
    Stop(
        "layers", "Attention", "model/decoder.py:decoder_layer", "context = attention(",
        "Several query heads share the keys and values of one key head. Each query sees the keys up to its own place: the "
        "causal mask is a count, `sees`.",
        ("queries.shape", "keys.shape", "sees"), when="index == {layer}",
    ),
    Stop(
        "layers", "The feed-forward", "model/decoder.py:decoder_layer", "hidden = after_attention(",
        "What attention found is added to each token, then SwiGLU, on each token alone. Most of a layer's operations are "
        "here, so every token that has left saves most here.",
        ("context.shape", "layer.gate_up.shape"), when="index == {layer}",
    ),
    Stop(
        "logits", "Scores for the next token", "model/decoder.py:logits", "head = ",
        "After the last layer, the last token's hidden state is compared with every token of the vocabulary. What an "
        "image says has reached it through attention, in the layers before the image left.",
        ("hidden.shape", "decoder.embedding.shape"),
    ),
    Stop(
        "token", "The next token", "model/sampling.py:Sampler.__call__", "",
        "Greedy decoding takes the highest score. Until here it was prefill: one pass for the whole prompt.",
        ("logits.shape", "int(logits.argmax())"),
    ),
    Stop(
        "token", "Decode", "model/decoder.py:forward", "if method:",
        "The token that was said is fed back, alone, through the same loop. What it attends to is in the cache: the image "
        "in the layers before the withdrawal, text alone after it.",
        ("len(tokens)", "tokens.cache"), when="index == 0 and len(tokens) == 1",
    ),
)  # fmt: skip
