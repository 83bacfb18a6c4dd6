"""Barlow Twins (2103.03230)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from bagssl_fast.distributed.collectives import gather
from bagssl_fast.losses._common import LossOutput, check_images, check_slots, detached, full
from bagssl_fast.losses._correlation import cross_correlation


class BarlowTwins(nn.Module):
    """Barlow Twins (2103.03230): the cross-correlation of two slots becomes the identity.

    loss = sum_i (C_ii - 1)^2 + lambda_offdiag * sum_{i != j} C_ij^2, averaged over the ring of
    successive slots (p, p + 1 mod P): slots are exchangeable, so the ring estimates the mean over
    all pairs in O(P). At P = 2 it is the original. Features are standardized over the batch.
    """

    def __init__(
        self,
        lambda_offdiag: float = 0.005,
        *,
        eps: float = 1e-5,
        group: ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        self.lambda_offdiag, self.eps, self.group = lambda_offdiag, eps, group

    def forward(self, z: Tensor) -> LossOutput:
        check_slots("BarlowTwins", z)
        with torch.autocast(z.device.type, enabled=False):
            z = full(gather(z, 1, self.group, alike=True))
            num_slots = len(z)
            check_images("BarlowTwins", z)
            var, mean = torch.var_mean(z, dim=1, correction=0, keepdim=True)
            z = (z - mean) * torch.rsqrt(var + self.eps)
            # The pair (0, 1) and its mirror image (1, 0) have the same value.
            firsts, seconds = (z[:1], z[1:]) if num_slots == 2 else (z, z.roll(-1, dims=0))
            diagonal, squares = cross_correlation(firsts, seconds)
            on_diagonal = (diagonal - 1).square().sum(dim=1).mean()
            off_diagonal = (squares - diagonal.square().sum(dim=1)).mean()
            loss = on_diagonal + self.lambda_offdiag * off_diagonal
        return loss, detached(on_diagonal=on_diagonal, off_diagonal=off_diagonal)
