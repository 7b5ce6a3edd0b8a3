"""A language model that was made for text alone learns to see: SmolLM2-135M behind the embedded model's tower.

As LLaVA did with Vicuna (arXiv 2304.08485), in two steps.

*connector*: the two-layer connector learns on its own to turn a patch into the sum of the words that describe it, in
the language model's own embedding: `red` + `star` + a word for where it is. No forward pass of the language model is
needed, so this takes minutes, and the questions' words find their objects from the first step of what follows. Its loss
stays on beside that of the answers: without it the connector forgets within 400 steps where things are.

*graft*: connector and LoRA matrices (arXiv 2106.09685) in every linear of the decoder learn to answer; late, and
slowly, the tower learns too. Now and then the model reads plain text (chats.py) and is held to what the base model
predicts there, so that it stays the chat model it was.

No token is withdrawn or masked in training, and no inner layer has a loss of its own: what the deep layers do with the
image is their own doing. *taught* is an experiment that goes on from there with the image withdrawn half way; nothing
of it is in minivtw-smol.
"""

import json
import pathlib

import numpy as np
import torch
import torch.nn.functional as F
from clip import VisionModel, VisionSizes
from lessons import Group
from llama import Layout, RMSNorm, State, TextSizes, withdraw
from model import Connector, Llava, exported_tower
from passes import (
    answer_logits,
    answer_loss,
    compile_layers,
    divergence,
    run_layers,
    start_state,
    targets_and_weights,
)
from pool import COLOR_NAMES, KINDS, Pool
from runs import Run
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from tower import normalise, patch_targets
from turns import CHATML, TurnMaker, Turns
from world import SHAPES

from minivtw.checkpoints.hub import model_folder

EMBEDDED = pathlib.Path(__file__).parents[1] / "minivtw-tiny"
RANK, ALPHA = 16, 32  # of the LoRA matrices; what they add is scaled by ALPHA / RANK
BATCH = 4  # images, each with 14 questions
RATES = {"lora": 1e-3, "connector": 5e-4, "tower": 5e-5}
TOWER_FROM = 0.4  # of the time; until then the tower stays as it is
TAUGHT_LAYER = 14  # K of the experiment
TEXT_EVERY = 5  # steps
TEXT_ROWS = 2
WEIGHTS = {"answers": 1.0, "description": 0.5, "text": 5.0, "kl": 0.5}  # of the parts of the loss
GROUPS = (
    Group(17, ("attribute", "reading", "reading", "count", "count", "total count or attribute"), ("where", "count")),
    Group(21, ("existence", "existence", "relation", "relation", "relation"), ("simple existence",)),
    Group(36, ("caption", "choice", "tempting choice"), ("other caption",)),
)
BACKGROUND = "gray"  # the word for a patch that shows no object
ACROSS, DOWN, CENTER = ("left", "right"), ("top", "bottom"), "center"
PLACE_SHARE = 1.0  # of the words for places, beside the words for colour and shape


class LoraLinear(nn.Module):
    """A frozen linear in bfloat16, and beside it the product of two thin matrices that learn."""

    def __init__(self, weight: Tensor):
        super().__init__()
        rows, columns = weight.shape
        self.register_buffer("weight", weight.bfloat16(), persistent=False)
        self.lora_A = nn.Linear(columns, RANK, bias=False)
        self.lora_B = nn.Linear(RANK, rows, bias=False)
        nn.init.normal_(self.lora_A.weight, std=columns**-0.5)
        nn.init.zeros_(self.lora_B.weight)
        self.is_on = True

    def forward(self, hidden: Tensor) -> Tensor:
        frozen = F.linear(hidden, self.weight)
        return frozen + self.lora_B(self.lora_A(hidden)) * (ALPHA / RANK) if self.is_on else frozen


class Grafted(Llava):
    """The embedded model's tower, a connector and SmolLM2. What is frozen is a buffer and in no checkpoint."""

    def __init__(self, base: pathlib.Path):
        text = text_sizes(base)
        with torch.device("meta"):
            super().__init__(VisionSizes(), text)
        self.vision_tower["vision_model"] = VisionModel(self.vision)
        self.multi_modal_projector = Connector(self.vision, text)
        weights = {f"language_model.{name}": tensor for name, tensor in load_file(base / "model.safetensors").items()}
        words = "language_model.model.embed_tokens.weight"
        weights[words] = torch.cat([weights[words], weights[words].mean(0, keepdim=True)])  # the token <image>
        for name, module in list(self.language_model.named_modules(prefix="language_model")):
            if isinstance(module, nn.Linear):
                owner, _, own_name = name.rpartition(".")
                setattr(self.get_submodule(owner), own_name, LoraLinear(weights[f"{name}.weight"]))
            elif isinstance(module, (nn.Embedding, RMSNorm)):
                del module.weight
                module.register_buffer("weight", weights[f"{name}.weight"], persistent=False)

    def use_lora(self, is_on: bool) -> None:
        for module in self.modules():
            if isinstance(module, LoraLinear):
                module.is_on = is_on


