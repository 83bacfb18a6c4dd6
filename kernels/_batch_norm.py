# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""The passes of batch norm and ReLU over a matrix [N, M], around somebody else's products.

A map [B, C, H, W] that is channels-last in memory is such a matrix, with N = B H W. Two passes
forward (statistics; normalize and ReLU), two backward (dgamma and dbeta; dy): per element y is
read 4 times, dout twice, and two results are written. Sums run down the rows elementwise, by one
reduction over a tile at the end; parts are merged in their order, no atomics.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from ._common import device_guard, launch_options, sm_count
from ._tuning import Strip, row_strip, sum_strip

MERGE_PARTS, MERGE_COLS = 64, 16  # of a program that merges statistics


@triton.jit
def _place(cols, BLOCK_M: tl.constexpr):
    """This program's (block of rows, block of columns): columns first, all on grid x, where more
    than 65,535 blocks of rows fit."""
    blocks = tl.cdiv(cols, BLOCK_M)
    pid = tl.program_id(0)
    return (pid // blocks).to(tl.int64), (pid % blocks).to(tl.int64)


@triton.jit
def _joined(count, mean, square):
    """The statistics of columns from those of each of their elements' own values: one reduction."""
    total = tl.sum(count, axis=0)
    joined = tl.sum(count * mean, axis=0) / tl.maximum(total, 1.0)
    delta = mean - joined[None, :]
    return total, joined, tl.sum(square + count * delta * delta, axis=0)


@triton.jit
def _store_stats(stats_ptr, count, mean, square, cols, mask_m):
    tl.store(stats_ptr, count, mask=mask_m)
    tl.store(stats_ptr + cols, mean, mask=mask_m)
    tl.store(stats_ptr + 2 * cols, square, mask=mask_m)


@triton.jit
def _stats_fwd_kernel(
    y_ptr,  # [N, M]
    stats_ptr,  # [strips, 3, M]: count, mean, centered squares
    rows,
    cols,
    stride_y_n,
    REPEAT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    pid_n, pid_m = _place(cols, BLOCK_M)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < cols

    # Each element of the tile runs down its own rows (Welford); columns are reduced at the end.
    mean = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    square = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    count = tl.zeros((BLOCK_N, 1), tl.float32)
    for step in range(REPEAT):
        offs_n = (pid_n * REPEAT + step) * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = (offs_n < rows)[:, None]
        mask = inside & mask_m[None, :]
        y = tl.load(y_ptr + offs_n[:, None] * stride_y_n + offs_m[None, :], mask=mask, other=0.0)
        delta = tl.where(inside, y.to(tl.float32) - mean, 0.0)
        mean += delta * (1.0 / (step + 1))
        square += delta * (delta - delta * (1.0 / (step + 1)))
        count += inside.to(tl.float32)

    total, mean, square = _joined(count, mean, square)
    stats_ptr += pid_n * 3 * cols + offs_m
    _store_stats(stats_ptr, tl.zeros((BLOCK_M,), tl.float32) + total, mean, square, cols, mask_m)


@triton.jit
def _stats_merge_kernel(
    parts_ptr,  # [parts, 3, M]: count, mean, centered squares
    stats_ptr,  # [3, M]
    num_parts,
    cols,
    BLOCK_P: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < cols
    offs_p = tl.arange(0, BLOCK_P).to(tl.int64)
    parts_ptr += offs_p[:, None] * 3 * cols + offs_m[None, :]

    # Chan's rule: BLOCK_P chains of parts side by side, joined at the end.
    count = tl.zeros((BLOCK_P, BLOCK_M), tl.float32)
    mean = tl.zeros((BLOCK_P, BLOCK_M), tl.float32)
    square = tl.zeros((BLOCK_P, BLOCK_M), tl.float32)
    for start in range(0, num_parts, BLOCK_P):
        mask = (start + offs_p < num_parts)[:, None] & mask_m[None, :]
        part_count = tl.load(parts_ptr, mask=mask, other=0.0)
        total = count + part_count
        share = part_count / tl.maximum(total, 1.0)
        delta = tl.load(parts_ptr + cols, mask=mask, other=0.0) - mean
        square += tl.load(parts_ptr + 2 * cols, mask=mask, other=0.0)
        square += delta * delta * (count * share)
        mean += delta * share
        count = total
        parts_ptr += BLOCK_P * 3 * cols

    count, mean, square = _joined(count, mean, square)
    _store_stats(stats_ptr + offs_m, count, mean, square, cols, mask_m)


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
    pid_n, pid_m = _place(cols, BLOCK_M)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < cols
    mean, rstd, gamma, beta = _columns(mean_ptr, rstd_ptr, gamma_ptr, beta_ptr, offs_m, mask_m)
    for step in range(REPEAT):
        offs_n = (pid_n * REPEAT + step) * BLOCK_N + tl.arange(0, BLOCK_N)
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
    REPEAT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    pid_n, pid_m = _place(cols, BLOCK_M)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < cols
    mean, rstd, gamma, beta = _columns(mean_ptr, rstd_ptr, gamma_ptr, beta_ptr, offs_m, mask_m)
    dgamma = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    dbeta = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for step in range(REPEAT):
        offs_n = (pid_n * REPEAT + step) * BLOCK_N + tl.arange(0, BLOCK_N)
        mask = (offs_n < rows)[:, None] & mask_m[None, :]
        y = tl.load(y_ptr + offs_n[:, None] * stride_y_n + offs_m[None, :], mask=mask, other=0.0)
        dout = tl.load(dout_ptr + offs_n[:, None] * cols + offs_m[None, :], mask=mask, other=0.0)
        y_hat = (y.to(tl.float32) - mean) * rstd
        dout = _masked_gradient(y_hat, dout.to(tl.float32), gamma, beta, RELU)
        dgamma += dout * y_hat
        dbeta += dout

    sums_partial_ptr += pid_n * 2 * cols + offs_m
    tl.store(sums_partial_ptr, tl.sum(dgamma, axis=0), mask=mask_m)
    tl.store(sums_partial_ptr + cols, tl.sum(dbeta, axis=0), mask=mask_m)


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
    pid_n, pid_m = _place(cols, BLOCK_M)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < cols
    mean, rstd, gamma, beta = _columns(mean_ptr, rstd_ptr, gamma_ptr, beta_ptr, offs_m, mask_m)
    dgamma = tl.zeros((1, BLOCK_M), tl.float32)
    dbeta = tl.zeros((1, BLOCK_M), tl.float32)
    if TRAINING:
        dgamma = tl.load(sums_ptr + offs_m, mask=mask_m, other=0.0)[None, :]
        dbeta = tl.load(sums_ptr + cols + offs_m, mask=mask_m, other=0.0)[None, :]
    for step in range(REPEAT):
        offs_n = (pid_n * REPEAT + step) * BLOCK_N + tl.arange(0, BLOCK_N)
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


def _blocks(y: torch.Tensor, strip: Strip) -> tuple[int, int]:
    """Programs down the rows and across the columns of y."""
    rows, cols = y.shape
    return triton.cdiv(rows, strip.rows * strip.repeat), triton.cdiv(cols, strip.cols)


def batch_stats_fwd(y: torch.Tensor) -> torch.Tensor:
    """[3, M] float32 of y [N, M]: count, mean and sum of centered squares of each column."""
    rows, cols = y.shape
    stats = y.new_zeros((3, cols), dtype=torch.float32)
    if y.numel() == 0:
        return stats
    strip = sum_strip(rows, cols, sm_count(y.device))
    strips, blocks = _blocks(y, strip)
    parts = y.new_empty((strips, 3, cols), dtype=torch.float32)
    with device_guard(y):
        _stats_fwd_kernel[(strips * blocks,)](
            y_ptr=y,
            stats_ptr=parts,
            rows=rows,
            cols=cols,
            stride_y_n=y.stride(0),
            REPEAT=strip.repeat,
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
            BLOCK_P=MERGE_PARTS,
            BLOCK_M=MERGE_COLS,
            **launch_options(4),
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
        "REPEAT": strip.repeat,
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
    strips, blocks = _blocks(y, strip)
    with device_guard(y):
        _normalize_fwd_kernel[(strips * blocks,)](
            out_ptr=out,
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
    strip = sum_strip(rows, cols, sm_count(y.device))
    strips, blocks = _blocks(y, strip)
    partial = y.new_empty((strips, 2, cols), dtype=torch.float32)
    with device_guard(y):
        _reduce_bwd_kernel[(strips * blocks,)](
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
    strips, blocks = _blocks(y, strip)
    with device_guard(y):
        _normalize_bwd_kernel[(strips * blocks,)](
            dout_ptr=dout,
            sums_ptr=sums,
            dy_ptr=dy,
            TRAINING=training,
            **_arguments(y, (mean, rstd, gamma, beta), relu, strip),
        )
    return dy
