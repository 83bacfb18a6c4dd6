"""A bag's mean, deviation and mean cosine by `csrc/bag_pool.h`, image by image.

With n_p = |x_p|, m the mean, M = |m|, u = m / M and w_p = 1 / (P n_p):

    cosine = 1/P sum_p c_p,   c_p = (x_p . m) / (n_p M)
    d = sum_p w_p x_p
    dcosine/dx_p = (d - (d . u) u) / (P M) + w_p m / M - c_p x_p / (P n_p^2)

so dx is one row per image plus multiples of x_p and m that are numbers per patch. Memory is read
once in forward, and read and written once in backward: a bag is passed over again while it is in
the cache. Half precision is computed on a float32 copy. Saved for backward: x, the mean, norms and
cosines [P, B].
"""

from typing import Any

import torch
from torch import Tensor

from bagssl_fast._extension import _C

EPS = 1e-8  # smallest norm divided by, as in F.cosine_similarity

_Saved = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@torch.library.custom_op("bagssl::bag_pool_cpu", mutates_args=(), device_types="cpu")
def bag_pool_forward(x: Tensor, normalize: bool, deviation: bool, cosine: bool) -> _Saved:
    """(pooled [B, D], deviation [B], cosine [B], mean [B, D], norms [P, B], cosines [P, B]).

    What is not needed is empty; the last three are for backward.
    """
    outputs = _outputs(x, normalize, deviation, cosine)
    if x.numel() == 0:
        return outputs[0].zero_(), *(t.zero_() for t in outputs[1:])
    pooled, spread, agreement, kept_mean, norms, cosines = outputs
    num_patches, _, dim = x.shape
    mean = kept_mean if normalize else pooled
    _C.bag_pool(
        _rows(x, pooled.dtype),
        mean=mean.numpy(),
        distance=spread.numpy() if deviation else None,
        norm=norms.numpy() if cosine else None,
        dot=cosines.numpy() if cosine else None,
        num_threads=torch.get_num_threads(),
    )
    if normalize:
        torch.div(mean, _norms(mean).clamp_min(EPS)[:, None], out=pooled)
    if deviation:
        spread /= num_patches * dim
    if cosine:
        cosines /= norms.clamp_min(EPS) * _norms(mean).clamp_min(EPS)
        torch.mean(cosines, dim=0, out=agreement)
    return outputs


@bag_pool_forward.register_fake
def _outputs(x: Tensor, normalize: bool, deviation: bool, cosine: bool) -> _Saved:
    num_patches, batch, dim = x.shape
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return (
        x.new_empty((batch, dim), dtype=dtype),
        x.new_empty(batch if deviation else 0, dtype=dtype),
        x.new_empty(batch if cosine else 0, dtype=dtype),
        x.new_empty((batch if normalize else 0, dim), dtype=dtype),
        x.new_empty((num_patches, batch if cosine else 0), dtype=dtype),
        x.new_empty((num_patches, batch if cosine else 0), dtype=dtype),
    )


@torch.library.custom_op("bagssl::bag_pool_cpu_backward", mutates_args=(), device_types="cpu")
def bag_pool_backward(
    dpooled: Tensor,
    dspread: Tensor,
    dagreement: Tensor,
    x: Tensor,
    means: Tensor,
    norms: Tensor,
    cosines: Tensor,
    normalize: bool,
) -> Tensor:
    """dx [P, B, D] in x's dtype; `dspread` or `dagreement` is empty where it was not asked for."""
    num_patches, _, dim = x.shape
    dx = torch.empty(x.shape, dtype=means.dtype)
    if x.numel() == 0:
        return dx.to(x.dtype)
    factors: dict[str, Tensor] = {}
    mean_norm = _norms(means)
    inverse = 1 / mean_norm.clamp_min(EPS)
    unit_scale = torch.where(mean_norm > EPS, inverse, 0.0)  # below EPS a norm is a constant
    dmean = dpooled
    if normalize:
        unit = means * unit_scale[:, None]
        dmean = (dmean - unit * (unit * dmean).sum(dim=1, keepdim=True)) * inverse[:, None]
    if dspread.numel():
        of_x = dspread * (2 / dim)
        dmean = dmean - of_x[:, None] * means
        factors["of_x"] = (of_x / num_patches).expand(num_patches, -1)
    if dagreement.numel():
        weight = 1 / (norms.clamp_min(EPS) * num_patches)  # [P, B]
        per_mean = dagreement * inverse
        shrink = torch.where(norms > EPS, cosines * weight.square() * num_patches, 0.0)
        factors["of_x"] = factors.get("of_x", 0.0) - dagreement * shrink
        factors |= {"of_mean": weight * per_mean, "weight": weight}
        factors |= {"direction": per_mean / num_patches, "unit_scale": unit_scale}
    _C.bag_pool_backward(
        _rows(x, means.dtype),
        dx=dx.numpy(),
        dmean=dmean.contiguous().numpy(),
        mean=means.numpy(),
        num_threads=torch.get_num_threads(),
        **{name: factor.contiguous().numpy() for name, factor in factors.items()},
    )
    return dx.to(x.dtype)


@bag_pool_backward.register_fake
def _(
    dpooled: Tensor,
    dspread: Tensor,
    dagreement: Tensor,
    x: Tensor,
    means: Tensor,
    norms: Tensor,
    cosines: Tensor,
    normalize: bool,
) -> Tensor:
    return x.new_empty(x.shape)


def _rows(x: Tensor, dtype: torch.dtype) -> Any:
    """x [P, B, D] with packed rows, as numpy."""
    x = x.detach().to(dtype)
    return (x if x.stride(2) == 1 else x.contiguous()).numpy()


def _norms(rows: Tensor) -> Tensor:
    return torch.linalg.vector_norm(rows, dim=1)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: _Saved) -> None:
    x, ctx.normalize, _, _ = inputs
    pooled, _, _, kept_mean, norms, cosines = output
    ctx.save_for_backward(x, kept_mean if ctx.normalize else pooled, norms, cosines)


def _backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
    dpooled, dspread, dagreement, *_ = grads
    dx = bag_pool_backward(dpooled, dspread, dagreement, *ctx.saved_tensors, ctx.normalize)
    return dx, None, None, None


bag_pool_forward.register_autograd(_backward, setup_context=_setup_context)


def bag_pool(
    x: Tensor, *, normalize: bool = False, deviation: bool = False, cosine: bool = False
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Mean [B, D], deviation [B] and cosine [B] of `x` [P, B, D]; see `ops.bag_pool`."""
    pooled, spread, agreement, *_ = bag_pool_forward(x, normalize, deviation, cosine)
    return pooled, spread if deviation else None, agreement if cosine else None