def text_sizes(base: pathlib.Path) -> TextSizes:
    """Of the base model, with one token more: `<image>`."""
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    return TextSizes(**{name: config[name] for name in TextSizes._fields} | {"vocab_size": config["vocab_size"] + 1})


def tokenizer_with_image(base: pathlib.Path) -> Tokenizer:
    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    tokenizer.add_special_tokens(["<image>"])
    return tokenizer


def load_embedded_tower(model: Grafted) -> None:
    """The tower that minivtw-tiny learnt to see with."""
    model.tower.load_state_dict(exported_tower(EMBEDDED))


def word_embeddings(model: Grafted, tokenizer: Tokenizer, words: tuple[str, ...]) -> Tensor:
    """(words, width); each word as it stands inside a text, after a space; a figure has no space of its own."""
    ids = []
    for word in words:
        encoded = tokenizer.encode(word if word.isdigit() else f" {word}", add_special_tokens=False).ids
        assert len(encoded) == 1, f"{word} is not one token"
        ids += encoded
    return model.decoder.embed_tokens.weight[ids]


def described_patches(model: Grafted, tokenizer: Tokenizer, things: Tensor) -> tuple[Tensor, Tensor]:
    """things (batch, MOST_THINGS, 5) -> what each patch should become, (batch, patches, width), and its loss's weight.

    Colour + shape + PLACE_SHARE x (a mixture of `left` and `right` + one of `top` and `bottom`), and `center` where the
    object has its centre. Ten figures share half of the scenes, so their patches weigh more.
    """
    targets = patch_targets(things, model.vision.image_size // model.vision.patch_size)
    of = lambda *words: word_embeddings(model, tokenizer, words)
    kinds, colors = torch.cat([of(*KINDS), of(BACKGROUND)]), torch.cat([of(*COLOR_NAMES), torch.zeros_like(of("a"))])
    x, y = ((targets["place"][..., axis, None] + 1) / 2 for axis in (0, 1))  # (batch, patches, 1), 0 ... 1
    (left, right), (top, bottom) = of(*ACROSS), of(*DOWN)
    places = (1 - x) * left + x * right + (1 - y) * top + y * bottom + targets["center"][..., None] * of(CENTER)
    owned = targets["owned"]
    described = kinds[targets["kind"]] + colors[targets["color"]] + PLACE_SHARE * places * owned[..., None]
    is_digit = (targets["kind"] >= len(SHAPES)) & (targets["kind"] < len(KINDS))
    return described, 0.1 + 0.9 * owned + 2.0 * is_digit


def description_loss(visual: Tensor, described: Tensor, weight: Tensor) -> Tensor:
    """How far visual tokens (batch, patches, width) are from what they should be, as a share of its variance."""
    error = (visual - described).square().mean(-1) / described.var()
    return (error * weight).sum() / weight.sum()


def train_connector(run: Run, pool: Pool, pictures: int = 3000, batch: int = 64) -> None:
    """Fit the connector to `described_patches`; the tower's features of the pictures are made once."""
    base = model_folder("smollm2")
    model, tokenizer = Grafted(base), tokenizer_with_image(base)
    load_embedded_tower(model)
    rng = np.random.default_rng([7, run.worker])
    with torch.no_grad():
        sampled = [pool.sample(rng, batch) for _ in range(pictures // batch)]
        features = torch.cat([model.tower(normalise(torch.from_numpy(pixels))) for pixels, _ in sampled])
        described, weights = described_patches(
            model, tokenizer, torch.from_numpy(np.concatenate([t for _, t in sampled]))
        )
    optimiser = torch.optim.AdamW(model.multi_modal_projector.parameters(), lr=2e-3, weight_decay=0.01)
    optimiser.param_groups[0]["peak"] = 2e-3
    while run.progress < 1:
        rows = torch.from_numpy(rng.integers(len(features), size=batch))
        loss = description_loss(model.multi_modal_projector(features[rows]), described[rows], weights[rows])
        run.update(loss, model.multi_modal_projector, [optimiser])
        if run.step % 100 == 0:
            run.log(f"loss {loss.item():.4f}")
    run.save(model.multi_modal_projector, [optimiser])


def text_loss(model: Grafted, rows: np.ndarray) -> Tensor:
    """KL(base || model) of next-token distributions on plain text, token ids (rows, tokens); mean over all tokens."""
    ids = torch.from_numpy(rows.astype(np.int64))
    layout, positions = Layout(ids.shape[1], ()), torch.arange(ids.shape[1])

    def log_probabilities() -> Tensor:
        start = model.decoder.start(model.decoder.embed_tokens(ids), positions, layout)
        return model.logits(run_layers(model, start, 0, model.text.num_hidden_layers).hidden[:, 1:]).log_softmax(-1)

    with torch.no_grad():
        model.use_lora(False)
        wanted = log_probabilities()
        model.use_lora(True)
    return F.kl_div(log_probabilities().flatten(0, 1), wanted.flatten(0, 1), log_target=True, reduction="batchmean")


class Marks:
    """How often each lesson was answered rightly, every token of it: on pictures that are met for the first time."""

    def __init__(self):
        self.names = [name for group in GROUPS for name in group.lessons]
        self.right, self.asked = np.zeros(len(self.names)), 0

    def add(self, logits: Tensor, targets: Tensor, turns: Turns) -> None:
        behind = turns.layout.prefix
        is_right = torch.ones(turns.weights[:, behind:].shape, dtype=torch.bool)
        is_right[torch.from_numpy(turns.weights[:, behind:] > 0)] = logits.argmax(-1) == targets
        parts = is_right.split([count * length for count, length in turns.layout.turns], dim=1)
        rights = [part.unflatten(1, shape).all(-1) for part, shape in zip(parts, turns.layout.turns)]
        self.right += torch.cat(rights, dim=1).sum(0).numpy()
        self.asked += len(is_right)

    def report(self) -> str:
        """One line; starts afresh."""
        shares = {name: [] for name in self.names}
        for name, right in zip(self.names, self.right):
            shares[name].append(100 * right / self.asked)
        self.__init__()
        return "  ".join(f"{name} {np.mean(each):.0f}" for name, each in shares.items())


def read_whole(model: Grafted, start: State, turns: Turns, visual: slice) -> tuple[dict[str, Tensor], Tensor]:
    """The losses of the answers by name, and their logits (answer tokens, vocabulary)."""
    logits = answer_logits(model, run_layers(model, start, 0, model.text.num_hidden_layers), turns)
    return {"answers": answer_loss(logits, *targets_and_weights(turns))}, logits


def read_withdrawn(model: Grafted, start: State, turns: Turns, visual: slice) -> tuple[dict[str, Tensor], Tensor]:
    """The same with the visual tokens withdrawn before TAUGHT_LAYER, drawn towards what the whole reading says."""
    last, at_layer = model.text.num_hidden_layers, run_layers(model, start, 0, TAUGHT_LAYER)
    with torch.no_grad():
        whole = answer_logits(model, run_layers(model, at_layer, TAUGHT_LAYER, last), turns)
    logits = answer_logits(model, run_layers(model, withdraw(at_layer, visual), TAUGHT_LAYER, last), turns)
    losses = {"answers": answer_loss(logits, *targets_and_weights(turns)), "kl": divergence(logits, whole)}
    return losses, logits


def train_graft(run: Run, pool: Pool, taught: bool = False) -> None:
    """Train until the time is up. No token is ever withdrawn but in `taught`, which goes on from there."""
    base, folder = model_folder("smollm2"), run.checkpoint.parent
    model, tokenizer = Grafted(base), tokenizer_with_image(base)
    if taught:
        model.load_state_dict(torch.load(folder / "graft.pt", weights_only=True)["model"])
    else:
        load_embedded_tower(model)
        model.multi_modal_projector.load_state_dict(torch.load(folder / "connector.pt", weights_only=True)["model"])
    parts = {
        "lora": [p for name, p in model.named_parameters() if "lora_" in name],
        "connector": list(model.multi_modal_projector.parameters()),
        "tower": list(model.tower.parameters()),
    }
    groups = [{"params": parts[name], "lr": rate, "peak": rate} for name, rate in RATES.items()]
    optimisers = [torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0.0)]
    run.resume(model, optimisers)
    run.step = max(run.step, 60 if taught else 0)  # most of the warm-up is for matrices that know nothing
    maker, texts = TurnMaker(tokenizer, CHATML, GROUPS), np.load(folder / "chats.npy")
    compile_layers()
    read = read_withdrawn if taught else read_whole
    rng, marks, sums = np.random.default_rng([run.step, 8, run.worker]), Marks(), {}
    while run.progress < 1:
        model.tower.requires_grad_(run.progress >= TOWER_FROM)
        pixels, things = pool.sample(rng, BATCH // run.workers)
        turns = maker.lessons(things, rng)
        features = model.tower(normalise(torch.from_numpy(pixels)))
        visual = maker.prefix.visual
        losses, logits = read(model, start_state(model, features, turns, visual), turns, visual)
        described = described_patches(model, tokenizer, torch.from_numpy(things))
        losses["description"] = description_loss(model.multi_modal_projector(features), *described)
        if run.step % TEXT_EVERY == 0:
            losses["text"] = text_loss(model, texts[rng.integers(len(texts), size=TEXT_ROWS)])
        run.update(sum(WEIGHTS[name] * loss for name, loss in losses.items()), model, optimisers)
        marks.add(logits, targets_and_weights(turns)[0], turns)
        for name, loss in losses.items():
            sums.setdefault(name, []).append(loss.item())
        if run.step % 25 == 0:
            run.log("  ".join(f"{name} {np.mean(each):.3f}" for name, each in sums.items()) + f"  {marks.report()}")
            sums = {}
    run.save(model, optimisers)
