"""Muon for the weight matrices inside the blocks, AdamW for everything else, and a schedule keyed to the clock.

Muon (Jordan et al., 2024) replaces the momentum of a matrix by the nearest orthogonal one, so that a step moves every
direction of the matrix by the same amount. On these small models it takes about half the steps that AdamW takes.
"""

import torch
from torch import Tensor, nn

# Products in bfloat16 are 1.6 times as fast where the processor has them, and many times slower where it has not.
HAS_BFLOAT16 = torch.cpu.get_capabilities().get("avx512_bf16", False)
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # the quintic whose repetition drives every singular value towards 1


def orthogonalise(matrices: Tensor) -> Tensor:
    """The nearest (semi-)orthogonal matrices, approximately; (count, rows, columns) with rows <= columns.

    In bfloat16 where the processor has it, which is as good here and twice as fast.
    """
    first, third, fifth = NEWTON_SCHULZ
    matrices = matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-7)
    matrices = matrices.bfloat16() if HAS_BFLOAT16 else matrices
    for _ in range(5):
        square = matrices @ matrices.mT  # (count, rows, rows)
        matrices = first * matrices + (third * square + fifth * square @ square) @ matrices
    return matrices.float()


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised; matrices of the same shape, either way up, are handled in one batch."""

    def __init__(self, parameters: list, lr: float, momentum: float = 0.95, weight_decay: float = 0.1):
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            same_shape: dict[tuple[int, ...], list[nn.Parameter]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    same_shape.setdefault(tuple(sorted(parameter.shape)), []).append(parameter)
            for parameters in same_shape.values():
                self._step_together(parameters, group)

    def _step_together(self, parameters: list[nn.Parameter], group: dict) -> None:
        momenta = []
        for parameter in parameters:
            state = self.state[parameter]
            if not state:
                state["momentum"] = torch.zeros_like(parameter)
            state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
            ahead = parameter.grad.lerp(state["momentum"], group["momentum"])  # Nesterov's look ahead
            momenta.append(ahead if ahead.shape[0] <= ahead.shape[1] else ahead.T)
        for parameter, update in zip(parameters, orthogonalise(torch.stack(momenta))):
            rows, columns = parameter.shape
            update = update if rows <= columns else update.T
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            parameter.add_(update, alpha=-group["lr"] * max(1, rows / columns) ** 0.5)


def build_optimisers(model: nn.Module, muon: float, adam: float) -> list[torch.optim.Optimizer]:
    """Muon at rate `muon` for the matrices of the `layers`, AdamW at rate `adam` for the rest that is not frozen."""
    learning = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    inner = [parameter for name, parameter in learning if "layers." in name and parameter.ndim == 2]
    outer = [parameter for name, parameter in learning if not ("layers." in name and parameter.ndim == 2)]
    optimisers: list[torch.optim.Optimizer] = [
        Muon(inner, lr=muon),
        torch.optim.AdamW(outer, lr=adam, betas=(0.9, 0.98), weight_decay=0.01),
    ]
    for optimiser in optimisers:
        for group in optimiser.param_groups:
            group["peak"] = group["lr"]
    return optimisers


def schedule(optimisers: list[torch.optim.Optimizer], progress: float, step: int) -> None:
    """Set the rates: 100 steps up, level to half of the time, then straight down to zero. `progress` is in 0 ... 1."""
    share = min(1.0, (step + 1) / 100, (1 - progress) / 0.5)
    for optimiser in optimisers:
        for group in optimiser.param_groups:
            group["lr"] = group["peak"] * max(share, 0.0)
