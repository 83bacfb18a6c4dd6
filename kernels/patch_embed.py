# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""patch_embed: a linear layer over patches of uint8 images at arbitrary positions.

    y[p, b] = relu?(W . vec((patch(b, top, left) / 255 - mean) / std) + bias)

images uint8 [B, H, W, C], W [M, C, h, w], positions [P, 2] or [P, B, 2] -> y [P, B, M], W's dtype.

A product [P B, h w C] x [h w C, M] whose left side is gathered from the images as it is multiplied:
no patch exists in memory. Normalization is folded into the weights, around 128 so that little
cancels:

    y = sum_k (pixel_k - 128) V_k + v
    V = W / (255 std),  v = bias + sum_k W_k (128/255 - mean) / std

pixel - 128 is exact in every float type, bfloat16 included. V is laid out [h w C, M], the order of
the pixels in memory. Sums are float32.
Backward: dV = (pixels - 128)^T dy in parts of the patches, added in order, and dbias from the same
read of dy; dW = (dV + dbias (128 - 255 mean)) / (255 std). The ReLU's mask is the sign of y.
Saved: images, positions, y if there is a ReLU (it is the result), nothing else of its size.
FLOPs: 2 P B M h w C forward, the same backward. Bytes: the images, V and y.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from ._common import (
    FLOATS,
    check_rank,
    check_tensors,
    device_guard,
    dot_precision,
    product_options,
    refuse,
    sm_count,
)
from ._tuning import embed_grad_split, embed_grad_tile, embed_tile

Center = 128.0


