"""VICReg with its authors' loss (2105.04906), slot by slot, on bags of P patches.

The authors have two views. With P of them, variance and covariance are taken once per slot by
their formula (D x D), and the invariance is the mean over all pairs of slots. Transforms and
workers as in `emp_ssl`, LARS tensor by tensor.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from baselines.emp_ssl import EMPSSL


class VICReg(EMPSSL):
    name = "vicreg"
    losses = ("vicreg",)

    def loss(self, z: Tensor) -> Tensor:
        num_slots, batch, dim = z.shape
        slots = z.unbind()
        pairs = list(itertools.combinations(slots, 2))
        invariance = sum(F.mse_loss(x, y) for x, y in pairs) / len(pairs)
        variance = covariance = torch.zeros((), device=z.device)
        for x in slots:
            x = x - x.mean(dim=0)
            std = torch.sqrt(x.var(dim=0) + 1e-4)
            variance = variance + torch.mean(F.relu(1 - std))
            c = (x.T @ x) / (batch - 1)
            off_diagonal = c.flatten()[:-1].view(dim - 1, dim + 1)[:, 1:].flatten()
            covariance = covariance + off_diagonal.pow_(2).sum().div(dim)
        return 25.0 * invariance + 25.0 * variance / num_slots + 2.0 * covariance / num_slots
