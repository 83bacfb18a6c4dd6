# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""linear_bn_relu: a projector's block, relu(batch_norm(x W^T)).

    y = x W^T;  y_hat = (y - mean) rstd;  out = relu(gamma y_hat + beta)

x [N, F] (any leading dimensions), W [M, F], gamma, beta, mean, rstd [M]; out [N, M] in x's dtype,
statistics and sums in float32.

The three products (y, dx, dW) are the library's. A projector's are large (N, F, M of thousands),
where the library has its best kernels and the arithmetic takes tens of times as long as one more
read of y: by its peaks an H100 needs 0.56 ms for a product of N = 4096, F = M = 8192 in bfloat16
and 20 us to read y. Statistics in the epilogue of a product of our own would pay only within 4% of
the library's speed. What surrounds the products is fused:
    forward   statistics (y read once), their merge, normalize + ReLU (y read, out written once)
    backward  dgamma and dbeta (y and dout read once), dy (both read once, dy written once)

Saved: x, W, y, mean, rstd; y_hat and the ReLU's mask are made again from y. Statistics are merged
by Chan's rule from strips of rows, over ranks likewise: nothing cancels and nothing is atomic.
Bytes around the products, per element of y: forward 3, backward 5 times its size.
"""

from typing import Any

import torch
import torch.distributed as dist
import triton
import triton.language as tl

from ._common import check_rank, check_tensors, device_guard, launch_options, refuse, sm_count
from ._tuning import Strip, column_strip, row_strip

MERGE_COLS = 64  # columns per program that merges statistics


@triton.jit
def _stats_fwd_kernel(
    y_ptr,  # [N, M]
    stats_ptr,  # [strips, 3, M]: count, mean, centered squares
    rows,
    cols,
    stride_y_n,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    pid_m = tl.program_id(0)
    pid_n = tl.program_id(1)

    offs_n = pid_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_m = pid_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < cols
    mask = (offs_n < rows)[:, None] & mask_m[None, :]
    count = tl.minimum(rows - pid_n * BLOCK_N, BLOCK_N).to(tl.float32)

    y = tl.load(y_ptr + offs_n[:, None] * stride_y_n + offs_m[None, :], mask=mask, other=0.0)
    y = y.to(tl.float32)  # [BLOCK_N, BLOCK_M]
    mean = tl.sum(y, axis=0) / count
    centered = tl.where(mask, y - mean[None, :], 0.0)
    square = tl.sum(centered * centered, axis=0)

    stats_ptr += pid_n.to(tl.int64) * 3 * cols + offs_m
    tl.store(stats_ptr, tl.zeros((BLOCK_M,), tl.float32) + count, mask=mask_m)
    tl.store(stats_ptr + cols, mean, mask=mask_m)
    tl.store(stats_ptr + 2 * cols, square, mask=mask_m)


@triton.jit
def _stats_merge_kernel(
    parts_ptr,  # [parts, 3, M]: count, mean, centered squares
    stats_ptr,  # [3, M]
    num_parts,
    cols,
    BLOCK_M: tl.constexpr,
):
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < cols
    parts_ptr += offs_m

    count = tl.zeros((BLOCK_M,), tl.float32)
    mean = tl.zeros((BLOCK_M,), tl.float32)
    square = tl.zeros((BLOCK_M,), tl.float32)
    for _ in range(num_parts):
        part_count = tl.load(parts_ptr, mask=mask_m, other=0.0)
        total = count + part_count
        share = part_count / tl.maximum(total, 1.0)
        delta = tl.load(parts_ptr + cols, mask=mask_m, other=0.0) - mean
        square += tl.load(parts_ptr + 2 * cols, mask=mask_m, other=0.0)
        square += delta * delta * (count * share)
        mean += delta * share
        count = total
        parts_ptr += 3 * cols

    stats_ptr += offs_m
    tl.store(stats_ptr, count, mask=mask_m)
    tl.store(stats_ptr + cols, mean, mask=mask_m)
    tl.store(stats_ptr + 2 * cols, square, mask=mask_m)


@triton.jit
def _columns(mean_ptr, rstd_ptr, gamma_ptr, beta_ptr, offs_m, mask_m):
    """The columns' statistics and parameters, rows of one [1, BLOCK_M] each, float32."""
    mean = tl.load(mean_ptr + offs_m, mask=mask_m, other=0.0).to(tl.float32)
    rstd = tl.load(rstd_ptr + offs_m, mask=mask_m, other=0.0).to(tl.float32)
    gamma = tl.load(gamma_ptr + offs_m, mask=mask_m, other=0.0).to(tl.float32)
    beta = tl.load(beta_ptr + offs_m, mask=mask_m, other=0.0).to(tl.float32)
    return mean[None, :], rstd[None, :], gamma[None, :], beta[None, :]


