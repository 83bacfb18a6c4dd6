# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""patch_views: the augmented, normalized patches of a batch of uint8 images, in one pass.

    crop + antialiased resize, flip, color jitter, grayscale, Gaussian blur, solarize, normalize

images uint8, any sizes (one byte buffer with offset, height and width per image), params float32
[P, B, 16] (a row per patch) -> [P, B, 3, h, w] in channels-last memory, float32, bfloat16, float16
or uint8 (not normalized). Pixels are torchvision's on uint8 tensors, rounded after every stage.

A resize is two products with banded weight matrices, one per axis, made where they are used from
the crop's size, in float64, as torch's fixed-point weights. Pixels are exact in float16 and so are
the weights' two bytes: the products run on tensor cores and add up to the exact integers. Each
pixel of the crop is loaded once. A blur is two products with Gaussian bands, reflection folded in.

Patches up to 64 x 64: one program per patch, which keeps it in registers from the crop to the
store. Bytes: the crop and the result, once each; nothing else is written.
Larger patches: tiles of 32 x 32, a program for all tiles of its patches in turn. Only patches with
a blur or a contrast (whose mean needs all pixels first) leave the resized patch as uint8 in a
scratch of the program, which stays in the cache. Tiles share a margin of two to four source pixels.
Integers all the way: the result depends on neither tiles, batch nor device, but for ties of the
blur. Arithmetic: per crop pixel and output column 8 multiply-adds of a tensor core, and as many
per output row; bound by memory or by the weights' float64, hence slower where that is rare.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import TypeGuard

import torch
import triton
import triton.language as tl

from ._common import (
    check_rank,
    check_tensors,
    device_guard,
    launch_options,
    refuse,
    sm_count,
    warp_lanes,
)
from ._patch_ops import (
    axis_precision,
    axis_windows,
    blur_tile,
    grayscale,
    jitter,
    mean_gray,
    resize_tile,
    round_half_even,
    solarize_and_store,
)
from ._tuning import ViewTiles, view_tiles

OUT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.uint8)
NUM_PARAMS = 16
# RGB images of any sizes on one device: bytes uint8 [total], offsets int64 [B], heights and widths
# int32 [B]; image b is bytes[offsets[b]:] as [h, w, 3].
Ragged = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
RAGGED = {
    "bytes": torch.uint8,
    "offsets": torch.int64,
    "heights": torch.int32,
    "widths": torch.int32,
}


@triton.jit
def _load_crop(images_ptr, offsets_ptr, heights_ptr, widths_ptr, row_ptr, b):
    """(first pixel, bytes per row, height, width) of a crop, kept inside its image."""
    image_h = tl.load(heights_ptr + b)
    image_w = tl.load(widths_ptr + b)
    top = tl.minimum(tl.maximum(tl.load(row_ptr).to(tl.int32), 0), image_h - 1)
    left = tl.minimum(tl.maximum(tl.load(row_ptr + 1).to(tl.int32), 0), image_w - 1)
    crop_h = tl.minimum(tl.maximum(tl.load(row_ptr + 2).to(tl.int32), 1), image_h - top)
    crop_w = tl.minimum(tl.maximum(tl.load(row_ptr + 3).to(tl.int32), 1), image_w - left)
    first = tl.load(offsets_ptr + b) + (top.to(tl.int64) * image_w + left) * 3
    return images_ptr + first, image_w * 3, crop_h, crop_w


