# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""vicreg: invariance, variance and covariance of P slots (Bardes et al., arXiv 2105.04906).

    invariance = 2 / (P - 1) sum_p mean_{b,d} (z_p - z_mean)^2    (the mean over pairs of their mse)
    variance   = mean_{p,d} relu(gamma - sqrt(Var_b(z) + eps))
    covariance = 2 mean_p sum_{i != j} C_ij^2 / D,   C = Zc^T Zc / (B - 1),  Zc = z_p minus its mean

z [P, B, D] float32, bfloat16 or float16; three float32 scalars.

    sum_ij C_ij^2 = |Zc^T Zc|^2 / (B-1)^2 = |Zc Zc^T|^2 / (B-1)^2

so the Gram is taken on the shorter side, R = min(B, D), only the upper triangle of its tiles is
computed, and the mean is subtracted as z is loaded: no centered copy. The diagonal's part, sum_i
Var_i^2, is known from the statistics. Backward is one more product with the gradients of all terms
in its epilogue:

    dz_p = a (G Zc) - a Var * Zc - b 1[std < gamma] Zc / std + c (z_p - z_mean)

Launches, each for all slots: statistics and invariance (one read of z), their merge, Gram, sum of
the terms; backward one. Saved: z, mean and variance [P, D], z_mean [B, D] and, where B <= D, the
B x B Gram. The D x D Gram of D < B is computed again in backward. Products take operands in z's
dtype and sum in float32; float32 goes through three TF32 products.
FLOPs: R B D P forward (half a product, thanks to symmetry), 2 R B D P backward.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from ._common import (
    check_rank,
    check_tensors,
    device_guard,
    dot_precision,
    launch_options,
    product_options,
    refuse,
    sm_count,
)
from ._gram import gram_fwd, gram_times, on_batch, triton_type
from ._tuning import column_strip, grad_tile

MERGE_COLS = 64  # columns per program that merges statistics


