"""Quality of embeddings without labels: how far they are from a collapse."""

from __future__ import annotations

import math

import torch
from torch import Tensor


@torch.no_grad()
def collapse(x: Tensor, sample: int = 256) -> dict[str, float]:
    """How far embeddings are from a collapse to a point or to a few directions.

    Args:
        x: Embeddings of one slot, [B, D].
        sample: Rows to look at, the first ones.

    Returns:
        `std`: mean standard deviation of the L2-normalized rows times sqrt(D); near 1 for rows
        spread evenly over the sphere, 0 when all are the same. `rank`: RankMe (Garrido et al.
        2023), exp of the entropy of the normalized singular values; at most min(rows, D).
    """
    x = x[:sample].float()
    unit = torch.nn.functional.normalize(x, dim=1)
    std = unit.std(dim=0).mean().item() * math.sqrt(x.shape[1]) if x.shape[0] > 1 else 0.0
    return {"std": std, "rank": effective_rank(x)}


@torch.no_grad()
def effective_rank(x: Tensor) -> float:
    """RankMe of the rows of x [N, D]: exp of the entropy of the normalized singular values.

    Rows that hold a number that is not finite give nan.
    """
    if not bool(torch.isfinite(x).all()):
        return math.nan
    singular = torch.linalg.svdvals(x.double())
    total = singular.sum()
    if total <= 0:
        return 0.0
    p = singular / total + 1e-12
    return float(torch.exp(-(p * p.log()).sum()))
