"""Collectives that autograd can follow.

Convention of the whole package: with a group, an op or loss returns the value of the *global*
batch on every rank, and its backward sums what all ranks send back. The gradient a rank receives is
then world_size times that of the global loss, which the averaging of
`torch.nn.parallel.DistributedDataParallel` turns into exactly the gradient of one device with the
global batch. Every rank must hold equally many images.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


class _AllReduceSum(torch.autograd.Function):
    """Sum over ranks; backward: the sum over ranks of the gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        total = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        return total, None


class _Gather(torch.autograd.Function):
    """Concatenation over ranks; backward: this rank's part of the summed gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
        ctx.dim, ctx.group = dim, group
        x = x.contiguous()
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, x, group=group)
        return torch.cat(parts, dim=dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        total = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        parts = total.chunk(dist.get_world_size(ctx.group), dim=ctx.dim)
        return parts[dist.get_rank(ctx.group)], None, None


def all_reduce_sum(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """`x` summed over the ranks of `group`, differentiable; `x` itself without a group."""
    return x if group is None else _AllReduceSum.apply(x, group)


def all_reduce_mean(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """`x` averaged over the ranks of `group`, differentiable; `x` itself without a group."""
    return x if group is None else _AllReduceSum.apply(x, group) / dist.get_world_size(group)


def gather(x: Tensor, dim: int, group: ProcessGroup | None) -> Tensor:
    """`x` of all ranks of `group` joined along `dim`, differentiable; `x` itself without a group.

    Shapes must be equal on all ranks.
    """
    return x if group is None else _Gather.apply(x, dim, group)
