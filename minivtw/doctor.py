"""What a model is, and what an image will take, before a long computation: python -m minivtw.doctor MODEL [IMAGE]"""

import warnings
from collections.abc import Iterator

import numpy as np

from .checkpoints.checkpoint import Headers, available_memory
from .checkpoints.files import read_fields
from .checkpoints.hub import embedded_folder, is_name, model_folder, model_name
from .checkpoints.layouts import folder_template
from .cli.options import Parser
from .cli.terminal import command, one_line
from .counting import cache_bytes, plain_run, prompt_flops, vision_flops
from .errors import counted, reading
from .loading import assembled
from .timing.rounds import machine
from .vlm import VLM

QUESTION = "What is in the image?"


def examined(model: str | None, max_tiles: int | None) -> tuple[VLM, Headers, list[str]]:
    """(a VLM whose weights are zero, its checkpoint's headers, a line for each thing that is unusual in its files)."""
    place = embedded_folder() if model is None else model
    with warnings.catch_warnings(record=True) as caught, reading(place):
        folder = model_folder(place)
        warnings.simplefilter("always")
        checkpoint = Headers(folder)
        vlm = assembled(read_fields(folder, "config.json"), checkpoint, max_tiles, is_name(place))
    unusual = [str(warning.message) for warning in caught]
    unusual += [f"{name} holds numbers that are not finite: it is damaged" for name in checkpoint.damaged()]
    if folder_template(folder) is None:
        unusual.append("no chat template: a conversation is written as the family's own layout says")
    if not vlm.stop_ids:
        unusual.append("no token is said to end an answer: it ends after --max-new-tokens")
    tokens, vocabulary = vlm.tokenizer.get_vocab_size(), vlm.config.vocabulary
    if tokens > vocabulary:
        unusual.append(f"the tokenizer has {tokens} tokens, the decoder {vocabulary}")
    return vlm, checkpoint, unusual


def product_error() -> float:
    """The largest error of BLAS's products, of one row and of many, as a share of the largest number.

    Some builds of BLAS compute wrongly on processors that are newer than they are; einsum multiplies without BLAS.
    """
    random = np.random.default_rng(0)
    x, weight = random.standard_normal((97, 193), np.float32), random.standard_normal((101, 193), np.float32)
    exact, errors = np.einsum("ti,oi->to", x, weight, dtype=np.float64), []
    for rows in (1, 97):
        for stored in (weight.T, weight.T.copy()):  # by outputs, as checkpoints do, and by inputs
            errors.append(np.abs(np.matmul(x[:rows], stored) - exact[:rows]).max())
    return float(np.max(errors) / np.abs(exact).max())


def product_line() -> tuple[str, bool]:
    """(what multiplies here, and whether it does so rightly; whether it does)."""
    error = product_error()
    if error < 1e-5:
        return f"{machine()}: products are right to {error:.0e} of the largest number", True
    return f"{machine()}: products are WRONG by {error:.0e} of the largest number; install another NumPy", False


def model_lines(vlm: VLM, checkpoint: Headers) -> Iterator[tuple[str, str]]:
    """What the model is made of, and what it weighs."""
    config, free = vlm.config, available_memory()
    stored = {shard.dtypes[name] for name, shard in checkpoint.shards.items()}
    needed = 4 * checkpoint.numbers
    yield "model", f"{model_name(vlm.folder)}, in {vlm.folder}"
    if vlm.parts.vision:
        tower = vlm.parts.vision.encoder.config
        patches = f"{tower.image_size} x {tower.image_size} pixels in patches of {tower.patch_size}"
        yield "tower", f"{tower.used_layers} layers of width {tower.width}; a tile is {patches}"
    sizes = f"{config.vocabulary:,} tokens, {config.max_positions:,} positions"
    yield "decoder", f"{config.layers} layers of width {config.width}, {sizes}"
    fits = "" if free is None else f", of {free / 1e9:.1f} that are free"
    fits += "; use --low-memory" if free is not None and needed > free else ""
    yield "weights", f"{checkpoint.numbers / 1e6:,.1f} million, stored as {', '.join(sorted(stored))}"
    yield "memory", f"{needed / 1e9:.2f} GB as float32{fits}"


def prompt_lines(vlm: VLM, image: str | None, question: str) -> Iterator[tuple[str, str]]:
    """What one image and one question become, and what they take if no token is spared."""
    prompt = vlm.prepare(image, question)
    tiles = 0 if prompt.tiles is None else len(prompt.tiles)
    visual, tokens = int(prompt.is_visual.sum()), len(prompt.token_ids)
    shown = prompt.token_ids[~prompt.is_visual].tolist()
    yield "prompt", repr(vlm.tokenizer.decode(shown, skip_special_tokens=False))
    if image:
        yield "image", f"{image}: {counted(tiles, 'tile')}, {visual:,} visual tokens"
    yield "tokens", f"{tokens:,} of {vlm.config.max_positions:,} positions"
    yield "cache", f"{cache_bytes(vlm.config, [tokens] * vlm.config.layers) / 1e6:,.1f} MB"
    sees = tiles * vision_flops(vlm.parts.vision.encoder.config) if vlm.parts.vision else 0
    reads = prompt_flops(vlm.config, plain_run(vlm.config, tokens))
    yield "work", f"{sees / 1e9:,.2f} GFLOP to see, {reads / 1e9:,.2f} to read the prompt"


def main(arguments: list[str]) -> None:
    options = Parser(prog="minivtw.doctor", description="Say what a model is and what an image will take.")
    options.add_argument("name", nargs="?", metavar="MODEL", help="a folder, or a name (default: the embedded model)")
    options.add_argument("image", nargs="?", metavar="IMAGE", help="an image in any format that Pillow reads")
    options.add_argument("--prompt", default=QUESTION, help=f"the question (default: {QUESTION})")
    options.add_argument("--max-tiles", type=int, metavar="N", help="cut an image into at most N tiles")
    chosen = options.parse_args(arguments)
    vlm, checkpoint, unusual = examined(chosen.name, chosen.max_tiles)
    lines = [*model_lines(vlm, checkpoint), *prompt_lines(vlm, chosen.image, chosen.prompt)]
    products, are_right = product_line()
    lines.append(("products", products))
    unusual += [] if are_right else ["this machine's matrix products are wrong, and so is every answer"]
    lines += [("unusual", line) for line in unusual or ["nothing"]]
    for name, text in lines:
        print(f"{name:8} {one_line(text)}")


if __name__ == "__main__":
    command(main)