@triton.jit
def _small_views_kernel(
    images_ptr,  # bytes
    offsets_ptr,  # [B]
    heights_ptr,  # [B]
    widths_ptr,  # [B]
    params_ptr,  # [P, B, 16]
    scale_ptr,  # [2, 3]: value * scale + offset normalizes
    out_ptr,  # [P, B, h, w, 3]
    batch,
    out_h,
    out_w,
    pad,
    BICUBIC: tl.constexpr,
    NORMALIZE: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    BLOCK_X: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    row_ptr = params_ptr + pid * 16
    crop_ptr, stride, crop_h, crop_w = _load_crop(
        images_ptr, offsets_ptr, heights_ptr, widths_ptr, row_ptr, pid % batch
    )

    offs_i = tl.arange(0, TILE_H)
    offs_j = tl.arange(0, TILE_W)
    mask = (offs_i < out_h)[:, None] & (offs_j < out_w)[None, :]
    source_j = tl.where(tl.load(row_ptr + 4) != 0.0, out_w - 1 - offs_j, offs_j)
    first_i, end_i, norm_i = axis_windows(crop_h, out_h, offs_i, BICUBIC)
    first_j, end_j, norm_j = axis_windows(crop_w, out_w, source_j, BICUBIC)
    r, g, b = resize_tile(
        crop_ptr, stride, crop_h, crop_w, out_h, out_w, offs_i, source_j,
        first_i, end_i, norm_i, axis_precision(crop_h, out_h, offs_i, BICUBIC),
        first_j, end_j, norm_j, axis_precision(crop_w, out_w, offs_j, BICUBIC),
        BICUBIC, TILE_H, TILE_W, BLOCK_Y, BLOCK_X,
    )  # fmt: skip

    r, g, b, _ = jitter(r, g, b, mask, out_h * out_w, 0.0, row_ptr, False, False)
    r, g, b = grayscale(r, g, b, row_ptr)
    sigma = tl.load(row_ptr + 11)
    if (sigma > 0.0) & (pad > 0):
        r, g, b = blur_tile(
            r, g, b, offs_i, offs_j, offs_i, offs_j, out_h, out_w, sigma, pad, TILE_H, TILE_W
        )
        r = round_half_even(r)
        g = round_half_even(g)
        b = round_half_even(b)

    pixel_ptr = out_ptr + pid * out_h * out_w * 3 + (offs_i[:, None] * out_w + offs_j[None, :]) * 3
    solarize_and_store(r, g, b, row_ptr, scale_ptr, pixel_ptr, mask, NORMALIZE)


@triton.jit
def _load_scratch(scratch_ptr, offs_y, offs_x, out_h, out_w):
    """A tile of the resized patch, planes [3, h, w], as floats."""
    mask = (offs_y < out_h)[:, None] & (offs_x < out_w)[None, :]
    mask &= (offs_y >= 0)[:, None] & (offs_x >= 0)[None, :]
    offs = offs_y[:, None] * out_w + offs_x[None, :]
    plane = out_h * out_w
    r = tl.load(scratch_ptr + offs, mask=mask, other=0).to(tl.float32)
    g = tl.load(scratch_ptr + plane + offs, mask=mask, other=0).to(tl.float32)
    b = tl.load(scratch_ptr + 2 * plane + offs, mask=mask, other=0).to(tl.float32)
    return r, g, b, mask


@triton.jit
def _large_views_kernel(
    images_ptr,  # bytes
    offsets_ptr,  # [B]
    heights_ptr,  # [B]
    widths_ptr,  # [B]
    params_ptr,  # [P, B, 16]
    scale_ptr,  # [2, 3]: value * scale + offset normalizes
    out_ptr,  # [P, B, h, w, 3]
    scratch_ptr,  # [programs, 3, h, w] uint8
    num_patches,
    batch,
    out_h,
    out_w,
    pad,
    BICUBIC: tl.constexpr,
    NORMALIZE: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    BLOCK_X: tl.constexpr,
    FULL_H: tl.constexpr,
    FULL_W: tl.constexpr,
):
    tiles_w = tl.cdiv(out_w, TILE_W)
    num_tiles = tl.cdiv(out_h, TILE_H) * tiles_w
    plane = out_h * out_w
    scratch_ptr += tl.program_id(0).to(tl.int64) * 3 * plane
    full_i = tl.arange(0, FULL_H)
    full_j = tl.arange(0, FULL_W)

    for patch in range(tl.program_id(0), num_patches, tl.num_programs(0)):
        pid = tl.full((), 1, tl.int64) * patch
        row_ptr = params_ptr + pid * 16
        crop_ptr, stride, crop_h, crop_w = _load_crop(
            images_ptr, offsets_ptr, heights_ptr, widths_ptr, row_ptr, pid % batch
        )
        patch_ptr = out_ptr + pid * plane * 3
        flip = tl.load(row_ptr + 4) != 0.0
        sigma = tl.load(row_ptr + 11)
        blurs = (sigma > 0.0) & (pad > 0)
        contrasts = (tl.load(row_ptr + 9) >= 0.0) & (tl.load(row_ptr + 6) != 1.0)
        keeps = blurs | contrasts
        precision_i = axis_precision(crop_h, out_h, full_i, BICUBIC)
        precision_j = axis_precision(crop_w, out_w, full_j, BICUBIC)

        # Resize, tile by tile: to the end at once, or into the scratch.
        gray_sum = tl.full((), 0, tl.int32)
        for tile in range(num_tiles):
            offs_i = tile // tiles_w * TILE_H + tl.arange(0, TILE_H)
            offs_j = tile % tiles_w * TILE_W + tl.arange(0, TILE_W)
            mask = (offs_i < out_h)[:, None] & (offs_j < out_w)[None, :]
            source_j = tl.where(flip, out_w - 1 - offs_j, offs_j)
            first_i, end_i, norm_i = axis_windows(crop_h, out_h, offs_i, BICUBIC)
            first_j, end_j, norm_j = axis_windows(crop_w, out_w, source_j, BICUBIC)
            r, g, b = resize_tile(
                crop_ptr, stride, crop_h, crop_w, out_h, out_w, offs_i, source_j,
                first_i, end_i, norm_i, precision_i, first_j, end_j, norm_j, precision_j,
                BICUBIC, TILE_H, TILE_W, BLOCK_Y, BLOCK_X,
            )  # fmt: skip
            if keeps:
                offs = offs_i[:, None] * out_w + offs_j[None, :]
                tl.store(scratch_ptr + offs, r.to(tl.uint8), mask=mask)
                tl.store(scratch_ptr + plane + offs, g.to(tl.uint8), mask=mask)
                tl.store(scratch_ptr + 2 * plane + offs, b.to(tl.uint8), mask=mask)
                if contrasts:
                    gray_sum += jitter(r, g, b, mask, plane, 0.0, row_ptr, False, True)[3]
            else:
                r, g, b, _ = jitter(r, g, b, mask, plane, 0.0, row_ptr, True, False)
                r, g, b = grayscale(r, g, b, row_ptr)
                pixel_ptr = patch_ptr + (offs_i[:, None] * out_w + offs_j[None, :]) * 3
                solarize_and_store(r, g, b, row_ptr, scale_ptr, pixel_ptr, mask, NORMALIZE)

        if keeps:
            tl.debug_barrier()  # the scratch is written by all threads before any reads it
            mean = mean_gray(gray_sum, plane)
            for tile in range(num_tiles):
                offs_i = tile // tiles_w * TILE_H + tl.arange(0, TILE_H)
                offs_j = tile % tiles_w * TILE_W + tl.arange(0, TILE_W)
                mask = (offs_i < out_h)[:, None] & (offs_j < out_w)[None, :]
                if blurs:
                    first_y = tile // tiles_w * TILE_H - pad
                    first_x = tile % tiles_w * TILE_W - pad
                    end_y = first_y + TILE_H + 2 * pad
                    end_x = first_x + TILE_W + 2 * pad
                    sum_r = tl.zeros((TILE_H, TILE_W), tl.float32)
                    sum_g = tl.zeros((TILE_H, TILE_W), tl.float32)
                    sum_b = tl.zeros((TILE_H, TILE_W), tl.float32)
                    for y in range(first_y, end_y, TILE_H):
                        for x in range(first_x, end_x, TILE_W):
                            offs_y = y + tl.arange(0, TILE_H)
                            offs_x = x + tl.arange(0, TILE_W)
                            offs_y = tl.where(offs_y < end_y, offs_y, -1)
                            offs_x = tl.where(offs_x < end_x, offs_x, -1)
                            r, g, b, inside = _load_scratch(
                                scratch_ptr, offs_y, offs_x, out_h, out_w
                            )
                            r, g, b, _ = jitter(r, g, b, inside, plane, mean, row_ptr, True, False)
                            r, g, b = grayscale(r, g, b, row_ptr)
                            r, g, b = blur_tile(
                                r, g, b, offs_y, offs_x, offs_i, offs_j, out_h, out_w, sigma, pad,
                                TILE_H, TILE_W,
                            )  # fmt: skip
                            sum_r += r
                            sum_g += g
                            sum_b += b
                    r = round_half_even(sum_r)
                    g = round_half_even(sum_g)
                    b = round_half_even(sum_b)
                else:
                    r, g, b, _ = _load_scratch(scratch_ptr, offs_i, offs_j, out_h, out_w)
                    r, g, b, _ = jitter(r, g, b, mask, plane, mean, row_ptr, True, False)
                    r, g, b = grayscale(r, g, b, row_ptr)
                pixel_ptr = patch_ptr + (offs_i[:, None] * out_w + offs_j[None, :]) * 3
                solarize_and_store(r, g, b, row_ptr, scale_ptr, pixel_ptr, mask, NORMALIZE)
            tl.debug_barrier()  # ... and read by all before the next patch overwrites it


@lru_cache
def _normalization(
    mean: tuple[float, ...], std: tuple[float, ...], device: torch.device
) -> torch.Tensor:
    """[2, 3]: value * scale + offset, kept on the device.

    From float32 means and stds, in float64, to float32: the roundings of every implementation.
    """
    center, spread = torch.tensor(mean).double(), torch.tensor(std).double()
    return torch.stack([1.0 / (255.0 * spread), -center / spread]).float().to(device)


def patch_views_fwd(
    data: torch.Tensor,
    offsets: torch.Tensor,
    heights: torch.Tensor,
    widths: torch.Tensor,
    params: torch.Tensor,
    size: Sequence[int],
    bicubic: bool,
    blur_kernel: int,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
) -> torch.Tensor:
    """Patches [P, B, h, w, 3] of a ragged batch."""
    num_slots, batch, _ = params.shape
    out = torch.empty((num_slots, batch, *size, 3), dtype=dtype, device=data.device)
    if out.numel() == 0:
        return out
    tiles: ViewTiles = view_tiles(size[0], size[1], warp_lanes())
    shared = {
        "images_ptr": data,
        "offsets_ptr": offsets,
        "heights_ptr": heights,
        "widths_ptr": widths,
        "params_ptr": params,
        "scale_ptr": _normalization(tuple(mean), tuple(std), data.device),
        "out_ptr": out,
        "batch": batch,
        "out_h": size[0],
        "out_w": size[1],
        "pad": blur_kernel // 2,
        "BICUBIC": bicubic,
        "NORMALIZE": dtype != torch.uint8,
        "TILE_H": tiles.height,
        "TILE_W": tiles.width,
        "BLOCK_Y": tiles.block_y,
        "BLOCK_X": tiles.block_x,
        **launch_options(tiles.num_warps),
        # A contracted a * b + c would truncate to another integer here and there.
        "enable_fp_fusion": False,
    }
    num_patches = num_slots * batch
    with device_guard(data):
        if tiles.height >= size[0] and tiles.width >= size[1]:
            _small_views_kernel[(num_patches,)](**shared)
        else:
            programs = min(num_patches, tiles.programs_per_sm * sm_count(data.device))
            scratch = torch.empty((programs, 3, *size), dtype=torch.uint8, device=data.device)
            _large_views_kernel[(programs,)](
                scratch_ptr=scratch,
                num_patches=num_patches,
                FULL_H=triton.next_power_of_2(size[0]),
                FULL_W=triton.next_power_of_2(size[1]),
                **shared,
            )
    return out


_fwd_op = torch.library.custom_op(
    "bagssl_triton::patch_views_fwd", patch_views_fwd, mutates_args=()
)


@_fwd_op.register_fake
def _(data, offsets, heights, widths, params, size, bicubic, blur_kernel, mean, std, dtype):
    return torch.empty((*params.shape[:2], *size, 3), dtype=dtype, device=data.device)


def ragged(images: torch.Tensor | Sequence[torch.Tensor]) -> Ragged:
    """One buffer of a batch: a view of uint8 [B, H, W, 3], or a copy of several [H, W, 3]."""
    op = "patch_views"
    if isinstance(images, torch.Tensor):
        check_tensors(op, (torch.uint8,), images=images)
        check_rank(op, 4, "[B, H, W, 3]", images=images)
        sizes = [tuple(images.shape[1:])] * images.shape[0]
        data = images.contiguous().view(-1)
    else:
        if not images:
            raise refuse(op, "no images", "one or more")
        for image in images:
            check_tensors(op, (torch.uint8,), images=images[0], image=image)
            check_rank(op, 3, "[H, W, 3]", image=image)
        sizes = [tuple(image.shape) for image in images]
        data = torch.cat([image.reshape(-1) for image in images])
    if any(c != 3 or min(h, w) < 1 or 3 * h * w >= 2**31 for h, w, c in sizes):
        came = f"images of shapes {sorted(set(sizes))[:4]}"
        raise refuse(op, came, "RGB images [H, W, 3] of positive size below 2 GiB")
    ends = torch.tensor([h * w * 3 for h, w, _ in sizes], dtype=torch.int64).cumsum(0)
    offsets = ends - torch.tensor([h * w * 3 for h, w, _ in sizes], dtype=torch.int64)
    heights = torch.tensor([h for h, _, _ in sizes], dtype=torch.int32)
    widths = torch.tensor([w for _, w, _ in sizes], dtype=torch.int32)
    device = data.device
    return data, offsets.to(device), heights.to(device), widths.to(device)


def _is_ragged(images: torch.Tensor | Sequence[torch.Tensor] | Ragged) -> TypeGuard[Ragged]:
    """Whether images are one buffer and its tables rather than single images."""
    if not isinstance(images, tuple) or len(images) != 4:
        return False
    return isinstance(images[0], torch.Tensor) and images[0].dim() == 1


def _check_params(params: torch.Tensor, images: Ragged, pad: int, size: Sequence[int]) -> None:
    """Checks every row of a table on the host; on a GPU that would wait for the device."""
    op = "patch_views"
    box = params[..., :4]
    heights, widths = (sides.cpu() for sides in images[2:])
    fits = (
        (box == box.floor()).all(dim=-1)
        & (box[..., :2] >= 0).all(dim=-1)
        & (box[..., 2:] >= 1).all(dim=-1)
        & (box[..., 0] + box[..., 2] <= heights)
        & (box[..., 1] + box[..., 3] <= widths)
    )
    order, jitters = params[..., 9], params[..., 5:9]
    known = (order == order.floor()) & (order >= -1) & (order <= 23)
    factors = (jitters.isfinite() & (jitters.abs() <= 1e6)).all(dim=-1)
    factors &= (jitters[..., :3] >= 0).all(dim=-1) & (jitters[..., 3].abs() <= 0.5)
    known &= (order < 0) | factors
    blurs = params[..., 11]
    known &= (blurs >= 0) & blurs.isfinite() & (params[..., 12] >= 0)
    for valid, needed in (
        (fits, "whole boxes inside the image"),
        (known, "jitter, blur, solarize"),
    ):
        if not bool(valid.all()):
            p, b = (~valid).nonzero()[0].tolist()
            raise refuse(op, f"params[{p}, {b}] = {params[p, b].tolist()}", f"{needed} in range")
    if pad >= min(size) and bool((blurs > 0).any()):
        raise refuse(op, f"a blur kernel of {2 * pad + 1} on patches {list(size)}", "smaller ones")


def patch_views(
    images: torch.Tensor | Sequence[torch.Tensor] | Ragged,
    params: torch.Tensor,
    *,
    size: int | tuple[int, int],
    interpolation: str = "bilinear",
    blur_kernel: int = 0,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Cuts, augments and normalizes the patches of a batch.

    Args:
        images: uint8 [B, H, W, 3]; or B tensors [H, W, 3] of any sizes; or the four tensors
            bytes [total], offsets, heights and widths [B] of images that are in one buffer.
        params: float32 [P, B, 16], a row per patch: top, left, height, width (whole source pixels),
            flip, brightness, contrast, saturation, hue, order (permutation of the four, -1: none),
            grayscale, blur sigma, solarize threshold. On the host it is checked and copied to the
            images' device; already there it is not checked, and boxes are kept inside their image.
        size: Output height and width, at most 1024.
        interpolation: "bilinear" or "bicubic", both antialiased.
        blur_kernel: Odd size of the blur's kernel; 0 for about a tenth of the patch.
        mean, std: Per channel, of pixels in 0..1.
        dtype: torch.float32, bfloat16 or float16 (normalized), or uint8 (not normalized).

    Returns:
        [P, B, 3, h, w], channels last in memory. Not differentiable.

    Raises:
        ValueError: on anything else.
    """
    op = "patch_views"
    batch = images if _is_ragged(images) else ragged(images)
    data, offsets, *_ = batch
    named = dict(zip(RAGGED, batch, strict=True))
    check_tensors(op, tuple(RAGGED.values()), **named)
    if any(x.dtype != RAGGED[name] for name, x in named.items()):
        came = ", ".join(f"{name} {x.dtype}" for name, x in named.items())
        raise refuse(op, came, "bytes uint8, offsets int64, heights and widths int32")
    height, width = (size, size) if isinstance(size, int) else size
    if not (1 <= height <= 1024 and 1 <= width <= 1024):
        raise refuse(op, f"size = {size}", "1..1024 in both directions")
    if interpolation not in ("bilinear", "bicubic"):
        raise refuse(op, f"interpolation = {interpolation!r}", '"bilinear" and "bicubic"')
    if blur_kernel < 0 or (blur_kernel and blur_kernel % 2 == 0):
        raise refuse(op, f"blur_kernel = {blur_kernel}", "odd kernels, or 0")
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise refuse(op, f"mean = {mean}, std = {std}", "three means and three positive stds")
    if dtype not in OUT_DTYPES:
        raise refuse(op, f"dtype = {dtype}", "float32, bfloat16, float16 and uint8")
    if params.dtype != torch.float32 or params.shape[1:] != (offsets.numel(), NUM_PARAMS):
        came = f"params of shape {list(params.shape)} and dtype {params.dtype}"
        raise refuse(op, came, f"float32 [P, {offsets.numel()}, {NUM_PARAMS}]")
    if not blur_kernel:
        shorter = min(height, width)
        blur_kernel = 1 if shorter < 2 else max(3, (shorter // 10) | 1)
    if params.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_params(params, batch, blur_kernel // 2, (height, width))
    if params.device.type == "cpu":
        params = params.to(data.device, non_blocking=True)
    patches: torch.Tensor = _fwd_op(
        *batch, params.contiguous(), (height, width), interpolation == "bicubic", blur_kernel,
        list(mean), list(std), dtype,
    )  # fmt: skip
    return patches.permute(0, 1, 4, 2, 3)
