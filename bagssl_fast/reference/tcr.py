"""The coding rate of each slot, as EMP-SSL (2304.03977) writes it.

    R(Z) = 1/2 logdet(I_D + D / (B eps) Z^T Z),   Z = z[p], rows of one slot over the batch

`eps` stands where EMP-SSL's code has it; its paper writes eps^2. Larger means more spread: the
loss *subtracts* it. For unit rows, R <= m/2 log(1 + D B / (m B eps)) with m = min(B, D).
"""

import torch
from torch import Tensor


def tcr(z: Tensor, *, eps: float = 0.2) -> Tensor:
    """Coding rate [P] of `z` [P, B, D], in float32 or float64."""
    _, batch, dim = z.shape
    with torch.autocast(z.device.type, enabled=False):
        z = z if z.dtype == torch.float64 else z.float()
        identity = torch.eye(dim, dtype=z.dtype, device=z.device)
        grams = identity + dim / (batch * eps) * (z.mT @ z)
        # One by one: the backward of a batched logdet fails in MKL with several threads
        # ("Parameter 6 was incorrect on entry to SLASWP", seen with torch 2.14.1).
        return (
            0.5 * torch.stack([torch.logdet(gram) for gram in grams]) if len(z) else z.sum((1, 2))
        )
