"""The coding rate of each slot, as EMP-SSL (2304.03977) writes it.

    R(Z) = 1/2 logdet(I_D + D / (B eps) Z^T Z),   Z = z[p], rows of one slot over the batch

`eps` is that of EMP-SSL's code; its paper writes eps^2. A larger rate means more spread: the loss
*subtracts* it. Computed in float64: with few long rows the D x D matrix is so ill-conditioned that
a float32 gradient, as in EMP-SSL's code, can be off by half.
"""

import torch
from torch import Tensor


def tcr(z: Tensor, *, eps: float = 0.2) -> Tensor:
    """Coding rate [P] of `z` [P, B, D], in float32 or float64."""
    _, batch, dim = z.shape
    with torch.autocast(z.device.type, enabled=False):
        rows = z.double()
        identity = torch.eye(dim, dtype=rows.dtype, device=z.device)
        grams = identity + dim / (batch * eps) * (rows.mT @ rows)
        # One by one: the backward of a batched logdet fails in MKL with several threads
        # ("Parameter 6 was incorrect on entry to SLASWP", seen with torch 2.14.1).
        rate = 0.5 * torch.stack([torch.logdet(gram) for gram in grams])
    return rate if z.dtype == torch.float64 else rate.float()
