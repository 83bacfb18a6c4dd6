"""The hosts' losses of two views, in their conventions, over our ops.

All arithmetic is float32 (float64 if the projections are), also under autocast, and so is the
result. Over ranks the value is the host's: its invariance is that of the rank's own images, the
statistics are those of all. The gradient is that of one device over the global batch once DDP has
averaged it (`distributed/collectives.py`).
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from bagssl_fast import ops
from bagssl_fast.distributed.collectives import all_reduce_mean, gather
from bagssl_fast.losses._correlation import cross_correlation


class ShapeError(ValueError, AssertionError):
    """Where a host uses `assert` and we raise ValueError: callers may expect either."""


def all_ranks() -> ProcessGroup | None:
    """The group of all ranks where there are several, else None."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return None
    return dist.group.WORLD


def check_pair(name: str, x: Tensor, y: Tensor, ranks: tuple[int, ...] = (2,)) -> None:
    """Raises ShapeError unless x and y are two views [B, ..., D] of at least two images."""
    if x.shape != y.shape or x.dim() not in ranks:
        raise ShapeError(
            f"{name}: the views are {list(x.shape)} and {list(y.shape)}, expected two equal shapes "
            f"of {' or '.join(map(str, ranks))} dimensions, the batch first, the features last"
        )
    if x.shape[0] < 2 or x.shape[-1] == 0:
        raise ShapeError(
            f"{name}: the views are {list(x.shape)}, statistics over the batch need at least 2 "
            "images and one feature; drop_last=True avoids a last batch of one"
        )


def vicreg_pair(
    x: Tensor,
    y: Tensor,
    *,
    sim: float,
    std: float,
    cov: float,
    eps: float = 1e-4,
    convention: str = "official",
    group: ProcessGroup | None = None,
) -> Tensor:
    """VICReg's loss of two views [B, ..., D]; further dimensions are averaged over."""
    z = torch.stack([x, y])
    if x.dim() > 2:  # every position is a slot with statistics of its own
        z = z.flatten(2, -2).transpose(1, 2).flatten(0, 1)
    invariance, variance, covariance = ops.vicreg(z, eps=eps, convention=convention, group=group)
    if group is not None or x.dim() > 2:
        with torch.autocast(x.device.type, enabled=False):
            invariance = F.mse_loss(x.to(variance.dtype), y.to(variance.dtype))
    return sim * invariance + std * variance + cov * covariance


def barlow_pair(
    x: Tensor, y: Tensor, *, off_diagonal: float, group: ProcessGroup | None = None
) -> Tensor:
    """sum_i (C_ii - 1)^2 + off_diagonal * sum_{i != j} C_ij^2 of two views [B, D].

    As in the hosts, every rank standardizes by its own statistics and C is averaged over ranks.
    """
    with torch.autocast(x.device.type, enabled=False):
        x, y = _standardized(x), _standardized(y)
        if group is not None and len(x) * dist.get_world_size(group) < x.shape[1]:
            x, y, group = gather(x, 0, group), gather(y, 0, group), None
        if group is None:
            diagonal, squares = cross_correlation(x[None], y[None])
        else:
            correlation = all_reduce_mean(x.mT @ y / len(x), group)
            diagonal, squares = correlation.diagonal(), correlation.square().sum()
        on_diagonal = (diagonal - 1).square().sum()
        return on_diagonal + off_diagonal * (squares.sum() - diagonal.square().sum())


def emp_ssl(z: Tensor, *, patch_sim: float, tcr: float, eps: float) -> Tensor:
    """-patch_sim * cosine to the bag's mean - tcr * coding rate, of z [P, B, D]."""
    cosine = ops.bag_pool(z, cosine=True).cosine
    assert cosine is not None
    return -patch_sim * cosine.mean() - tcr * ops.tcr(z, eps=eps).mean()


def scale_gradient(x: Tensor, scale: float) -> Tensor:
    """x, with its gradient multiplied by `scale`."""
    return x.detach() + scale * (x - x.detach())


def _standardized(z: Tensor) -> Tensor:
    z = z if z.dtype == torch.float64 else z.float()
    return F.batch_norm(z, None, None, training=True)