@triton.jit
def _normalize_fwd_kernel(
    y_ptr,  # [N, M]
    mean_ptr,  # [M]
    rstd_ptr,  # [M]
    gamma_ptr,  # [M]
    beta_ptr,  # [M]
    out_ptr,  # [N, M]
    rows,
    cols,
    stride_y_n,
    RELU: tl.constexpr,
    REPEAT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    pid_m = tl.program_id(0)
    pid_n = tl.program_id(1)

    offs_m = pid_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < cols
    mean, rstd, gamma, beta = _columns(mean_ptr, rstd_ptr, gamma_ptr, beta_ptr, offs_m, mask_m)
    for step in range(REPEAT):
        offs_n = (pid_n.to(tl.int64) * REPEAT + step) * BLOCK_N + tl.arange(0, BLOCK_N)
        mask = (offs_n < rows)[:, None] & mask_m[None, :]
        y = tl.load(y_ptr + offs_n[:, None] * stride_y_n + offs_m[None, :], mask=mask, other=0.0)
        out = (y.to(tl.float32) - mean) * rstd * gamma + beta  # [BLOCK_N, BLOCK_M]
        if RELU:
            out = tl.where(out <= 0.0, 0.0, out)  # NaN stays
        out_offs = offs_n[:, None] * cols + offs_m[None, :]
        tl.store(out_ptr + out_offs, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _masked_gradient(y_hat, dout, gamma, beta, RELU: tl.constexpr):
    """The gradient before the ReLU, whose mask is made again."""
    if RELU:
        dout = tl.where(y_hat * gamma + beta <= 0.0, 0.0, dout)
    return dout


@triton.jit
def _reduce_bwd_kernel(
    y_ptr,  # [N, M]
    dout_ptr,  # [N, M]
    mean_ptr,  # [M]
    rstd_ptr,  # [M]
    gamma_ptr,  # [M]
    beta_ptr,  # [M]
    sums_partial_ptr,  # [strips, 2, M]: dgamma, dbeta
    rows,
    cols,
    stride_y_n,
    RELU: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    pid_m = tl.program_id(0)
    pid_n = tl.program_id(1)

    offs_n = pid_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_m = pid_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < cols
    mask = (offs_n < rows)[:, None] & mask_m[None, :]

    mean, rstd, gamma, beta = _columns(mean_ptr, rstd_ptr, gamma_ptr, beta_ptr, offs_m, mask_m)
    y = tl.load(y_ptr + offs_n[:, None] * stride_y_n + offs_m[None, :], mask=mask, other=0.0)
    dout = tl.load(dout_ptr + offs_n[:, None] * cols + offs_m[None, :], mask=mask, other=0.0)
    y_hat = (y.to(tl.float32) - mean) * rstd
    dout = _masked_gradient(y_hat, dout.to(tl.float32), gamma, beta, RELU)

    sums_partial_ptr += pid_n.to(tl.int64) * 2 * cols + offs_m
    tl.store(sums_partial_ptr, tl.sum(dout * y_hat, axis=0), mask=mask_m)
    tl.store(sums_partial_ptr + cols, tl.sum(dout, axis=0), mask=mask_m)


@triton.jit
def _normalize_bwd_kernel(
    y_ptr,  # [N, M]
    dout_ptr,  # [N, M]
    mean_ptr,  # [M]
    rstd_ptr,  # [M]
    gamma_ptr,  # [M]
    beta_ptr,  # [M]
    sums_ptr,  # [2, M]: dgamma, dbeta over all ranks, divided by the number of rows; training only
    dy_ptr,  # [N, M]
    rows,
    cols,
    stride_y_n,
    TRAINING: tl.constexpr,
    RELU: tl.constexpr,
    REPEAT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    pid_m = tl.program_id(0)
    pid_n = tl.program_id(1)

    offs_m = pid_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < cols
    mean, rstd, gamma, beta = _columns(mean_ptr, rstd_ptr, gamma_ptr, beta_ptr, offs_m, mask_m)
    dgamma = tl.zeros((1, BLOCK_M), tl.float32)
    dbeta = tl.zeros((1, BLOCK_M), tl.float32)
    if TRAINING:
        dgamma = tl.load(sums_ptr + offs_m, mask=mask_m, other=0.0)[None, :]
        dbeta = tl.load(sums_ptr + cols + offs_m, mask=mask_m, other=0.0)[None, :]
    for step in range(REPEAT):
        offs_n = (pid_n.to(tl.int64) * REPEAT + step) * BLOCK_N + tl.arange(0, BLOCK_N)
        mask = (offs_n < rows)[:, None] & mask_m[None, :]
        y = tl.load(y_ptr + offs_n[:, None] * stride_y_n + offs_m[None, :], mask=mask, other=0.0)
        dout = tl.load(dout_ptr + offs_n[:, None] * cols + offs_m[None, :], mask=mask, other=0.0)
        y_hat = (y.to(tl.float32) - mean) * rstd  # [BLOCK_N, BLOCK_M]
        dy = _masked_gradient(y_hat, dout.to(tl.float32), gamma, beta, RELU)
        if TRAINING:
            dy -= y_hat * dgamma + dbeta
        dy *= gamma * rstd
        dy_offs = offs_n[:, None] * cols + offs_m[None, :]
        tl.store(dy_ptr + dy_offs, dy.to(dy_ptr.dtype.element_ty), mask=mask)


def batch_stats_fwd(y: torch.Tensor) -> torch.Tensor:
    """[3, M] float32 of y [N, M]: count, mean and sum of centered squares of each column."""
    rows, cols = y.shape
    stats = y.new_zeros((3, cols), dtype=torch.float32)
    if y.numel() == 0:
        return stats
    strip = column_strip(rows, cols, sm_count(y.device))
    grid = (triton.cdiv(cols, strip.cols), triton.cdiv(rows, strip.rows))
    parts = y.new_empty((grid[1], 3, cols), dtype=torch.float32)
    with device_guard(y):
        _stats_fwd_kernel[grid](
            y_ptr=y,
            stats_ptr=parts,
            rows=rows,
            cols=cols,
            stride_y_n=y.stride(0),
            BLOCK_N=strip.rows,
            BLOCK_M=strip.cols,
            **launch_options(strip.num_warps),
        )
    return merge_stats(parts)


def merge_stats(parts: torch.Tensor) -> torch.Tensor:
    """Statistics [3, M] of all rows from those of parts of them [parts, 3, M]."""
    stats = torch.empty_like(parts[0])
    cols = parts.shape[2]
    with device_guard(parts):
        _stats_merge_kernel[(triton.cdiv(cols, MERGE_COLS),)](
            parts_ptr=parts,
            stats_ptr=stats,
            num_parts=parts.shape[0],
            cols=cols,
            BLOCK_M=MERGE_COLS,
            **launch_options(2),
        )
    return stats


def _arguments(
    y: torch.Tensor,
    columns: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    relu: bool,
    strip: Strip,
) -> dict[str, Any]:
    """The arguments that the kernels below share: y, per column mean, rstd, gamma, beta; tiles."""
    mean, rstd, gamma, beta = columns
    return {
        "y_ptr": y,
        "mean_ptr": mean,
        "rstd_ptr": rstd,
        "gamma_ptr": gamma,
        "beta_ptr": beta,
        "rows": y.shape[0],
        "cols": y.shape[1],
        "stride_y_n": y.stride(0),
        "RELU": relu,
        "BLOCK_N": strip.rows,
        "BLOCK_M": strip.cols,
        **launch_options(strip.num_warps),
    }


def normalize_fwd(
    y: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    gamma: torch.Tensor,
    beta: torch.Tensor,
    relu: bool,
    dtype: torch.dtype,
) -> torch.Tensor:
    """relu(gamma (y - mean) rstd + beta), [N, M] in the given dtype."""
    rows, cols = y.shape
    out = torch.empty((rows, cols), dtype=dtype, device=y.device)
    if y.numel() == 0:
        return out
    strip = row_strip(rows, cols, sm_count(y.device))
    grid = (triton.cdiv(cols, strip.cols), triton.cdiv(rows, strip.rows * strip.repeat))
    with device_guard(y):
        _normalize_fwd_kernel[grid](
            out_ptr=out,
            REPEAT=strip.repeat,
            **_arguments(y, (mean, rstd, gamma, beta), relu, strip),
        )
    return out


def reduce_bwd(
    y: torch.Tensor,
    dout: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    gamma: torch.Tensor,
    beta: torch.Tensor,
    relu: bool,
) -> torch.Tensor:
    """[2, M] float32: dgamma and dbeta of these rows."""
    rows, cols = y.shape
    if y.numel() == 0:
        return y.new_zeros((2, cols), dtype=torch.float32)
    strip = column_strip(rows, cols, sm_count(y.device))
    grid = (triton.cdiv(cols, strip.cols), triton.cdiv(rows, strip.rows))
    partial = y.new_empty((grid[1], 2, cols), dtype=torch.float32)
    with device_guard(y):
        _reduce_bwd_kernel[grid](
            dout_ptr=dout,
            sums_partial_ptr=partial,
            **_arguments(y, (mean, rstd, gamma, beta), relu, strip),
        )
    return partial.sum(dim=0)


def normalize_bwd(
    y: torch.Tensor,
    dout: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    gamma: torch.Tensor,
    beta: torch.Tensor,
    sums: torch.Tensor,
    training: bool,
    relu: bool,
) -> torch.Tensor:
    """dy [N, M] in y's dtype; sums [2, M]: dgamma and dbeta of all rows over their number."""
    rows, cols = y.shape
    dy = torch.empty((rows, cols), dtype=y.dtype, device=y.device)
    if y.numel() == 0:
        return dy
    strip = row_strip(rows, cols, sm_count(y.device))
    grid = (triton.cdiv(cols, strip.cols), triton.cdiv(rows, strip.rows * strip.repeat))
    with device_guard(y):
        _normalize_bwd_kernel[grid](
            dout_ptr=dout,
            sums_ptr=sums,
            dy_ptr=dy,
            TRAINING=training,
            REPEAT=strip.repeat,
            **_arguments(y, (mean, rstd, gamma, beta), relu, strip),
        )
    return dy


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
