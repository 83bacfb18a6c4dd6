"""Collectives that autograd can follow.

Convention of the whole package: with a group, an op or loss returns the value of the *global*
batch on every rank, and its backward sums what all ranks send back. The gradient a rank receives is
then world_size times that of the global loss, which the averaging of
`torch.nn.parallel.DistributedDataParallel` turns into exactly the gradient of one device with the
global batch. Every rank must hold equally many images.

Where all ranks make the same of a result (`alike`), as a loss of the global batch does, all of them
send back the same gradient: its sum is world_size times a rank's own, and nothing needs to be sent.
Where a result meets a rank's own images, as statistics do that normalize them, the sum is sent.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

# Its name since torch 2.14, and before.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class _AllReduceSum(torch.autograd.Function):
    """Sum over ranks; backward: the sum over ranks of the gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup, alike: bool) -> Tensor:
        ctx.group, ctx.alike = group, alike
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _summed(grad, ctx.group, ctx.alike), None, None


class _Gather(torch.autograd.Function):
    """Concatenation over ranks; backward: this rank's part of the summed gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: ProcessGroup, alike: bool) -> Tensor:
        ctx.dim, ctx.group, ctx.alike = dim, group, alike
        x = x.contiguous()
        world = dist.get_world_size(group)
        parts = x.new_empty(world * x.numel())
        _all_gather(parts, x.view(-1), group=group)
        return parts.view(world, *x.shape).movedim(0, dim).flatten(dim, dim + 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        if not ctx.alike:
            grad = _summed(grad, ctx.group, False)
        parts = grad.chunk(dist.get_world_size(ctx.group), dim=ctx.dim)
        own = parts[dist.get_rank(ctx.group)]
        return (_summed(own, ctx.group, True) if ctx.alike else own), None, None, None


class _SlotsToRanks(torch.autograd.Function):
    """Images of all slots to all images of some slots; backward: the way back."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, group: ProcessGroup) -> Tensor:
        num_slots, batch, dim = z.shape
        ctx.group, ctx.shape = group, z.shape
        world, counts = dist.get_world_size(group), slots_of_ranks(num_slots, group)
        own = counts[dist.get_rank(group)]
        parts = z.new_empty((world * own, batch, dim))
        dist.all_to_all_single(parts, z.contiguous(), [own] * world, counts, group=group)
        return parts.view(world, own, batch, dim).transpose(0, 1).reshape(own, world * batch, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        world, own = dist.get_world_size(ctx.group), grad.shape[0]
        num_slots, batch, dim = ctx.shape
        parts = grad.reshape(own, world, batch, dim).transpose(0, 1).reshape(-1, batch, dim)
        counts, dz = slots_of_ranks(num_slots, ctx.group), grad.new_empty(ctx.shape)
        dist.all_to_all_single(dz, parts, counts, [own] * world, group=ctx.group)
        return dz, None


def _summed(grad: Tensor, group: ProcessGroup, alike: bool) -> Tensor:
    if alike:
        return grad * dist.get_world_size(group)
    total = grad.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


def all_reduce_sum(x: Tensor, group: ProcessGroup | None, alike: bool = False) -> Tensor:
    """`x` summed over the ranks of `group`, differentiable; `x` itself without a group."""
    return x if group is None else _AllReduceSum.apply(x, group, alike)


def all_reduce_mean(x: Tensor, group: ProcessGroup | None, alike: bool = False) -> Tensor:
    """`x` averaged over the ranks of `group`, differentiable; `x` itself without a group."""
    return x if group is None else all_reduce_sum(x, group, alike) / dist.get_world_size(group)


def gather(x: Tensor, dim: int, group: ProcessGroup | None, alike: bool = False) -> Tensor:
    """`x` of all ranks of `group` joined along `dim`, differentiable; `x` itself without a group.

    Shapes must be equal on all ranks.
    """
    return x if group is None else _Gather.apply(x, dim, group, alike)


def slots_of_ranks(num_slots: int, group: ProcessGroup) -> list[int]:
    """How many of the slots each rank takes, in the order of both; some none if they are few."""
    share, left = divmod(num_slots, dist.get_world_size(group))
    return [share + (rank < left) for rank in range(dist.get_world_size(group))]


def slots_to_ranks(z: Tensor, group: ProcessGroup) -> Tensor:
    """All images of this rank's slots [own, B, D], from its own images of all slots [P, B / n, D].

    Differentiable: what the ranks send back is distributed as z is, not summed.
    """
    return _SlotsToRanks.apply(z, group)


def values_of_slots(own: Tensor, num_slots: int, group: ProcessGroup) -> Tensor:
    """A value of every slot [P] from those of this rank's slots [own], differentiable, `alike`."""
    counts, rank = slots_of_ranks(num_slots, group), dist.get_rank(group)
    before = sum(counts[:rank])
    padded = torch.nn.functional.pad(own, (before, num_slots - before - counts[rank]))
    return all_reduce_sum(padded, group, alike=True)
