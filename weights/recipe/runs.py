"""A stage that can be stopped at any time: its checkpoint, its clock and its log."""

import pathlib
import time

import torch
import torch.distributed as dist
from optimiser import schedule
from torch import nn

SAVE_EVERY = 180  # seconds


class Run:
    """One stage on disk: `<name>.pt` holds weights, optimisers, steps and seconds spent; `<name>.log` what was said."""

    def __init__(self, folder: pathlib.Path, name: str, minutes: float, worker: int = 0, workers: int = 1):
        folder.mkdir(parents=True, exist_ok=True)
        self.checkpoint, self.log_file = folder / f"{name}.pt", folder / f"{name}.log"
        self.budget = minutes * 60  # seconds of training, over all sittings
        self.worker, self.workers = worker, workers  # the first keeps clock, checkpoint and log
        self.step, self.seconds = 0, 0.0
        self._last_step = self._last_save = time.monotonic()

    @property
    def progress(self) -> float:
        """The share of the time that is spent, 0 ... 1; the schedules run on it."""
        return min(self.seconds / self.budget, 1.0)

    def resume(self, model: nn.Module, optimisers: list[torch.optim.Optimizer]) -> None:
        """Go on from the checkpoint, where there is one."""
        if self.checkpoint.exists():
            saved = torch.load(self.checkpoint, weights_only=True)
            model.load_state_dict(saved["model"])
            for optimiser, state in zip(optimisers, saved["optimisers"]):
                peaks = [group["peak"] for group in optimiser.param_groups]
                optimiser.load_state_dict(state)
                for group, peak in zip(optimiser.param_groups, peaks):
                    group["peak"] = peak
            self.step, self.seconds = saved["step"], saved["seconds"]
            self.log(f"resumed at step {self.step}, {self.seconds / 60:.1f} minutes")
        self._last_step = self._last_save = time.monotonic()

    def save(self, model: nn.Module, optimisers: list[torch.optim.Optimizer]) -> None:
        """Write the checkpoint; a stop in the middle leaves the old one whole."""
        if self.worker:
            return
        state = {"model": model.state_dict(), "optimisers": [optimiser.state_dict() for optimiser in optimisers]}
        partial = self.checkpoint.with_suffix(".partial")
        torch.save({**state, "step": self.step, "seconds": self.seconds}, partial)
        partial.rename(self.checkpoint)
        self._last_save = time.monotonic()

    def update(self, loss: torch.Tensor, model: nn.Module, optimisers: list[torch.optim.Optimizer]) -> None:
        """One step of the optimisers at the rates of this moment; saves when it is time to."""
        loss.backward()
        now = time.monotonic()
        # Every worker goes by the first one's clock. The first steps of a sitting compile: they do not count in full.
        self.seconds += min(now - self._last_step, 10.0)
        self._last_step = now
        parameters = [p for optimiser in optimisers for group in optimiser.param_groups for p in group["params"]]
        if self.workers > 1:
            self._average([p.grad for p in parameters if p.grad is not None])
        nn.utils.clip_grad_norm_(parameters, 1.0)
        schedule(optimisers, self.progress, self.step)
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        self.step += 1
        if now - self._last_save > SAVE_EVERY:
            self.save(model, optimisers)

    def _average(self, gradients: list[torch.Tensor]) -> None:
        """Give every worker the mean of all workers' gradients, and the first one's clock."""
        clock = torch.tensor([0.0 if self.worker else self.seconds])
        joined = torch.cat([clock, *(gradient.flatten() for gradient in gradients)])
        dist.all_reduce(joined)
        self.seconds = joined[0].item()
        parts = (joined[1:] / self.workers).split([gradient.numel() for gradient in gradients])
        for gradient, part in zip(gradients, parts):
            gradient.copy_(part.view_as(gradient))

    def restart_clock(self) -> None:
        """Do not count the time since the last step, which went into measuring."""
        self._last_step = time.monotonic()

    def log(self, line: str) -> None:
        if self.worker:
            return
        line = f"{self.step:6d} {self.seconds / 60:6.1f} min  {line}"
        print(line, flush=True)
        with open(self.log_file, "a", encoding="utf-8") as lines:
            lines.write(line + "\n")
