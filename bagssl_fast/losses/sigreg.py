"""LeJEPA's SIGReg (2511.08544)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from bagssl_fast.distributed.collectives import all_reduce_mean
from bagssl_fast.losses import _sketch
from bagssl_fast.losses._common import LossOutput, check_images, check_slots, detached, full


class SIGReg(nn.Module):
    """LeJEPA (2511.08544): patches at their bag's centroid, each slot an isotropic Gaussian.

    loss = (1 - lambda_sigreg) * invariance + lambda_sigreg * sigreg

    `invariance` is the mean squared distance to the centroid of the bag, `sigreg` the Epps-Pulley
    statistic of the slots' projections on random unit directions against N(0, 1), averaged: about
    1.06 for Gaussian rows whatever the batch, 0.41 times the batch for collapsed ones. Both should
    shrink. Linear in P, B and D. z is not normalized here.

    Directions are a function of `seed` and of `step`, which counts calls in training mode and is
    part of `state_dict()`: equal on all ranks and after a restart.

    Args:
        lambda_sigreg: Weight of the regularizer, in [0, 1].
        num_directions: Directions per step.
        t_max: The statistic's integral runs over [-t_max, t_max].
        num_points: Equidistant points of that integral, an odd number. The authors' later code has
            t_max = 3 and what corresponds to 33 points here.
        seed: Of the directions.
        group: The ranks that share a batch.
    """

    def __init__(
        self,
        lambda_sigreg: float = 0.05,
        *,
        num_directions: int = 256,
        t_max: float = 5.0,
        num_points: int = 17,
        seed: int = 0,
        group: ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        if not 0 <= lambda_sigreg <= 1:
            raise ValueError(f"SIGReg: lambda_sigreg is {lambda_sigreg}, expected in [0, 1]")
        if num_directions < 1:
            raise ValueError(f"SIGReg: num_directions is {num_directions}, expected at least 1")
        self.dt, self.points = _sketch.step_length(t_max, num_points)
        self.lambda_sigreg, self.num_directions = lambda_sigreg, num_directions
        self.seed, self.group = seed, group
        self.step = 0

    def directions(self, z: Tensor) -> Tensor:
        """The unit directions [D, M] of the current step, in the dtype of z [P, B, D]."""
        seed = self.seed * 1_000_003 + self.step  # CPU generators read 32 bits
        return _sketch.unit_directions(
            z.shape[-1], self.num_directions, seed=seed, dtype=z.dtype, device=z.device
        )

    def forward(self, z: Tensor) -> LossOutput:
        check_slots("SIGReg", z)
        check_images("SIGReg", z)
        with torch.autocast(z.device.type, enabled=False):
            z = full(z)
            invariance = (z - z.mean(dim=0)).square().mean()
            invariance = all_reduce_mean(invariance, self.group, alike=True)
            ecf = _sketch.characteristic(z @ self.directions(z), self.dt, self.points)
            ecf = all_reduce_mean(ecf, self.group, alike=True)
            samples = z.shape[1] * (1 if self.group is None else self.group.size())
            sigreg = _sketch.gaussian_distance(ecf, self.dt, samples).mean()
            loss = (1 - self.lambda_sigreg) * invariance + self.lambda_sigreg * sigreg
        self.step += self.training
        return loss, detached(invariance=invariance, sigreg=sigreg)

    def get_extra_state(self) -> dict[str, int]:
        return {"step": self.step}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.step = state["step"]
