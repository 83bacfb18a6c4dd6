# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""linear_bn_relu: a projector's block, relu(batch_norm(x W^T)).

    y = x W^T;  y_hat = (y - mean) rstd;  out = relu(gamma y_hat + beta)

x [N, F] (any leading dimensions), W [M, F], gamma, beta, mean, rstd [M]; out [N, M] in x's dtype,
statistics and sums in float32.

The three products (y, dx, dW) are the library's. A projector's are large (N, F, M of thousands),
where the library has its best kernels and the arithmetic takes tens of times as long as one more
read of y: by its peaks an H100 needs 0.56 ms for a product of N = 4096, F = M = 8192 in bfloat16
and 20 us to read y. Statistics in the epilogue of a product of our own would pay only within 4% of
the library's speed. What surrounds the products is fused (`_batch_norm.py`):
    forward   statistics (y read once), their merge, normalize + ReLU (y read, out written once)
    backward  dgamma and dbeta (y and dout read once), dy (both read once, dy written once)

Saved: x, W, y, mean, rstd; y_hat and the ReLU's mask are made again from y. Statistics are merged
by Chan's rule from strips of rows, over ranks likewise: nothing cancels and nothing is atomic.
Bytes around the products, per element of y: forward 3, backward 5 times its size.
"""

from typing import Any

import torch
import torch.distributed as dist

from ._batch_norm import batch_stats_fwd, merge_stats, normalize_bwd, normalize_fwd, reduce_bwd
from ._common import check_rank, check_tensors, refuse

_stats_op = torch.library.custom_op(
    "bagssl_triton::batch_stats_fwd", batch_stats_fwd, mutates_args=()
)
_normalize_op = torch.library.custom_op(
    "bagssl_triton::normalize_fwd", normalize_fwd, mutates_args=()
)
_reduce_bwd_op = torch.library.custom_op("bagssl_triton::reduce_bwd", reduce_bwd, mutates_args=())
_normalize_bwd_op = torch.library.custom_op(
    "bagssl_triton::normalize_bwd", normalize_bwd, mutates_args=()
)


@_stats_op.register_fake
def _(y):
    return y.new_empty((3, y.shape[1]), dtype=torch.float32)


@_normalize_op.register_fake
def _(y, mean, rstd, gamma, beta, relu, dtype):
    return torch.empty(y.shape, dtype=dtype, device=y.device)


@_reduce_bwd_op.register_fake
def _(y, dout, mean, rstd, gamma, beta, relu):
    return y.new_empty((2, y.shape[1]), dtype=torch.float32)


@_normalize_bwd_op.register_fake
def _(y, dout, mean, rstd, gamma, beta, sums, training, relu):
    return torch.empty(y.shape, dtype=y.dtype, device=y.device)


class BNReLUFunction(torch.autograd.Function):
    """y, gamma, beta, statistics [3, M] or running mean and var -> out, in one pass over y."""

    @staticmethod
    def forward(
        ctx: Any,
        y: torch.Tensor,
        gamma: torch.Tensor,
        beta: torch.Tensor,
        mean: torch.Tensor,
        rstd: torch.Tensor,
        count: torch.Tensor | None,
        relu: bool,
        dtype: torch.dtype,
        group: Any,
    ) -> torch.Tensor:
        out: torch.Tensor = _normalize_op(y, mean, rstd, gamma, beta, relu, dtype)
        ctx.save_for_backward(y, mean, rstd, gamma, beta, count)
        ctx.relu, ctx.group = relu, group
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        y, mean, rstd, gamma, beta, count = ctx.saved_tensors
        args = (y, dout.contiguous(), mean, rstd, gamma, beta)
        sums = _reduce_bwd_op(*args, ctx.relu)
        dgamma, dbeta = sums.to(gamma.dtype).unbind(0)
        if count is not None:
            if ctx.group is not None:
                sums = sums.clone()
                dist.all_reduce(sums, group=ctx.group)
            sums = sums / count
        dy = _normalize_bwd_op(*args, sums, count is not None, ctx.relu)
        return dy, dgamma, dbeta, None, None, None, None, None, None


def _global_stats(y: torch.Tensor, group: Any) -> torch.Tensor:
    """Statistics [3, M] of y over all ranks of the group."""
    stats: torch.Tensor = _stats_op(y)
    if group is None:
        return stats
    parts = [torch.empty_like(stats) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, stats, group=group)
    return merge_stats(torch.stack(parts))


def linear_bn_relu(
    x: torch.Tensor,
    weight: torch.Tensor,
    gamma: torch.Tensor,
    beta: torch.Tensor,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    *,
    training: bool,
    momentum: float = 0.1,
    eps: float = 1e-5,
    relu: bool = True,
    group: Any = None,
) -> torch.Tensor:
    """relu(batch_norm(x W^T)) with torch's BatchNorm1d semantics.

    Args:
        x: [..., F] in float32, bfloat16 or float16; all leading dimensions are the batch.
        weight: [M, F], brought to x's dtype. gamma, beta: [M].
        running_mean, running_var: [M]; moved in place when training, where they may be None.
        training: Normalize by the batch's statistics rather than by the running ones.
        momentum: Weight of the new value in the running statistics.
        eps: Added to the variance.
        relu: Apply ReLU to the result.
        group: Process group over which statistics are taken; every rank must call.

    Returns:
        [..., M] in x's dtype.

    Raises:
        ValueError: on anything else; on one row where statistics are needed.
    """
    op = "linear_bn_relu"
    check_tensors(op, x=x, weight=weight, gamma=gamma, beta=beta)
    check_rank(op, 2, "[M, F]", weight=weight)
    check_rank(op, 1, "[M]", gamma=gamma, beta=beta)
    cols, depth = weight.shape
    if x.dim() < 2 or x.shape[-1] != depth or gamma.numel() != cols or beta.numel() != cols:
        shapes = [list(tensor.shape) for tensor in (x, weight, gamma, beta)]
        raise refuse(op, f"x, weight, gamma, beta of shapes {shapes}", "[..., F], [M, F], [M], [M]")
    flat = x.reshape(-1, depth)
    if training and group is None and flat.shape[0] < 2:
        raise refuse(op, f"{flat.shape[0]} rows in training", "2 rows or more")
    if not training and (running_mean is None or running_var is None):
        raise refuse(op, "no running statistics in evaluation", "running_mean and running_var")
    y = torch.nn.functional.linear(flat, weight.to(x.dtype))
    with torch.no_grad():
        if training:
            count, mean, square = _global_stats(y, group).unbind(0)
            var = square / count
            if running_mean is not None and running_var is not None:
                running_mean.lerp_(mean.to(running_mean.dtype), momentum)
                running_var.lerp_((square / (count - 1)).to(running_var.dtype), momentum)
        else:
            assert running_mean is not None and running_var is not None
            count, mean, var = None, running_mean.float(), running_var.float()
        rstd = torch.rsqrt(var + eps)
    out: torch.Tensor = BNReLUFunction.apply(
        y, gamma, beta, mean, rstd, count, relu, x.dtype, group
    )
    return out.reshape(*x.shape[:-1], cols)
