"""VICReg's terms in O(P), with the Gram on the shorter side; the formulas are the reference's.

    invariance = 2/(P-1) sum_p mean_{b,d} (z_p - z_mean)^2     = the mean over all pairs of slots
    sum_{i != j} C_ij^2 = (|G|_F^2 - sum_j m_j^2) / (B-1)^2    m_j = sum_b Zc_bj^2 = (B-1) Var_j

G = Zc Zc^T [B, B] where B < D, else Zc^T Zc [D, D] (whose diagonal is m): equal in norm. Gradient:
one more GEMM, d|G|_F^2/dZ = 4 G Zc (or 4 Zc G), onto which everything else that dz is made of has
been laid before. With half of G by symmetry, 1.6 min(B, D) B D multiply-adds per slot where
autograd through D x D needs 3 B D^2. All slots go through one batched GEMM. Temporary memory: one
array of z's size in forward, one beside dz in backward; saved: z, the means, m and G,
P min(B, D)^2 words.

VICReg: Bardes, Ponce, LeCun 2022 (2105.04906).
"""

from typing import Any

import torch
from torch import Tensor

_SavedOutputs = tuple[Tensor, Tensor, Tensor, Tensor]


@torch.library.custom_op("bagssl::vicreg_cpu", mutates_args=(), device_types="cpu")
def vicreg_forward(z: Tensor, gamma: float, eps: float) -> _SavedOutputs:
    """(terms [3], mean [P, 1, D], squares m [P, 1, D], gram [P, s, s]), s = min(B, D)."""
    num_slots, batch, dim = z.shape
    terms, mean, squares, gram = _outputs(z, gamma, eps)
    with torch.autocast("cpu", enabled=False):
        z = z.to(terms.dtype).contiguous()
        torch.sum(z, dim=1, keepdim=True, out=mean)
        mean /= batch
        zc = z - mean
        if batch < dim:
            _gram(zc, gram)
            buffer = torch.mul(zc, zc, out=zc)
            torch.sum(buffer, dim=1, keepdim=True, out=squares)
            off_diagonal = _sum_of_squares(gram) - _sum_of_squares(squares)
        else:
            _gram(zc.mT, gram)
            diagonal = gram.diagonal(dim1=1, dim2=2)
            squares.copy_(diagonal[:, None])
            # Whitened features leave little beside the diagonal: never subtract it from the sum.
            diagonal.zero_()
            off_diagonal = _sum_of_squares(gram)
            buffer = zc
        std = torch.sqrt(squares / (batch - 1) + eps)
        distance = torch.sub(z, z.mean(dim=0), out=buffer)
        terms[0] = _sum_of_squares(distance) * (2 / ((num_slots - 1) * batch * dim))
        terms[1] = torch.relu(gamma - std).mean()
        terms[2] = off_diagonal * (2 / (num_slots * dim * (batch - 1) ** 2))
    return terms, mean, squares, gram


@vicreg_forward.register_fake
def _outputs(z: Tensor, gamma: float, eps: float) -> _SavedOutputs:
    num_slots, batch, dim = z.shape
    short = min(batch, dim)
    dtype = torch.float64 if z.dtype == torch.float64 else torch.float32
    return (
        z.new_empty(3, dtype=dtype),
        z.new_empty((num_slots, 1, dim), dtype=dtype),
        z.new_empty((num_slots, 1, dim), dtype=dtype),
        z.new_empty((num_slots, short, short), dtype=dtype),
    )


@torch.library.custom_op("bagssl::vicreg_cpu_backward", mutates_args=(), device_types="cpu")
def vicreg_backward(
    dterms: Tensor, z: Tensor, mean: Tensor, squares: Tensor, gram: Tensor, gamma: float, eps: float
) -> Tensor:
    """dz [P, B, D] in z's dtype."""
    num_slots, batch, dim = z.shape
    dinvariance, dvariance, dcovariance = dterms.tolist()
    pull = dinvariance * 4 / ((num_slots - 1) * batch * dim)
    push = dcovariance * 8 / (num_slots * dim * (batch - 1) ** 2)
    with torch.autocast("cpu", enabled=False):
        rows = z.to(mean.dtype).contiguous()
        zc = rows - mean
        std = torch.sqrt(squares / (batch - 1) + eps)
        widen = torch.where(std < gamma, dvariance / (num_slots * dim * (batch - 1)) / std, 0.0)
        # dz = pull (z - z_mean) - widen zc + push (G zc - m zc), and z = zc + mean
        of_zc = pull - widen
        if batch < dim:  # else G has no diagonal
            of_zc -= push * squares
        dz = torch.addcmul(pull * mean, zc, of_zc)
        dz.sub_(rows.mean(dim=0), alpha=pull)
        left, right = (gram, zc) if batch < dim else (zc, gram)
        dz.baddbmm_(left, right, alpha=push)
    return dz.to(z.dtype)


@vicreg_backward.register_fake
def _(
    dterms: Tensor, z: Tensor, mean: Tensor, squares: Tensor, gram: Tensor, gamma: float, eps: float
) -> Tensor:
    return torch.empty_like(z, memory_format=torch.contiguous_format)


def _gram(rows: Tensor, out: Tensor) -> None:
    """rows @ rows.mT for [P, s, k], by four strips below the diagonal that are then mirrored."""
    size = rows.shape[1]
    step = max(32, -(-size // 4))
    for start in range(0, size, step):
        stop = min(size, start + step)
        torch.bmm(rows[:, start:stop], rows[:, :stop].mT, out=out[:, start:stop, :stop])
        out[:, :start, start:stop] = out[:, start:stop, :start].mT


def _sum_of_squares(x: Tensor) -> Tensor:
    """Row by row: one float32 accumulator for all is off by 5e-4 at 8M elements (torch 2.14)."""
    return torch.linalg.vector_norm(x, dim=-1).square().sum()


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: _SavedOutputs) -> None:
    z, ctx.gamma, ctx.eps = inputs
    ctx.save_for_backward(z, *output[1:])


def _backward(ctx: Any, dterms: Tensor, *_: Tensor) -> tuple[Tensor, None, None]:
    return vicreg_backward(dterms, *ctx.saved_tensors, ctx.gamma, ctx.eps), None, None


vicreg_forward.register_autograd(_backward, setup_context=_setup_context)


def vicreg(z: Tensor, *, gamma: float = 1.0, eps: float = 1e-4) -> tuple[Tensor, Tensor, Tensor]:
    """Invariance, variance, covariance of `z` [P, B, D] in float32 (float64 if z is)."""
    terms, *_ = vicreg_forward(z, gamma, eps)
    invariance, variance, covariance = terms.unbind()
    return invariance, variance, covariance
