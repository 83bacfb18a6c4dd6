"""The coding rate by B x B Grams: `R = 1/2 logdet(I_B + a Z Z^T)`, a = D / (B eps) (Sylvester).

The Gram is taken on the shorter side, min(B, D), for all slots in one batched GEMM, and one batched
Cholesky gives R = sum log diag L. Gradient: dR/dZ = a (I + a Z Z^T)^-1 Z, the inverse from the
same factor. Gram and factor are float64: rows that agree, or are very long or short, make R a small
difference that float32 loses. Saved for backward: z and the inverse, P min(B, D)^2 words.

Coding rate: Yu et al. 2020 (2006.08558); this scaling: EMP-SSL (2304.03977).
"""

from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op("bagssl::tcr_cpu", mutates_args=(), device_types="cpu")
def tcr_forward(z: Tensor, eps: float, save: bool) -> tuple[Tensor, Tensor]:
    """Rate [P] and, if `save`, the inverse Gram [P, m, m], m = min(B, D)."""
    _, batch, dim = z.shape
    rate, inverse = _outputs(z, eps, save)
    with torch.autocast("cpu", enabled=False):
        z = z.double()
        left, right = (z, z.mT) if batch <= dim else (z.mT, z)
        identity = torch.eye(left.shape[1], dtype=z.dtype)
        gram = torch.baddbmm(identity, left, right, alpha=dim / (batch * eps))
        factor, info = torch.linalg.cholesky_ex(gram)
        logs = factor.diagonal(dim1=1, dim2=2).log().sum(dim=1)
        # No eigenvalue is below 1: only a slot with non-finite values has no factor.
        rate.copy_(logs.masked_fill(info != 0, torch.nan))
        if save:
            inverse.copy_(torch.cholesky_inverse(factor))
    return rate, inverse


@tcr_forward.register_fake
def _outputs(z: Tensor, eps: float, save: bool) -> tuple[Tensor, Tensor]:
    num_slots, batch, dim = z.shape
    short = min(batch, dim)
    dtype = torch.float64 if z.dtype == torch.float64 else torch.float32
    return (
        z.new_empty(num_slots, dtype=dtype),
        z.new_empty((num_slots if save else 0, short, short), dtype=dtype),
    )


@torch.library.custom_op("bagssl::tcr_cpu_backward", mutates_args=(), device_types="cpu")
def tcr_backward(drate: Tensor, z: Tensor, inverse: Tensor, eps: float) -> Tensor:
    """dz [P, B, D] in z's dtype."""
    _, batch, dim = z.shape
    with torch.autocast("cpu", enabled=False):
        inverse = inverse * (drate * (dim / (batch * eps)))[:, None, None]
        rows = z.to(inverse.dtype)
        dz = inverse @ rows if batch <= dim else rows @ inverse
    return dz.to(z.dtype)


@tcr_backward.register_fake
def _(drate: Tensor, z: Tensor, inverse: Tensor, eps: float) -> Tensor:
    return torch.empty_like(z, memory_format=torch.contiguous_format)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    z, ctx.eps, _ = inputs
    ctx.save_for_backward(z, output[1])


def _backward(ctx: Any, drate: Tensor, _: Tensor) -> tuple[Tensor, None, None]:
    z, inverse = ctx.saved_tensors
    return tcr_backward(drate, z, inverse, ctx.eps), None, None


tcr_forward.register_autograd(_backward, setup_context=_setup_context)


def tcr(z: Tensor, *, eps: float = 0.2) -> Tensor:
    """Coding rate [P] of `z` [P, B, D], in float32 (float64 if z is); see `ops.tcr`."""
    rate, _ = tcr_forward(z, eps, z.requires_grad and torch.is_grad_enabled())
    return rate
