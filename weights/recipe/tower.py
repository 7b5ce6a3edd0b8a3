"""Stage one: the vision tower learns on its own what stands where, from the scenes that its pictures were drawn from.

Every patch answers for its *owner*, the object whose circle covers it or comes closest: which kind, which colour, where
its centre lies, how large it is, and how many objects have their centres further left and further up. So each visual
token says what and where in a form that a linear layer can read, and the decoder need not learn to see.
"""

import numpy as np
import torch
import torch.nn.functional as F
from clip import VisionModel, VisionSizes
from model import initialise
from optimiser import build_optimisers
from pool import COLOR_NAMES, KINDS, MOST_THINGS, Pool
from runs import Run
from torch import Tensor, nn
from world import CANVAS, SHAPES

MEAN, STD = 127.5, 64.0  # of a channel, in 0 ... 255; the same for all three
BATCH = 64
REACH = 10.0  # pixels of the canvas by which a patch's middle may miss an owner's circle
# The logits that a patch gives: kind, colour, rank from the left, rank from the top; then is-centre, and x, y, radius.
SPLIT = (len(KINDS) + 1, len(COLOR_NAMES) + 1, MOST_THINGS, MOST_THINGS, 1, 3)


def normalise(pixels: Tensor) -> Tensor:
    """(batch, side, side, 3) uint8 -> (batch, 3, side, side) float32 around 0."""
    return ((pixels.float() - MEAN) / STD).permute(0, 3, 1, 2).contiguous()


class Targets(dict):
    """Per patch: kind, color, left_rank, top_rank (class numbers), center (0 or 1), place (x, y, radius), owned."""


def patch_targets(things: Tensor, grid: int) -> Targets:
    """things (batch, MOST_THINGS, 5) -> what each of the grid x grid patches should say, row by row."""
    kind, color, x, y, radius = things.unbind(-1)  # each (batch, things)
    missing = kind < 0
    side = CANVAS / grid
    middles = (torch.arange(grid) + 0.5) * side
    rows, columns = middles.repeat_interleave(grid), middles.repeat(grid)  # each (patches,)
    right, down = x[:, None] - columns[:, None], y[:, None] - rows[:, None]  # each (batch, patches, things)
    gap = (torch.hypot(right, down) - radius[:, None]).masked_fill(missing[:, None], torch.inf)
    nearest, owner = gap.min(-1)  # each (batch, patches)
    owned = nearest < REACH

    def of_owner(values: Tensor) -> Tensor:
        return values.gather(1, owner)

    left_rank = ((x[:, None] < x[:, :, None]) & ~missing[:, None]).sum(-1)  # (batch, things)
    top_rank = ((y[:, None] < y[:, :, None]) & ~missing[:, None]).sum(-1)
    center = owned & (of_owner(x) - columns).abs().le(side / 2) & (of_owner(y) - rows).abs().le(side / 2)
    place = torch.stack([of_owner(x) / (CANVAS / 2) - 1, of_owner(y) / (CANVAS / 2) - 1, of_owner(radius) / 32 - 1], -1)
    return Targets(
        kind=torch.where(owned, of_owner(kind), len(KINDS)).long(),
        color=torch.where(owned, of_owner(color), len(COLOR_NAMES)).long(),
        left_rank=of_owner(left_rank),
        top_rank=of_owner(top_rank),
        center=center.float(),
        place=place,
        owned=owned.float(),
    )


class DenseTower(nn.Module):
    """The tower with the one linear layer that reads its patches; only the tower is kept."""

    def __init__(self, sizes: VisionSizes):
        super().__init__()
        self.tower = VisionModel(sizes)
        self.readout = nn.Linear(sizes.hidden_size, sum(SPLIT))
        self.apply(initialise)

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        return self.readout(self.tower(pixels)).split(SPLIT, dim=-1)


def dense_loss(answers: tuple[Tensor, ...], targets: Targets) -> Tensor:
    """The weighted sum of what the patches got wrong. Digits count twice: ten figures share half of the scenes."""
    kind, color, left_rank, top_rank, center, place = answers
    owned, is_center = targets["owned"], targets["center"]
    is_digit = (targets["kind"] >= len(SHAPES)) & (targets["kind"] < len(KINDS))
    weight = 0.3 + owned * (0.7 + is_digit) + is_center * (2 + 3 * is_digit)  # (batch, patches)

    def classes(logits: Tensor, target: Tensor, weight: Tensor) -> Tensor:
        losses = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none")
        return (losses * weight.flatten()).sum() / weight.sum()

    places = F.smooth_l1_loss(place, targets["place"], beta=0.1, reduction="none").sum(-1)
    return (
        classes(kind, targets["kind"], weight)
        + 0.5 * classes(color, targets["color"], weight)
        + 0.2 * classes(left_rank, targets["left_rank"], owned + is_center)
        + 0.2 * classes(top_rank, targets["top_rank"], owned + is_center)
        + F.binary_cross_entropy_with_logits(center[..., 0], is_center)
        + (places * owned).sum() / owned.sum()
    )


@torch.no_grad()
def measure(model: DenseTower, pixels: Tensor, targets: Targets) -> str:
    """How often the patches in which objects have their centres are right, as one line."""
    answers = zip(*map(model, pixels.split(BATCH)))
    kind, color, left_rank, top_rank, center, place = (torch.cat(parts) for parts in answers)
    at = targets["center"] > 0
    is_digit = at & (targets["kind"] >= len(SHAPES))
    share = lambda logits, name, where: (logits.argmax(-1) == targets[name])[where].float().mean().item()
    return (
        f"shape {share(kind, 'kind', at & ~is_digit):.3f}  digit {share(kind, 'kind', is_digit):.3f}  "
        f"color {share(color, 'color', at):.3f}  left rank {share(left_rank, 'left_rank', at):.3f}  "
        f"top rank {share(top_rank, 'top_rank', at):.3f}  every patch {share(kind, 'kind', at | ~at):.3f}  "
        f"center {((center[..., 0] > 0) == at).all(1).float().mean():.3f}  "
        f"place off by {(place - targets['place'])[at][:, :2].abs().mean() * CANVAS / 2:.1f} px"
    )


def train_tower(run: Run, pool: Pool) -> None:
    """Train until the time is up. The last 512 pictures of the first chunk are held out for measuring."""
    sizes = VisionSizes()
    grid = sizes.image_size // sizes.patch_size
    model = DenseTower(sizes)
    optimisers = build_optimisers(model, muon=0.01, adam=1e-3)
    run.resume(model, optimisers)
    step_loss = torch.compile(lambda pixels, targets: dense_loss(model(pixels), targets), dynamic=False)
    held_out = normalise(torch.from_numpy(pool.pixels[0][-512:]))
    held_out_targets = patch_targets(torch.from_numpy(pool.things[0][-512:]), grid)
    rng = np.random.default_rng([run.step, 3, run.worker])
    while run.progress < 1:
        if run.step % 100 == 0:
            pool.refresh()
        pixels, things = pool.sample(rng, BATCH // run.workers)
        targets = patch_targets(torch.from_numpy(things), grid)
        loss = step_loss(normalise(torch.from_numpy(pixels)), targets)
        run.update(loss, model, optimisers)
        if run.step % 50 == 0:
            run.log(f"loss {loss.item():.3f}")
        if run.step % 300 == 0 or run.progress >= 1:
            run.log(measure(model, held_out, held_out_targets))
    run.save(model, optimisers)