@triton.jit
def _patch_offsets(
    positions_ptr, offs_n, rows, batch, height, width, patch_h, patch_w,
    stride_image_b, stride_image_h, stride_pos_p, stride_pos_b, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Offset of each patch's first byte; rows are (p, b). Kept inside the image whatever comes."""
    mask = offs_n < rows
    p = (offs_n // batch).to(tl.int64)
    b = (offs_n % batch).to(tl.int64)
    pos_ptr = positions_ptr + p * stride_pos_p + b * stride_pos_b
    top = tl.load(pos_ptr, mask=mask, other=0).to(tl.int64)
    left = tl.load(pos_ptr + 1, mask=mask, other=0).to(tl.int64)
    top = tl.minimum(tl.maximum(top, 0), height - patch_h)
    left = tl.minimum(tl.maximum(left, 0), width - patch_w)
    return b * stride_image_b + top * stride_image_h + left * CHANNELS


@triton.jit
def _patch_embed_fwd_kernel(
    images_ptr,  # [B, H, W, C] uint8
    positions_ptr,  # [P, B, 2]
    weight_ptr,  # [K, M], K = h w C
    bias_ptr,  # [M] float32
    out_ptr,  # [P B, M]
    rows,
    batch,
    height,
    width,
    patch_h,
    patch_w,
    out_dim,
    depth,
    stride_image_b,
    stride_image_h,
    stride_pos_p,
    stride_pos_b,
    CHANNELS: tl.constexpr,
    RELU: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # Feature blocks vary fastest: neighbors read the same pixels, which then come from the cache.
    pid_m = tl.program_id(0)
    pid_n = tl.program_id(1)

    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_n = offs_n < rows
    mask_m = offs_m < out_dim
    first = _patch_offsets(
        positions_ptr, offs_n, rows, batch, height, width, patch_h, patch_w,
        stride_image_b, stride_image_h, stride_pos_p, stride_pos_b, CHANNELS,
    )  # fmt: skip
    line = patch_w * CHANNELS

    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for k in range(0, depth, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        mask_k = offs_k < depth
        pixel_offs = (offs_k // line).to(tl.int64) * stride_image_h + offs_k % line
        pixels = tl.load(
            images_ptr + first[:, None] + pixel_offs[None, :],
            mask=mask_n[:, None] & mask_k[None, :],
            other=0,
        )
        weight = tl.load(
            weight_ptr + offs_k.to(tl.int64)[:, None] * out_dim + offs_m[None, :],
            mask=mask_k[:, None] & mask_m[None, :],
            other=0.0,
        )
        centered = (pixels.to(tl.float32) - 128.0).to(weight.dtype)
        acc = tl.dot(centered, weight, acc, input_precision=PRECISION)

    acc += tl.load(bias_ptr + offs_m, mask=mask_m, other=0.0)[None, :]
    if RELU:
        acc = tl.where(acc <= 0.0, 0.0, acc)  # NaN stays
    out_offs = offs_n.to(tl.int64)[:, None] * out_dim + offs_m[None, :]
    mask = mask_n[:, None] & mask_m[None, :]
    tl.store(out_ptr + out_offs, acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _patch_embed_bwd_kernel(
    images_ptr,  # [B, H, W, C] uint8
    positions_ptr,  # [P, B, 2]
    out_ptr,  # [P B, M], for the ReLU's mask
    dout_ptr,  # [P B, M]
    dweight_partial_ptr,  # [splits, M, K]
    dbias_partial_ptr,  # [splits, M]
    rows,
    batch,
    height,
    width,
    patch_h,
    patch_w,
    out_dim,
    depth,
    stride_image_b,
    stride_image_h,
    stride_pos_p,
    stride_pos_b,
    rows_per_split,
    CHANNELS: tl.constexpr,
    RELU: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    pid_k = tl.program_id(0)
    pid_m = tl.program_id(1)
    pid_s = tl.program_id(2)

    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_k = pid_k * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_m = offs_m < out_dim
    mask_k = offs_k < depth
    line = patch_w * CHANNELS
    pixel_offs = (offs_k // line).to(tl.int64) * stride_image_h + offs_k % line

    dweight = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    dbias = tl.zeros((BLOCK_M,), tl.float32)
    start = pid_s * rows_per_split
    for n in range(start, tl.minimum(start + rows_per_split, rows), BLOCK_N):
        offs_n = n + tl.arange(0, BLOCK_N)
        mask_n = offs_n < rows
        first = _patch_offsets(
            positions_ptr, offs_n, rows, batch, height, width, patch_h, patch_w,
            stride_image_b, stride_image_h, stride_pos_p, stride_pos_b, CHANNELS,
        )  # fmt: skip
        out_offs = offs_n.to(tl.int64)[:, None] * out_dim + offs_m[None, :]
        mask = mask_n[:, None] & mask_m[None, :]
        dout = tl.load(dout_ptr + out_offs, mask=mask, other=0.0)  # [BLOCK_N, BLOCK_M]
        if RELU:
            out = tl.load(out_ptr + out_offs, mask=mask, other=0.0)
            dout = tl.where(out <= 0.0, 0.0, dout).to(dout.dtype)
        pixels = tl.load(
            images_ptr + first[:, None] + pixel_offs[None, :],
            mask=mask_n[:, None] & mask_k[None, :],
            other=0,
        )
        centered = (pixels.to(tl.float32) - 128.0).to(dout.dtype)  # [BLOCK_N, BLOCK_K]
        dweight = tl.dot(tl.trans(dout), centered, dweight, input_precision=PRECISION)
        dbias += tl.sum(dout.to(tl.float32), axis=0)

    split = pid_s.to(tl.int64) * out_dim
    dweight_offs = (split + offs_m.to(tl.int64))[:, None] * depth + offs_k[None, :]
    tl.store(dweight_partial_ptr + dweight_offs, dweight, mask=mask_m[:, None] & mask_k[None, :])
    if pid_k == 0:
        tl.store(dbias_partial_ptr + split + offs_m, dbias, mask=mask_m)


def _sizes(images: torch.Tensor, positions: torch.Tensor, patch: Sequence[int]) -> dict[str, Any]:
    """The sizes and strides that both kernels take."""
    batch, height, width, channels = images.shape
    return {
        "rows": positions.shape[0] * batch,
        "batch": batch,
        "height": height,
        "width": width,
        "patch_h": patch[0],
        "patch_w": patch[1],
        "depth": patch[0] * patch[1] * channels,
        "stride_image_b": images.stride(0),
        "stride_image_h": images.stride(1),
        "stride_pos_p": positions.stride(0),
        "stride_pos_b": positions.stride(1),
        "CHANNELS": channels,
    }


def patch_embed_fwd(
    images: torch.Tensor,
    positions: torch.Tensor,
    folded: torch.Tensor,
    offset: torch.Tensor,
    patch: Sequence[int],
    relu: bool,
) -> torch.Tensor:
    """y [P, B, M] from the folded weights [h w C, M] and offset [M]; positions are [P, B, 2]."""
    out_dim = folded.shape[1]
    out = folded.new_empty((*positions.shape[:2], out_dim))
    if out.numel() == 0:
        return out
    tile = embed_tile(folded.dtype == torch.float32)
    grid = (triton.cdiv(out_dim, tile.cols), triton.cdiv(out.shape[0] * out.shape[1], tile.rows))
    with device_guard(images):
        _patch_embed_fwd_kernel[grid](
            images_ptr=images,
            positions_ptr=positions,
            weight_ptr=folded,
            bias_ptr=offset,
            out_ptr=out,
            out_dim=out_dim,
            **_sizes(images, positions, patch),
            RELU=relu,
            PRECISION=dot_precision(folded.dtype),
            BLOCK_N=tile.rows,
            BLOCK_M=tile.cols,
            BLOCK_K=tile.depth,
            **product_options(tile),
        )
    return out


def patch_embed_bwd(
    images: torch.Tensor,
    positions: torch.Tensor,
    out: torch.Tensor,
    dout: torch.Tensor,
    patch: Sequence[int],
    relu: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(dV [M, h w C], dbias [M]) in float32; dV is the gradient of the folded weights."""
    sizes = _sizes(images, positions, patch)
    out_dim, rows, depth = dout.shape[2], sizes["rows"], sizes["depth"]
    if dout.numel() == 0:
        zeros = dout.new_zeros((out_dim, depth + 1), dtype=torch.float32)
        return zeros[:, :depth].contiguous(), zeros[:, depth].contiguous()
    tile = embed_grad_tile(dout.dtype == torch.float32)
    blocks = (triton.cdiv(depth, tile.cols), triton.cdiv(out_dim, tile.rows))
    splits = embed_grad_split(blocks[0] * blocks[1], rows, tile, sm_count(dout.device))
    rows_per_split = triton.cdiv(triton.cdiv(rows, splits), tile.depth) * tile.depth
    splits = triton.cdiv(rows, rows_per_split)
    dweight = dout.new_empty((splits, out_dim, depth), dtype=torch.float32)
    dbias = dout.new_empty((splits, out_dim), dtype=torch.float32)
    with device_guard(images):
        _patch_embed_bwd_kernel[(*blocks, splits)](
            images_ptr=images,
            positions_ptr=positions,
            out_ptr=out,
            dout_ptr=dout,
            dweight_partial_ptr=dweight,
            dbias_partial_ptr=dbias,
            out_dim=out_dim,
            **sizes,
            rows_per_split=rows_per_split,
            RELU=relu,
            PRECISION=dot_precision(dout.dtype),
            BLOCK_M=tile.rows,
            BLOCK_K=tile.cols,
            BLOCK_N=tile.depth,
            **product_options(tile),
        )
    return dweight.sum(dim=0), dbias.sum(dim=0)


_fwd_op = torch.library.custom_op(
    "bagssl_triton::patch_embed_fwd", patch_embed_fwd, mutates_args=()
)
_bwd_op = torch.library.custom_op(
    "bagssl_triton::patch_embed_bwd", patch_embed_bwd, mutates_args=()
)


@_fwd_op.register_fake
def _(images, positions, folded, offset, patch, relu):
    return folded.new_empty((*positions.shape[:2], folded.shape[1]))


@_bwd_op.register_fake
def _(images, positions, out, dout, patch, relu):
    depth = patch[0] * patch[1] * images.shape[3]
    stats = {"dtype": torch.float32}
    return dout.new_empty((dout.shape[2], depth), **stats), dout.new_empty(dout.shape[2:], **stats)


class PatchEmbedFunction(torch.autograd.Function):
    """images, positions, folded weights [h w C, M], offset [M] -> y."""

    @staticmethod
    def forward(
        ctx: Any,
        images: torch.Tensor,
        positions: torch.Tensor,
        folded: torch.Tensor,
        offset: torch.Tensor,
        patch: tuple[int, int],
        relu: bool,
    ) -> torch.Tensor:
        out: torch.Tensor = _fwd_op(images, positions, folded, offset, patch, relu)
        ctx.save_for_backward(images, positions, out if relu else None)
        ctx.patch, ctx.relu, ctx.dtype = patch, relu, folded.dtype
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        images, positions, out = ctx.saved_tensors
        dout = dout.contiguous()
        dfolded, doffset = _bwd_op(
            images, positions, dout if out is None else out, dout, ctx.patch, ctx.relu
        )
        return None, None, dfolded.t().to(ctx.dtype), doffset, None, None


def patch_embed(
    images: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    positions: torch.Tensor,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    relu: bool = False,
) -> torch.Tensor:
    """A linear layer over patches cut from uint8 images, differentiable in weight and bias.

    Args:
        images: uint8 [B, H, W, C].
        weight: [M, C, h, w] in float32, bfloat16 or float16; the result has its dtype.
        bias: [M] or None.
        positions: integer (top, left), [P, 2] for all images or [P, B, 2]. On a GPU they are
            not checked, which would wait for the device: a patch outside is moved inside.
        mean, std: Per channel, of pixels in 0..1.
        relu: Apply ReLU to the result.

    Returns:
        [P, B, M].

    Raises:
        ValueError: on anything else.
    """
    op = "patch_embed"
    check_tensors(op, weight=weight)
    check_tensors(op, (torch.uint8,), images=images)
    check_tensors(op, (torch.int64, torch.int32, torch.int16, torch.uint8), positions=positions)
    others = {"positions": positions, "weight": weight} | ({} if bias is None else {"bias": bias})
    check_tensors(
        op, (*FLOATS, torch.uint8, torch.int16, torch.int32, torch.int64), images=images, **others
    )
    check_rank(op, 4, "[B, H, W, C]", images=images)
    check_rank(op, 4, "[M, C, h, w]", weight=weight)
    batch, height, width, channels = images.shape
    out_dim, weight_channels, patch_h, patch_w = weight.shape
    if weight_channels != channels or len(mean) != channels or len(std) != channels:
        came = f"{channels} channels in images, {weight_channels} in weight, {len(mean)} means"
        raise refuse(op, f"{came}, {len(std)} stds", "the same number in all")
    if not (1 <= patch_h <= height and 1 <= patch_w <= width):
        raise refuse(
            op, f"patches {patch_h}x{patch_w} of images {height}x{width}", "smaller patches"
        )
    if positions.shape not in ((positions.shape[0], 2), (positions.shape[0], batch, 2)):
        raise refuse(
            op, f"positions of shape {list(positions.shape)}", f"[P, 2] or [P, {batch}, 2]"
        )
    if bias is not None and bias.shape != (out_dim,):
        raise refuse(op, f"bias of shape {list(bias.shape)}", f"[{out_dim}]")

    if positions.dim() == 2:
        positions = positions[:, None].expand(-1, batch, -1)
    if positions.stride(2) != 1:
        positions = positions.contiguous()
    if images.stride(3) != 1 or images.stride(2) != channels:
        images = images.contiguous()
    # Folding is torch's, so that autograd unfolds dW and dbias; it costs two passes over W. The
    # constants are filled in on the device: a copy would wait for it, and end a CUDA graph.
    wide = weight.float().contiguous()
    scale = torch.cat([wide.new_full((1, 1, 1, 1), 1 / (255 * s)) for s in std], dim=1)
    shift = [(Center / 255 - m) / s for m, s in zip(mean, std, strict=True)]
    shifts = torch.cat([wide.new_full((1,), value) for value in shift])
    folded = (wide * scale).permute(2, 3, 1, 0).reshape(-1, out_dim).to(weight.dtype).contiguous()
    offset = (wide.sum(dim=(2, 3)) * shifts).sum(dim=1)  # no matmul, which autocast would round
    if bias is not None:
        offset = offset + bias.float()
    y: torch.Tensor = PatchEmbedFunction.apply(
        images, positions, folded, offset, (patch_h, patch_w), relu
    )
    return y
