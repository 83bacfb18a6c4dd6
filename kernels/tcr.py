# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""tcr: the total coding rate of each slot, EMP-SSL's regularizer (arXiv 2304.03977).

    R(Z) = 1/2 logdet(I + a Z^T Z) = 1/2 logdet(I + a Z Z^T),   a = D / (B eps),  Z = z[p]

by the Gram on the shorter side (Sylvester's identity) of all slots in one launch and one batched
Cholesky of torch's: R = sum_i log L_ii. The Gram is float32; identity, Cholesky and inverse are
float64, as R of short or of similar rows is a small difference. Backward: for each slot
dz = dR a (I + a Gram)^-1 z, the product again one launch.

z [P, B, D] float32, bfloat16 or float16; R [P] float32, larger means more spread.
Saved: z, and the [P, B, B] inverse where B <= D; where D < B it is made again in backward.
FLOPs: min(B, D) B D P for the Gram, min(B, D)^3 P / 3 for the Cholesky, twice the Gram's and
min(B, D)^3 P for backward.
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
    product_options,
    refuse,
)
from ._gram import gram_fwd, gram_times, on_batch, triton_type
from ._tuning import grad_tile


@triton.jit
def _tcr_bwd_kernel(
    inverse_ptr,  # [P, R, R]
    z_ptr,  # [P, B, D]
    dout_ptr,  # [P]
    dz_ptr,  # [P, B, D] contiguous
    batch,
    dim,
    stride_z_p,
    stride_z_b,
    stride_z_d,
    scale,
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
    acc = gram_times(
        inverse_ptr, z_ptr, z_ptr, pid_p, offs_b, offs_d, batch, dim, stride_z_b, stride_z_d,
        False, ON_BATCH, TYPE, PRECISION, BLOCK_B, BLOCK_D, BLOCK_K,
    )  # fmt: skip

    dz = acc * (tl.load(dout_ptr + pid_p) * scale)
    dz_offs = (pid_p * batch + offs_b) * dim + offs_d
    mask = (offs_b < batch) & (offs_d < dim)
    tl.store(dz_ptr + dz_offs, dz.to(dz_ptr.dtype.element_ty), mask=mask)


def _factor(z: torch.Tensor, eps: float) -> torch.Tensor:
    """Cholesky factor [P, R, R] of I + a Gram in float64. NaN where z is not finite."""
    _, batch, dim = z.shape
    with device_guard(z):
        gram, _ = gram_fwd(z, None, dim / (batch * eps), store=True)
    gram = gram.double()
    gram.diagonal(dim1=1, dim2=2).add_(1.0)
    # No check: it would wait for the device. A slot with non-finite values fails and is made NaN.
    factor, info = torch.linalg.cholesky_ex(gram, check_errors=False)
    return torch.where((info == 0)[:, None, None], factor, torch.nan)


def _inverse(factor: torch.Tensor) -> torch.Tensor:
    """Inverse [P, R, R] of L L^T in float32: all slots at once, where cholesky_inverse loops."""
    eye = torch.eye(factor.shape[1], dtype=factor.dtype, device=factor.device)
    half = torch.linalg.solve_triangular(factor, eye.expand_as(factor), upper=False)
    return (half.mT @ half).float().contiguous()


def tcr_fwd(z: torch.Tensor, eps: float, save: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """(R [P], inverse of I + a Gram [P, B, B] if saved and B <= D)."""
    factor = _factor(z, eps)
    rate = factor.diagonal(dim1=1, dim2=2).log().sum(dim=1).float()
    return rate, _inverse(factor) if save and on_batch(z) else rate.new_empty((0, 0, 0))


def tcr_bwd(z: torch.Tensor, inverse: torch.Tensor, dout: torch.Tensor, eps: float) -> torch.Tensor:
    """dz [P, B, D], contiguous, in z's dtype."""
    num_slots, batch, dim = z.shape
    dz = torch.empty(z.shape, dtype=z.dtype, device=z.device)
    if not on_batch(z):
        inverse = _inverse(_factor(z, eps))
    # The inverse of a well spread slot is below float16's range; TF32 has it, and its mantissa.
    wide = z.dtype == torch.float16
    tile = grad_tile(z.dtype != torch.bfloat16)
    grid = (triton.cdiv(batch, tile.rows), triton.cdiv(dim, tile.cols), num_slots)
    with device_guard(z):
        _tcr_bwd_kernel[grid](
            inverse_ptr=inverse,
            z_ptr=z,
            dout_ptr=dout.contiguous(),
            dz_ptr=dz,
            batch=batch,
            dim=dim,
            stride_z_p=z.stride(0),
            stride_z_b=z.stride(1),
            stride_z_d=z.stride(2),
            scale=dim / (batch * eps),
            ON_BATCH=on_batch(z),
            TYPE=tl.float32 if wide else triton_type(z.dtype),
            PRECISION=dot_precision(z.dtype),
            BLOCK_B=tile.rows,
            BLOCK_D=tile.cols,
            BLOCK_K=tile.depth,
            **product_options(tile),
        )
    return dz


_fwd_op = torch.library.custom_op("bagssl_triton::tcr_fwd", tcr_fwd, mutates_args=())
_bwd_op = torch.library.custom_op("bagssl_triton::tcr_bwd", tcr_bwd, mutates_args=())


@_fwd_op.register_fake
def _(z, eps, save):
    num_slots, batch, _ = z.shape
    shape = (num_slots, batch, batch) if save and on_batch(z) else (0, 0, 0)
    inverse = z.new_empty(shape, dtype=torch.float32)
    return z.new_empty((num_slots,), dtype=torch.float32), inverse


@_bwd_op.register_fake
def _(z, inverse, dout, eps):
    return torch.empty(z.shape, dtype=z.dtype, device=z.device)


class TCRFunction(torch.autograd.Function):
    """z, eps -> R [P]."""

    @staticmethod
    def forward(ctx: Any, z: torch.Tensor, eps: float) -> torch.Tensor:
        rate, inverse = _fwd_op(z, eps, ctx.needs_input_grad[0])
        ctx.save_for_backward(z, inverse)
        ctx.eps = eps
        return rate

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _bwd_op(*ctx.saved_tensors, dout, ctx.eps), None


def tcr(z: torch.Tensor, *, eps: float = 0.2) -> torch.Tensor:
    """Total coding rate of each slot.

    Args:
        z: Projections [P, B, D] in float32, bfloat16 or float16, any strides.
        eps: Distortion, positive, as in EMP-SSL's code (its paper's eps^2).

    Returns:
        [P] float32; a slot with non-finite values has the rate NaN.

    Raises:
        ValueError: on anything else, an empty slot included.
    """
    check_tensors("tcr", z=z)
    check_rank("tcr", 3, "[P, B, D]", z=z)
    if z.numel() == 0:
        raise refuse("tcr", f"z of shape {list(z.shape)}", "at least one slot, image and feature")
    if eps <= 0:
        raise refuse("tcr", f"eps = {eps}", "eps > 0")
    rate: torch.Tensor = TCRFunction.apply(z, eps)
    return rate
