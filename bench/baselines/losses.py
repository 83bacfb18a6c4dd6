"""The losses as their authors' code computes them: slot by slot, with D x D matrices."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor


def vicreg(z: Tensor) -> Tensor:
    """VICReg's loss (2105.04906, weights 25, 25, 1) of z [P, B, D].

    The authors have two views, for which this is their code line by line. With P slots, variance
    and covariance are computed once per slot by their formula, and the invariance is the mean over
    all pairs of slots.
    """
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


def coding_rate(z: Tensor, eps: float = 0.2) -> Tensor:
    """EMP-SSL's coding rate (2304.03977), `logdet(I + D / (B eps) Z^T Z) / 2`, the slots' mean."""
    _, batch, dim = z.shape
    total = torch.zeros((), device=z.device)
    for patch in z:
        covariance = patch.T @ patch * (dim / (batch * eps))
        total = total + torch.logdet(torch.eye(dim, device=z.device) + covariance) / 2
    return total / len(z)
