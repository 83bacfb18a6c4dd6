"""The mean over a bag, and how closely its patches agree.

mean      = 1/P sum_p x_p                            (divided by its norm where `normalize`)
deviation = mean_{p,d} (x_p - m)^2                   m: the mean, never normalized here
cosine    = mean_p cos(x_p, m)                       EMP-SSL's invariance, one number per image
"""

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-8  # smallest norm divided by, as in F.cosine_similarity


def bag_pool(
    x: Tensor, *, normalize: bool = False, deviation: bool = False, cosine: bool = False
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Mean [B, D], deviation [B] and cosine [B] of `x` [P, B, D], in float32 or float64."""
    with torch.autocast(x.device.type, enabled=False):
        x = x if x.dtype == torch.float64 else x.float()
        mean = x.mean(dim=0)
        spread = (x - mean).square().mean(dim=(0, 2)) if deviation else None
        agreement = (
            F.cosine_similarity(x, mean.expand_as(x), dim=2, eps=EPS).mean(dim=0)
            if cosine
            else None
        )
        return (F.normalize(mean, dim=1, eps=EPS) if normalize else mean), spread, agreement
