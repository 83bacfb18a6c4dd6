"""VICReg's three terms as the paper writes them (Bardes et al., 2105.04906), over P slots.

    invariance = mean over pairs of slots p < q of  mean_{b,d} (z_p - z_q)^2
    variance   = mean over slots and features of    relu(gamma - sqrt(Var_b(z) + eps))
    covariance = 2 * mean over slots of             sum_{i != j} C_ij^2 / D,   C = Zc^T Zc / (B - 1)

At P = 2 these are the terms of the authors' code, to be weighted 25, 25 and 1. Truth for every
other implementation: pairs are a loop, the covariance is D x D, autograd does the rest.
"""

from itertools import combinations

import torch
import torch.nn.functional as F
from torch import Tensor

# The factors of our terms in each codebase at P = 2. "D" is the number of features: the paper sums
# the squared differences over features where all codebases average them.
#   official    the authors' code; lightly; pytorch-metric-learning >= 1.3.1
#   paper       v(Z) + v(Z') is not halved, s(Z, Z') is summed over features
#   solo_learn  v(Z) + v(Z') is not halved
#   vicregl     as official, with the covariances of both branches averaged instead of summed
CONVENTIONS: dict[str, tuple[float | str, float, float]] = {
    # name         invariance  variance  covariance
    "official": (1.0, 1.0, 1.0),
    "paper": ("D", 2.0, 1.0),
    "solo_learn": (1.0, 2.0, 1.0),
    "vicregl": (1.0, 1.0, 0.5),
}


def vicreg(z: Tensor, *, gamma: float = 1.0, eps: float = 1e-4) -> tuple[Tensor, Tensor, Tensor]:
    """Invariance, variance, covariance of `z` [P, B, D]: scalars in float32 (float64 if z is)."""
    num_slots, batch, dim = z.shape
    with torch.autocast(z.device.type, enabled=False):
        z = z if z.dtype == torch.float64 else z.float()
        pairs = list(combinations(range(num_slots), 2))
        invariance = torch.stack([F.mse_loss(z[p], z[q]) for p, q in pairs]).mean()

        std = torch.sqrt(z.var(dim=1) + eps)  # [P, D]
        variance = torch.relu(gamma - std).mean()

        zc = z - z.mean(dim=1, keepdim=True)
        cov = zc.mT @ zc / (batch - 1)  # [P, D, D]
        diagonal = torch.eye(dim, dtype=torch.bool, device=z.device)
        covariance = 2 * cov.masked_fill(diagonal, 0).square().sum(dim=(1, 2)).mean() / dim
    return invariance, variance, covariance
