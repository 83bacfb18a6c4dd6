# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""bag_pool: mean of a bag's patches and how closely they agree, in one read of them.

    mean[b]      = 1/P sum_p x[p, b]                               (or mean / |mean|)
    deviation[b] = 1/(P D) sum_{p,d} (x[p, b, d] - mean[b, d])^2
    cosine[b]    = 1/P sum_p cos(x[p, b], mean[b])

x [P, B, D] float32, bfloat16 or float16; mean [B, D], deviation and cosine [B] are float32.

One program per image keeps a running mean and, for the cosine, the mean direction
u = 1/P sum_p x_p / |x_p| in registers: the mean cosine is <u, mean> / |mean|, so that x need not be
read again. The deviation is Welford's, which does not cancel.

Saved for backward: x, the mean (which is the result, or the result and its norm), and u if the
cosine was asked for. Bytes: forward x once, the results once; backward x, mean, u and the gradients
once, dx once; the plain mean's backward reads no x.
FLOPs: 2 to 9 per element forward, up to 10 backward: bound by memory.

EMP-SSL (arXiv 2304.03977) pools and pulls together by exactly these.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from ._common import check_rank, check_tensors, device_guard, launch_options, refuse
from ._tuning import next_power_of_2, row_warps

# A row of 8192 fits the registers of 16 warps. Wider ones are right and slower: on NVIDIA about a
# hundred instructions per thread spill registers to local memory.
MAX_DIMS = 16384
EPS = 1e-8  # norms below this count as this, as in torch.nn.functional.cosine_similarity


