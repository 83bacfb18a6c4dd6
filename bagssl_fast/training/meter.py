"""Counts what passes between two reports."""

from __future__ import annotations

import resource
import sys
import time
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bagssl_fast.evaluation.quality import collapse

if TYPE_CHECKING:
    from bagssl_fast.training.run import Run


class Meter:
    """Counts what passed between two reports."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self._restart()

    def _restart(self) -> None:
        self.sums: dict[str, Tensor] = {}  # the loss and its terms, over the steps that counted
        self.counted = torch.zeros((), device=self.run.ranks.device)
        self.images = self.patches = 0
        self.time, self.wait = time.monotonic(), self.run.loader.data_wait

    def add(self, h: Tensor) -> None:
        """Takes in one step, before it is judged, by its embeddings [P, B, F]."""
        self.images += h.shape[1]
        self.patches += h.shape[0] * h.shape[1]

    def count(self, loss: Tensor, terms: dict[str, Tensor], bad: Tensor) -> None:
        """Takes in the numbers of the step; those of a bad one, which is left out, do not count."""
        named = {"loss": loss.detach()} | {f"term/{name}": value for name, value in terms.items()}
        for name, value in named.items():
            self.sums[name] = self.sums.get(name, 0) + torch.where(bad, 0, value)
        self.counted += ~bad

    def record(self, h: Tensor, z: Tensor) -> dict[str, float]:
        """The numbers since the last call: means over the ranks, sums for the rates."""
        run = self.run
        seconds = max(time.monotonic() - self.time, 1e-9)
        waited = (run.loader.data_wait - self.wait) / seconds
        of_h, of_z = collapse(h[0].detach()), collapse(z[0].detach())
        means = {
            **{name: float(value / self.counted) for name, value in self.sums.items()},
            "data_wait": waited,
            **{f"{key}_h": value for key, value in of_h.items()},
            **{f"{key}_z": value for key, value in of_z.items()},
        }
        sums = [self.images / seconds, self.patches / seconds]
        means = dict(zip(means, run.ranks.mean(list(means.values())), strict=True))
        images_per_s, patches_per_s = run.ranks.total(sums)
        self._restart()
        return means | {
            "lr": run.optimizer.param_groups[0]["lr"],
            "epoch": run.step / run.steps_per_epoch,
            "images_per_s": images_per_s,
            "patches_per_s": patches_per_s,
            "memory_mb": run.ranks.maximum([memory_mb(run.ranks.device)])[0],
        }


def memory_mb(device: torch.device) -> float:
    """Peak memory so far: of the GPU on CUDA, of this process elsewhere, in MB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
