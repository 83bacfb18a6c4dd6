"""A bag's mean, deviation and mean cosine, a few images at a time while they are in the cache.

With n_p = |x_p|, m the mean, M = |m| and u = 1/P sum_p x_p / n_p:

    cosine = 1/P sum_p c_p,   c_p = (x_p . m) / (n_p M)
    dcosine/dx_p = 1/P [ m / (n_p M) - c_p x_p / n_p^2 + u / M - cosine m / M^2 ]

so dx is one row per image plus multiples of x_p and m that are numbers per patch. Memory is read
once in forward, and read and written once in backward: only a chunk of 2 MiB is passed over again.
Saved for backward: x, the mean, norms and cosines [P, B].
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-8  # smallest norm divided by, as in F.cosine_similarity
CHUNK = 1 << 19  # elements passed over together; two such arrays fit a cache of 4 MiB

_Saved = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@torch.library.custom_op("bagssl::bag_pool_cpu", mutates_args=(), device_types="cpu")
def bag_pool_forward(x: Tensor, normalize: bool, deviation: bool, cosine: bool) -> _Saved:
    """(pooled [B, D], deviation [B], cosine [B], mean [B, D], norms [P, B], cosines [P, B]).

    What is not needed is empty; the last three are for backward.
    """
    outputs = _outputs(x, normalize, deviation, cosine)
    pooled, spread, agreement, kept_mean, norms, cosines = outputs
    with torch.autocast("cpu", enabled=False):
        for part in _chunks(x):
            rows = x[:, part].to(pooled.dtype)
            mean = rows.mean(dim=0)
            pooled[part] = F.normalize(mean, dim=1, eps=EPS) if normalize else mean
            if deviation:
                distance = torch.linalg.vector_norm(rows - mean, dim=2)
                spread[part] = distance.square().mean(dim=0) / x.shape[2]
            if cosine:
                norm = torch.linalg.vector_norm(rows, dim=2)  # [P, b]
                dots = (rows.transpose(0, 1) @ mean[:, :, None]).squeeze(2).T
                mean_norm = torch.linalg.vector_norm(mean, dim=1).clamp_min(EPS)
                norms[:, part] = norm
                cosines[:, part] = dots / (norm.clamp_min(EPS) * mean_norm)
                agreement[part] = cosines[:, part].mean(dim=0)
            if normalize:
                kept_mean[part] = mean
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
    dx = x.new_empty(x.shape)
    with torch.autocast("cpu", enabled=False):
        for part in _chunks(x):
            rows, mean = x[:, part].to(means.dtype), means[part]
            mean_norm = torch.linalg.vector_norm(mean, dim=1, keepdim=True)  # [b, 1]
            inverse = 1 / mean_norm.clamp_min(EPS)
            # Below EPS a norm counts as EPS, a constant.
            unit = torch.where(mean_norm > EPS, mean * inverse, 0.0)

            dmean = dpooled[part]
            if normalize:
                dmean = (dmean - unit * (unit * dmean).sum(dim=1, keepdim=True)) * inverse
            of_x = rows.new_zeros(())
            if dspread.numel():
                of_x = dspread[part, None] * (2 / dim)  # [b, 1]
                dmean = dmean - of_x * mean
            if dagreement.numel():
                dcosine, norm = dagreement[part, None], norms[:, part, None]
                inverses = 1 / norm.clamp_min(EPS)  # [P, b, 1]
                direction = (inverses.permute(1, 2, 0) @ rows.transpose(0, 1)).squeeze(1)
                direction /= num_patches
                along = (direction * unit).sum(dim=1, keepdim=True)
                dmean = dmean + dcosine * inverse * (direction - along * unit)
                shrink = torch.where(norm > EPS, cosines[:, part, None] * inverses.square(), 0.0)
                of_x = of_x - dcosine * shrink  # [P, b, 1]
            out = dx[:, part] if dx.dtype == rows.dtype else torch.empty_like(rows)
            torch.addcmul(dmean / num_patches, rows, of_x / num_patches, out=out)
            if dagreement.numel():
                out.addcmul_(mean * inverse, dcosine * inverses / num_patches)
            if dx.dtype != rows.dtype:
                dx[:, part] = out
    return dx


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


def _chunks(x: Tensor) -> Iterator[slice]:
    """Slices of images whose patches together have about `CHUNK` elements."""
    num_patches, batch, dim = x.shape
    step = max(1, CHUNK // (num_patches * dim))
    return (slice(start, start + step) for start in range(0, batch, step))


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