@triton.jit
def _bag_pool_fwd_kernel(
    x_ptr,  # [P, B, D]
    pooled_ptr,  # [B, D]
    norm_ptr,  # [B], of the mean, kept for backward
    deviation_ptr,  # [B]
    cosine_ptr,  # [B]
    direction_ptr,  # [B, D], kept for backward
    num_patches,
    num_dims,
    stride_x_p,
    stride_x_b,
    stride_x_d,
    eps,
    NORMALIZE: tl.constexpr,
    HAS_DEVIATION: tl.constexpr,
    HAS_COSINE: tl.constexpr,
    STORE_DIRECTION: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    pid_b = tl.program_id(0).to(tl.int64)

    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < num_dims
    x_row_ptr = x_ptr + pid_b * stride_x_b + offs_d.to(tl.int64) * stride_x_d

    mean = tl.zeros((BLOCK_D,), tl.float32)
    direction = tl.zeros((BLOCK_D,), tl.float32)
    spread = tl.zeros((BLOCK_D,), tl.float32)
    for p in range(num_patches):
        x = tl.load(x_row_ptr, mask=mask_d, other=0.0).to(tl.float32)  # [BLOCK_D]
        x_row_ptr += stride_x_p
        delta = x - mean
        mean += delta / (p + 1)
        if HAS_DEVIATION:
            spread += delta * (x - mean)
        if HAS_COSINE:
            direction += x / tl.maximum(tl.sqrt(tl.sum(x * x)), eps)

    norm = tl.maximum(tl.sqrt(tl.sum(mean * mean)), eps)
    pooled = mean
    if NORMALIZE:
        pooled = mean / norm
        tl.store(norm_ptr + pid_b, norm)
    out_offs = pid_b * num_dims + offs_d
    tl.store(pooled_ptr + out_offs, pooled, mask=mask_d)
    if HAS_DEVIATION:
        deviation = tl.sum(spread) / (num_dims * 1.0 * num_patches)
        tl.store(deviation_ptr + pid_b, deviation)
    if HAS_COSINE:
        direction = direction / num_patches
        tl.store(cosine_ptr + pid_b, tl.sum(direction * mean) / norm)
        if STORE_DIRECTION:
            tl.store(direction_ptr + out_offs, direction, mask=mask_d)


@triton.jit
def _bag_pool_bwd_kernel(
    x_ptr,  # [P, B, D]
    pooled_ptr,  # [B, D]
    norm_ptr,  # [B]
    direction_ptr,  # [B, D]
    dpooled_ptr,  # [B, D]
    ddeviation_ptr,  # [B]
    dcosine_ptr,  # [B]
    dx_ptr,  # [P, B, D] contiguous
    num_patches,
    num_bags,
    num_dims,
    stride_x_p,
    stride_x_b,
    stride_x_d,
    eps,
    NORMALIZE: tl.constexpr,
    HAS_DEVIATION: tl.constexpr,
    HAS_COSINE: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    pid_b = tl.program_id(0).to(tl.int64)

    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < num_dims
    row_offs = pid_b * num_dims + offs_d
    x_row_ptr = x_ptr + pid_b * stride_x_b + offs_d.to(tl.int64) * stride_x_d
    dx_row_ptr = dx_ptr + row_offs
    stride_dx_p = tl.full((), 1, tl.int64) * num_bags * num_dims

    # dmean [BLOCK_D]: everything that reaches a patch through the mean, the same for each.
    dmean = tl.load(dpooled_ptr + row_offs, mask=mask_d, other=0.0).to(tl.float32)
    mean = tl.zeros((BLOCK_D,), tl.float32)
    if NORMALIZE or HAS_DEVIATION or HAS_COSINE:
        mean = tl.load(pooled_ptr + row_offs, mask=mask_d, other=0.0)
        if NORMALIZE:
            mean *= tl.load(norm_ptr + pid_b)
    norm = tl.sqrt(tl.sum(mean * mean))
    if NORMALIZE:
        # Below eps the divisor is a constant.
        inverse = 1.0 / tl.maximum(norm, eps)
        along = tl.where(norm > eps, tl.sum(dmean * mean) * inverse * inverse, 0.0)
        dmean = (dmean - along * mean) * inverse
    unit = mean
    dcosine = 0.0
    if HAS_COSINE:
        dcosine = tl.load(dcosine_ptr + pid_b).to(tl.float32)
        direction = tl.load(direction_ptr + row_offs, mask=mask_d, other=0.0)
        inverse = 1.0 / tl.maximum(norm, eps)
        unit = mean * inverse
        along = tl.where(norm > eps, tl.sum(direction * unit), 0.0)
        dmean += dcosine * (direction - along * unit) * inverse
    dmean = dmean / num_patches
    dcosine = dcosine / num_patches
    pull = 0.0
    if HAS_DEVIATION:
        ddeviation = tl.load(ddeviation_ptr + pid_b).to(tl.float32)
        pull = 2.0 * ddeviation / (num_dims * 1.0 * num_patches)

    for _ in range(num_patches):
        dx = dmean
        if HAS_DEVIATION or HAS_COSINE:
            x = tl.load(x_row_ptr, mask=mask_d, other=0.0).to(tl.float32)  # [BLOCK_D]
            x_row_ptr += stride_x_p
            if HAS_DEVIATION:
                dx += pull * (x - mean)
            if HAS_COSINE:
                x_norm = tl.sqrt(tl.sum(x * x))
                inverse = 1.0 / tl.maximum(x_norm, eps)
                along = tl.where(x_norm > eps, tl.sum(x * unit) * inverse * inverse, 0.0)
                dx += dcosine * (unit - along * x) * inverse
        tl.store(dx_row_ptr, dx.to(dx_ptr.dtype.element_ty), mask=mask_d)
        dx_row_ptr += stride_dx_p


def bag_pool_fwd(
    x: torch.Tensor, normalize: bool, deviation: bool, cosine: bool, save: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(pooled [B, D], norm [B], deviation [B], cosine [B], u [B, D]); unneeded ones are empty."""
    num_patches, num_bags, num_dims = x.shape
    outs = _outputs(x, normalize, deviation, cosine, save)
    pooled, norm, dev, cos, direction = outs
    if pooled.numel() == 0:
        return outs
    block_d = next_power_of_2(num_dims)
    with device_guard(x):
        _bag_pool_fwd_kernel[(num_bags,)](
            x_ptr=x,
            pooled_ptr=pooled,
            norm_ptr=norm,
            deviation_ptr=dev,
            cosine_ptr=cos,
            direction_ptr=direction,
            num_patches=num_patches,
            num_dims=num_dims,
            stride_x_p=x.stride(0),
            stride_x_b=x.stride(1),
            stride_x_d=x.stride(2),
            eps=EPS,
            NORMALIZE=normalize,
            HAS_DEVIATION=deviation,
            HAS_COSINE=cosine,
            STORE_DIRECTION=direction.numel() > 0,
            BLOCK_D=block_d,
            **launch_options(row_warps(block_d)),
        )
    return outs


def _outputs(
    x: torch.Tensor, normalize: bool, deviation: bool, cosine: bool, save: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    _, num_bags, num_dims = x.shape
    return (
        x.new_empty((num_bags, num_dims), dtype=torch.float32),
        x.new_empty((num_bags if normalize else 0,), dtype=torch.float32),
        x.new_empty((num_bags if deviation else 0,), dtype=torch.float32),
        x.new_empty((num_bags if cosine else 0,), dtype=torch.float32),
        x.new_empty((num_bags if save and cosine else 0, num_dims), dtype=torch.float32),
    )


def bag_pool_bwd(
    x: torch.Tensor,
    pooled: torch.Tensor,
    norm: torch.Tensor,
    direction: torch.Tensor,
    dpooled: torch.Tensor,
    ddeviation: torch.Tensor,
    dcosine: torch.Tensor,
    normalize: bool,
    deviation: bool,
    cosine: bool,
) -> torch.Tensor:
    """dx [P, B, D], contiguous, in x's dtype."""
    num_patches, num_bags, num_dims = x.shape
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if dx.numel() == 0:
        return dx
    block_d = next_power_of_2(num_dims)
    with device_guard(x):
        _bag_pool_bwd_kernel[(num_bags,)](
            x_ptr=x,
            pooled_ptr=pooled,
            norm_ptr=norm,
            direction_ptr=direction,
            dpooled_ptr=dpooled.contiguous(),
            ddeviation_ptr=ddeviation.contiguous(),
            dcosine_ptr=dcosine.contiguous(),
            dx_ptr=dx,
            num_patches=num_patches,
            num_bags=num_bags,
            num_dims=num_dims,
            stride_x_p=x.stride(0),
            stride_x_b=x.stride(1),
            stride_x_d=x.stride(2),
            eps=EPS,
            NORMALIZE=normalize,
            HAS_DEVIATION=deviation,
            HAS_COSINE=cosine,
            BLOCK_D=block_d,
            **launch_options(row_warps(block_d)),
        )
    return dx


_fwd_op = torch.library.custom_op("bagssl_triton::bag_pool_fwd", bag_pool_fwd, mutates_args=())
_bwd_op = torch.library.custom_op("bagssl_triton::bag_pool_bwd", bag_pool_bwd, mutates_args=())
_fwd_op.register_fake(_outputs)


@_bwd_op.register_fake
def _(x, pooled, norm, direction, dpooled, ddeviation, dcosine, normalize, deviation, cosine):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


class BagPoolFunction(torch.autograd.Function):
    """x, flags -> (pooled, deviation, cosine)."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, normalize: bool, deviation: bool, cosine: bool
    ) -> tuple[torch.Tensor, ...]:
        pooled, norm, dev, cos, direction = _fwd_op(
            x, normalize, deviation, cosine, ctx.needs_input_grad[0]
        )
        ctx.save_for_backward(x, pooled, norm, direction)
        ctx.flags = (normalize, deviation, cosine)
        return pooled, dev, cos

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return _bwd_op(*ctx.saved_tensors, *grads, *ctx.flags), None, None, None


def bag_pool(
    x: torch.Tensor, *, normalize: bool = False, deviation: bool = False, cosine: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Pools a bag's patches.

    Args:
        x: Embeddings [P, B, D] in float32, bfloat16 or float16, any strides, D <= 16384.
        normalize: Return the L2-normalized mean instead of the mean.
        deviation: Also return the mean squared deviation from the mean.
        cosine: Also return the mean cosine of the patches to their mean.

    Returns:
        (mean [B, D], deviation [B] or None, cosine [B] or None), float32. Non-finite values
        propagate within their own bag.

    Raises:
        ValueError: on anything else, an empty bag (P = 0 or D = 0) included.
    """
    check_tensors("bag_pool", x=x)
    check_rank("bag_pool", 3, "[P, B, D]", x=x)
    if x.shape[0] == 0 or not 1 <= x.shape[2] <= MAX_DIMS:
        raise refuse("bag_pool", f"x of shape {list(x.shape)}", f"P >= 1 and 1 <= D <= {MAX_DIMS}")
    pooled, dev, cos = BagPoolFunction.apply(x, normalize, deviation, cosine)
    return pooled, dev if deviation else None, cos if cosine else None