@triton.jit
def _stats_fwd_kernel(
    z_ptr,  # [P, B, D]
    mean_partial_ptr,  # [P, strips, D]
    square_partial_ptr,  # [P, strips, D], centered on the strip's own mean
    z_mean_ptr,  # [B, D]
    spread_partial_ptr,  # [programs], sum of (z_p - z_mean)^2
    num_slots,
    batch,
    dim,
    stride_z_p,
    stride_z_b,
    stride_z_d,
    STORE_Z_MEAN: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    pid_d = tl.program_id(0)
    pid_b = tl.program_id(1)
    num_strips = tl.num_programs(1)

    offs_b = pid_b.to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    offs_d = pid_d.to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs_d < dim
    mask = (offs_b < batch)[:, None] & mask_d[None, :]
    count = tl.minimum(batch - pid_b * BLOCK_B, BLOCK_B).to(tl.float32)
    tile_ptr = z_ptr + offs_b[:, None] * stride_z_b + offs_d[None, :] * stride_z_d
    partial_offs = pid_b.to(tl.int64) * dim + offs_d

    z_mean = tl.zeros((BLOCK_B, BLOCK_D), tl.float32)
    spread = tl.zeros((BLOCK_B, BLOCK_D), tl.float32)
    for p in range(num_slots):
        z = tl.load(tile_ptr, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_B, BLOCK_D]
        tile_ptr += stride_z_p
        delta = z - z_mean
        z_mean += delta / (p + 1)
        spread += delta * (z - z_mean)
        mean = tl.sum(z, axis=0) / count
        centered = tl.where(mask, z - mean[None, :], 0.0)
        tl.store(mean_partial_ptr + partial_offs, mean, mask=mask_d)
        tl.store(
            square_partial_ptr + partial_offs, tl.sum(centered * centered, axis=0), mask=mask_d
        )
        partial_offs += num_strips.to(tl.int64) * dim

    if STORE_Z_MEAN:
        tl.store(z_mean_ptr + offs_b[:, None] * dim + offs_d[None, :], z_mean, mask=mask)
    tl.store(spread_partial_ptr + pid_b * tl.num_programs(0) + pid_d, tl.sum(spread))


@triton.jit
def _stats_merge_kernel(
    mean_partial_ptr,  # [P, strips, D]
    square_partial_ptr,  # [P, strips, D]
    mean_ptr,  # [P, D]
    var_ptr,  # [P, D], unbiased
    hinge_partial_ptr,  # [programs], sum of relu(gamma - std)
    diagonal_partial_ptr,  # [programs], sum of var^2
    num_strips,
    batch,
    dim,
    gamma,
    eps,
    STRIP_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    pid_d = tl.program_id(0)
    pid_p = tl.program_id(1).to(tl.int64)

    offs_d = pid_d.to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs_d < dim
    partial_offs = pid_p * num_strips * dim + offs_d

    # Chan's rule: squares about the strips' means plus the means' own squares.
    mean = tl.zeros((BLOCK_D,), tl.float32)
    square = tl.zeros((BLOCK_D,), tl.float32)
    for strip in range(num_strips):
        rows = tl.minimum(batch - strip * STRIP_ROWS, STRIP_ROWS).to(tl.float32)
        share = rows / (strip * STRIP_ROWS + rows)
        delta = tl.load(mean_partial_ptr + partial_offs, mask=mask_d, other=0.0) - mean
        mean += delta * share
        square += tl.load(square_partial_ptr + partial_offs, mask=mask_d, other=0.0)
        square += delta * delta * (strip * STRIP_ROWS * share)
        partial_offs += dim

    var = square / (batch - 1)
    hinge = tl.maximum(gamma - tl.sqrt(var + eps), 0.0, propagate_nan=tl.PropagateNan.ALL)
    out_offs = pid_p * dim + offs_d
    tl.store(mean_ptr + out_offs, mean, mask=mask_d)
    tl.store(var_ptr + out_offs, var, mask=mask_d)
    pid = pid_p * tl.num_programs(0) + pid_d
    tl.store(hinge_partial_ptr + pid, tl.sum(tl.where(mask_d, hinge, 0.0)))
    tl.store(diagonal_partial_ptr + pid, tl.sum(tl.where(mask_d, var * var, 0.0)))


@triton.jit
def _sum(partial_ptr, count, BLOCK: tl.constexpr):
    acc = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, count, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        acc += tl.load(partial_ptr + offs, mask=offs < count, other=0.0)
    return tl.sum(acc)


@triton.jit
def _terms_kernel(
    spread_partial_ptr,
    hinge_partial_ptr,
    norm_partial_ptr,
    diagonal_partial_ptr,
    terms_ptr,  # [3]
    num_spread,
    num_hinge,
    num_norm,
    spread_scale,
    hinge_scale,
    norm_scale,
    ON_BATCH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    norm = _sum(norm_partial_ptr, num_norm, BLOCK)
    if ON_BATCH:
        norm -= _sum(diagonal_partial_ptr, num_hinge, BLOCK)
    tl.store(terms_ptr, _sum(spread_partial_ptr, num_spread, BLOCK) * spread_scale)
    tl.store(terms_ptr + 1, _sum(hinge_partial_ptr, num_hinge, BLOCK) * hinge_scale)
    tl.store(terms_ptr + 2, norm * norm_scale)


@triton.jit
def _vicreg_bwd_kernel(
    z_ptr,  # [P, B, D]
    mean_ptr,  # [P, D]
    var_ptr,  # [P, D]
    z_mean_ptr,  # [B, D]
    gram_ptr,  # [P, R, R]
    dterms_ptr,  # [3]
    dz_ptr,  # [P, B, D] contiguous
    batch,
    dim,
    stride_z_p,
    stride_z_b,
    stride_z_d,
    gamma,
    eps,
    invariance_scale,
    variance_scale,
    covariance_scale,
    ON_BATCH: tl.constexpr,
    TYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # Row blocks vary fastest: neighbors share the columns of z, which then come from the cache.
    pid_b = tl.program_id(0)
    pid_d = tl.program_id(1)
    pid_p = tl.program_id(2).to(tl.int64)

    offs_b = (pid_b * BLOCK_B + tl.arange(0, BLOCK_B))[:, None]
    offs_d = (pid_d * BLOCK_D + tl.arange(0, BLOCK_D))[None, :]
    z_ptr += pid_p * stride_z_p
    mean_ptr += pid_p * dim
    acc = gram_times(
        gram_ptr, z_ptr, mean_ptr, pid_p, offs_b, offs_d, batch, dim, stride_z_b, stride_z_d,
        True, ON_BATCH, TYPE, PRECISION, BLOCK_B, BLOCK_D, BLOCK_K,
    )  # fmt: skip

    mask_d = offs_d < dim
    mask = (offs_b < batch) & mask_d
    z = tl.load(
        z_ptr + offs_b.to(tl.int64) * stride_z_b + offs_d.to(tl.int64) * stride_z_d,
        mask=mask,
        other=0.0,
    ).to(tl.float32)
    row_offs = offs_b.to(tl.int64) * dim + offs_d
    z_mean = tl.load(z_mean_ptr + row_offs, mask=mask, other=0.0)
    var = tl.load(var_ptr + pid_p * dim + offs_d, mask=mask_d, other=1.0)
    centered = z - tl.load(mean_ptr + offs_d, mask=mask_d, other=0.0)
    if ON_BATCH:
        acc -= var * centered
    std = tl.sqrt(var + eps)
    dvariance = tl.load(dterms_ptr + 1) * variance_scale
    dz = tl.load(dterms_ptr + 2) * covariance_scale * acc
    dz -= tl.where(std < gamma, dvariance / std, 0.0) * centered
    dz += tl.load(dterms_ptr) * invariance_scale * (z - z_mean)
    dz_offs = pid_p * batch * dim + row_offs
    tl.store(dz_ptr + dz_offs, dz.to(dz_ptr.dtype.element_ty), mask=mask)


def vicreg_fwd(
    z: torch.Tensor, gamma: float, eps: float, save: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(terms [3], mean, var [P, D], z_mean [B, D], gram [P, B, B]); the last two if saved."""
    num_slots, batch, dim = z.shape
    terms, mean, var, z_mean, _ = _outputs(z, gamma, eps, save)
    sms = sm_count(z.device)
    strip = column_strip(batch, dim, sms)
    grid = (triton.cdiv(dim, strip.cols), triton.cdiv(batch, strip.rows))
    blocks = triton.cdiv(dim, MERGE_COLS)
    partial = z.new_empty((2, num_slots, grid[1], dim), dtype=torch.float32)
    spread = z.new_empty((grid[0] * grid[1],), dtype=torch.float32)
    hinge, diagonal = z.new_empty((2, num_slots * blocks), dtype=torch.float32)
    with device_guard(z):
        _stats_fwd_kernel[grid](
            z_ptr=z,
            mean_partial_ptr=partial[0],
            square_partial_ptr=partial[1],
            z_mean_ptr=z_mean,
            spread_partial_ptr=spread,
            num_slots=num_slots,
            batch=batch,
            dim=dim,
            stride_z_p=z.stride(0),
            stride_z_b=z.stride(1),
            stride_z_d=z.stride(2),
            STORE_Z_MEAN=save,
            BLOCK_B=strip.rows,
            BLOCK_D=strip.cols,
            **launch_options(strip.num_warps),
        )
        _stats_merge_kernel[(blocks, num_slots)](
            mean_partial_ptr=partial[0],
            square_partial_ptr=partial[1],
            mean_ptr=mean,
            var_ptr=var,
            hinge_partial_ptr=hinge,
            diagonal_partial_ptr=diagonal,
            num_strips=grid[1],
            batch=batch,
            dim=dim,
            gamma=gamma,
            eps=eps,
            STRIP_ROWS=strip.rows,
            BLOCK_D=MERGE_COLS,
            **launch_options(2),
        )
        gram, norm = gram_fwd(
            z,
            mean,
            1.0 / (batch - 1),
            store=save and on_batch(z),
            zero_diagonal=not on_batch(z),
        )
        _terms_kernel[(1,)](
            spread_partial_ptr=spread,
            hinge_partial_ptr=hinge,
            norm_partial_ptr=norm,
            diagonal_partial_ptr=diagonal,
            terms_ptr=terms,
            num_spread=spread.numel(),
            num_hinge=hinge.numel(),
            num_norm=norm.numel(),
            spread_scale=2.0 / ((num_slots - 1) * batch * dim),
            hinge_scale=1.0 / (num_slots * dim),
            norm_scale=2.0 / (num_slots * dim),
            ON_BATCH=on_batch(z),
            BLOCK=1024,
            **launch_options(4),
        )
    return terms, mean, var, z_mean, gram


def _outputs(
    z: torch.Tensor, gamma: float, eps: float, save: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    num_slots, batch, dim = z.shape
    gram = (num_slots, batch, batch) if save and on_batch(z) else (0,)
    return (
        z.new_empty((3,), dtype=torch.float32),
        z.new_empty((num_slots, dim), dtype=torch.float32),
        z.new_empty((num_slots, dim), dtype=torch.float32),
        z.new_empty((batch if save else 0, dim), dtype=torch.float32),
        z.new_empty(gram, dtype=torch.float32),
    )


def vicreg_bwd(
    z: torch.Tensor,
    mean: torch.Tensor,
    var: torch.Tensor,
    z_mean: torch.Tensor,
    gram: torch.Tensor,
    dterms: torch.Tensor,
    gamma: float,
    eps: float,
) -> torch.Tensor:
    """dz [P, B, D], contiguous, in z's dtype."""
    num_slots, batch, dim = z.shape
    dz = torch.empty(z.shape, dtype=z.dtype, device=z.device)
    # The Gram of float16 features may exceed float16; TF32 holds its range and their mantissa.
    wide = z.dtype == torch.float16
    tile = grad_tile(z.dtype != torch.bfloat16)
    grid = (triton.cdiv(batch, tile.rows), triton.cdiv(dim, tile.cols), num_slots)
    with device_guard(z):
        if not on_batch(z):
            gram, _ = gram_fwd(
                z, mean, 1.0 / (batch - 1), store=True, zero_diagonal=not on_batch(z)
            )
        _vicreg_bwd_kernel[grid](
            z_ptr=z,
            mean_ptr=mean,
            var_ptr=var,
            z_mean_ptr=z_mean,
            gram_ptr=gram,
            dterms_ptr=dterms.contiguous(),
            dz_ptr=dz,
            batch=batch,
            dim=dim,
            stride_z_p=z.stride(0),
            stride_z_b=z.stride(1),
            stride_z_d=z.stride(2),
            gamma=gamma,
            eps=eps,
            invariance_scale=4.0 / ((num_slots - 1) * batch * dim),
            variance_scale=1.0 / (num_slots * dim * (batch - 1)),
            covariance_scale=8.0 / (num_slots * dim * (batch - 1)),
            ON_BATCH=on_batch(z),
            TYPE=tl.float32 if wide else triton_type(z.dtype),
            PRECISION=dot_precision(z.dtype),
            BLOCK_B=tile.rows,
            BLOCK_D=tile.cols,
            BLOCK_K=tile.depth,
            **product_options(tile),
        )
    return dz


_fwd_op = torch.library.custom_op("bagssl_triton::vicreg_fwd", vicreg_fwd, mutates_args=())
_bwd_op = torch.library.custom_op("bagssl_triton::vicreg_bwd", vicreg_bwd, mutates_args=())
_fwd_op.register_fake(_outputs)


@_bwd_op.register_fake
def _(z, mean, var, z_mean, gram, dterms, gamma, eps):
    return torch.empty(z.shape, dtype=z.dtype, device=z.device)


class VICRegFunction(torch.autograd.Function):
    """z, gamma, eps -> terms [3]."""

    @staticmethod
    def forward(ctx: Any, z: torch.Tensor, gamma: float, eps: float) -> torch.Tensor:
        terms, *stats = _fwd_op(z, gamma, eps, ctx.needs_input_grad[0])
        ctx.save_for_backward(z, *stats)
        ctx.scalars = (gamma, eps)
        return terms

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dterms: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return _bwd_op(*ctx.saved_tensors, dterms, *ctx.scalars), None, None


def vicreg(
    z: torch.Tensor, *, gamma: float = 1.0, eps: float = 1e-4
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Invariance, variance and covariance of z, unweighted; those of the authors' code at P = 2.

    Args:
        z: Projections [P, B, D], P >= 2 slots of B >= 2 images, any strides.
        gamma: Standard deviation below which a feature is pushed apart.
        eps: Added to the variance before its root; positive.

    Returns:
        Three float32 scalars. Non-finite values make them non-finite.

    Raises:
        ValueError: on anything else.
    """
    check_tensors("vicreg", z=z)
    check_rank("vicreg", 3, "[P, B, D]", z=z)
    if eps <= 0:
        raise refuse("vicreg", f"eps = {eps}", "eps > 0")
    if z.shape[0] < 2 or z.shape[1] < 2 or z.shape[2] < 1:
        raise refuse("vicreg", f"z of shape {list(z.shape)}", "P >= 2, B >= 2 and D >= 1")
    invariance, variance, covariance = VICRegFunction.apply(z, gamma, eps).unbind(0)
    return invariance, variance, covariance
