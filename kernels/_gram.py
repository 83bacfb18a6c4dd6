# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""Gram matrices of P slots on the shorter side, shared by vicreg and tcr.

For z [P, B, D] the Gram is z z^T [P, B, B] where B <= D and z^T z [P, D, D] elsewhere: R x R with
R = min(B, D). Only tiles of the upper triangle are computed; each is stored twice. The mean of the
columns, if given, is subtracted as z is loaded. Where the tiles are too few to fill the processors,
the summed axis is split and a second launch adds the parts in their order: no atomics.

R^2 max(B, D) P multiply-adds / 2, operands in z's dtype, sums in float32.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from ._common import dot_precision, launch_options, product_options, sm_count
from ._tuning import gram_split, gram_tile


@triton.jit
def load_centered(
    z_ptr, mean_ptr, offs_b, offs_d, batch, dim, stride_z_b, stride_z_d,
    Center: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """A tile of z, minus its columns' means; offs_b and offs_d come shaped for their axes."""
    mask = (offs_b < batch) & (offs_d < dim)
    z_tile_ptr = z_ptr + offs_b.to(tl.int64) * stride_z_b + offs_d.to(tl.int64) * stride_z_d
    z = tl.load(z_tile_ptr, mask=mask, other=0.0)
    if Center:
        mean = tl.load(mean_ptr + offs_d, mask=offs_d < dim, other=0.0)
        z = tl.where(mask, z.to(tl.float32) - mean, 0.0)
    return z.to(TYPE)


@triton.jit
def _tile_of_triangle(index):
    """(i, j), i <= j, of the index-th tile of an upper triangle, column by column."""
    j = ((tl.sqrt(8.0 * index.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    j = tl.where(j * (j + 1) // 2 > index, j - 1, j)
    j = tl.where((j + 1) * (j + 2) // 2 <= index, j + 1, j)
    return index - j * (j + 1) // 2, j


@triton.jit
def _finish_tile(
    acc, gram_ptr, norm_ptr, tile_i, tile_j, size,
    ZERO_DIAGONAL: tl.constexpr, STORE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sum of a tile's squares, with those of its mirror image, and both images stored."""
    offs_i = tile_i * BLOCK + tl.arange(0, BLOCK)
    offs_j = tile_j * BLOCK + tl.arange(0, BLOCK)
    if ZERO_DIAGONAL:
        acc = tl.where(offs_i[:, None] == offs_j[None, :], 0.0, acc)
    tl.store(norm_ptr, tl.where(tile_i == tile_j, 1.0, 2.0) * tl.sum(acc * acc))
    if STORE:
        mask = (offs_i < size)[:, None] & (offs_j < size)[None, :]
        offs_i, offs_j = offs_i.to(tl.int64), offs_j.to(tl.int64)
        tl.store(gram_ptr + offs_i[:, None] * size + offs_j[None, :], acc, mask=mask)
        if tile_i != tile_j:
            tl.store(gram_ptr + offs_j[None, :] * size + offs_i[:, None], acc, mask=mask)


@triton.jit
def _gram_fwd_kernel(
    z_ptr,  # [P, B, D]
    mean_ptr,  # [P, D]
    gram_ptr,  # [P, R, R]
    norm_partial_ptr,  # [P, tiles], sum of squares
    split_partial_ptr,  # [splits, P, tiles, BLOCK, BLOCK]
    batch,
    dim,
    stride_z_p,
    stride_z_b,
    stride_z_d,
    scale,
    depth_per_split,
    ON_BATCH: tl.constexpr,
    Center: tl.constexpr,
    ZERO_DIAGONAL: tl.constexpr,
    STORE: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    TYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    pid_t = tl.program_id(0)
    pid_p = tl.program_id(1).to(tl.int64)
    pid_s = tl.program_id(2)

    tile_i, tile_j = _tile_of_triangle(pid_t)
    offs_i = (tile_i * BLOCK + tl.arange(0, BLOCK))[:, None]
    offs_j = (tile_j * BLOCK + tl.arange(0, BLOCK))[:, None]
    z_ptr += pid_p * stride_z_p
    mean_ptr += pid_p * dim
    if ON_BATCH:
        size, depth = batch, dim
    else:
        size, depth = dim, batch

    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    first = pid_s * depth_per_split
    for k in range(first, tl.minimum(first + depth_per_split, depth), BLOCK_K):
        offs_k = (k + tl.arange(0, BLOCK_K))[None, :]
        if ON_BATCH:
            zi = load_centered(
                z_ptr, mean_ptr, offs_i, offs_k, batch, dim, stride_z_b, stride_z_d, Center, TYPE
            )
            zj = load_centered(
                z_ptr, mean_ptr, offs_j, offs_k, batch, dim, stride_z_b, stride_z_d, Center, TYPE
            )
        else:
            zi = load_centered(
                z_ptr, mean_ptr, offs_k, offs_i, batch, dim, stride_z_b, stride_z_d, Center, TYPE
            )
            zj = load_centered(
                z_ptr, mean_ptr, offs_k, offs_j, batch, dim, stride_z_b, stride_z_d, Center, TYPE
            )
        acc = tl.dot(zi, tl.trans(zj), acc, input_precision=PRECISION)
    acc *= scale

    tile = pid_p * tl.num_programs(0) + pid_t
    if IS_SPLIT:
        offs = tl.arange(0, BLOCK)
        tile += pid_s * tl.num_programs(1).to(tl.int64) * tl.num_programs(0)
        tile_offs = offs[:, None] * BLOCK + offs[None, :]
        tl.store(split_partial_ptr + tile * BLOCK * BLOCK + tile_offs, acc)
    else:
        _finish_tile(
            acc, gram_ptr + pid_p * size * size, norm_partial_ptr + tile, tile_i, tile_j, size,
            ZERO_DIAGONAL, STORE, BLOCK,
        )  # fmt: skip


@triton.jit
def _gram_merge_kernel(
    split_partial_ptr,  # [splits, P, tiles, BLOCK, BLOCK]
    gram_ptr,  # [P, R, R]
    norm_partial_ptr,  # [P, tiles]
    size,
    splits,
    ZERO_DIAGONAL: tl.constexpr,
    STORE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pid_t = tl.program_id(0)
    pid_p = tl.program_id(1).to(tl.int64)
    tiles = tl.num_programs(0)

    tile_i, tile_j = _tile_of_triangle(pid_t)
    tile = pid_p * tiles + pid_t
    offs = tl.arange(0, BLOCK)
    tile_ptr = split_partial_ptr + tile * BLOCK * BLOCK + offs[:, None] * BLOCK + offs[None, :]

    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    for _ in range(splits):
        acc += tl.load(tile_ptr)
        tile_ptr += tl.num_programs(1).to(tl.int64) * tiles * BLOCK * BLOCK
    _finish_tile(
        acc, gram_ptr + pid_p * size * size, norm_partial_ptr + tile, tile_i, tile_j, size,
        ZERO_DIAGONAL, STORE, BLOCK,
    )  # fmt: skip


@triton.jit
def gram_times(
    gram_ptr, z_ptr, mean_ptr, pid_p, offs_b, offs_d, batch, dim, stride_z_b, stride_z_d,
    Center: tl.constexpr, ON_BATCH: tl.constexpr, TYPE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Tile (offs_b [BLOCK_B, 1], offs_d [1, BLOCK_D]) of gram z, or of z gram where D < B."""
    acc = tl.zeros((BLOCK_B, BLOCK_D), tl.float32)
    if ON_BATCH:
        gram_ptr += pid_p * batch * batch
        for k in range(0, batch, BLOCK_K):
            col_k = (k + tl.arange(0, BLOCK_K))[None, :]
            row_k = (k + tl.arange(0, BLOCK_K))[:, None]
            mask = (offs_b < batch) & (col_k < batch)
            gram = tl.load(gram_ptr + offs_b.to(tl.int64) * batch + col_k, mask=mask, other=0.0)
            z = load_centered(
                z_ptr, mean_ptr, row_k, offs_d, batch, dim, stride_z_b, stride_z_d, Center, TYPE
            )
            acc = tl.dot(gram.to(TYPE), z, acc, input_precision=PRECISION)
    else:
        gram_ptr += pid_p * dim * dim
        for k in range(0, dim, BLOCK_K):
            col_k = (k + tl.arange(0, BLOCK_K))[None, :]
            row_k = (k + tl.arange(0, BLOCK_K))[:, None]
            mask = (row_k < dim) & (offs_d < dim)
            gram = tl.load(gram_ptr + row_k.to(tl.int64) * dim + offs_d, mask=mask, other=0.0)
            z = load_centered(
                z_ptr, mean_ptr, offs_b, col_k, batch, dim, stride_z_b, stride_z_d, Center, TYPE
            )
            acc = tl.dot(z, gram.to(TYPE), acc, input_precision=PRECISION)
    return acc


def on_batch(z: torch.Tensor) -> bool:
    """Whether the Gram of z [P, B, D] is B x B rather than D x D."""
    return z.shape[1] <= z.shape[2]


def triton_type(dtype: torch.dtype) -> Any:
    """Triton's name of a float dtype."""
    types = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
    return types[dtype]


def gram_fwd(
    z: torch.Tensor,
    mean: torch.Tensor | None,
    scale: float,
    *,
    store: bool,
    zero_diagonal: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """scale * Gram of z - mean, and the sums of its squares; launch it inside a device guard.

    Args:
        z: [P, B, D], float32, bfloat16 or float16.
        mean: [P, D] float32, or None for the plain Gram.
        scale: Multiplies the Gram.
        store: Whether to return the matrix; its norm alone needs no memory.
        zero_diagonal: Leave out the diagonal.

    Returns:
        (gram [P, R, R] float32 or empty, squares [P, tiles] float32, to be added up).
    """
    num_slots, batch, dim = z.shape
    size, depth = min(batch, dim), max(batch, dim)
    tile = gram_tile(z.dtype == torch.float32)
    blocks = triton.cdiv(size, tile.rows)
    tiles = blocks * (blocks + 1) // 2
    splits = gram_split(tiles * num_slots, depth, tile, 2 * sm_count(z.device))
    depth_per_split = triton.cdiv(triton.cdiv(depth, splits), tile.depth) * tile.depth
    splits = triton.cdiv(depth, depth_per_split)

    gram = z.new_empty((num_slots, size, size) if store else (0,), dtype=torch.float32)
    norm = z.new_empty((num_slots, tiles), dtype=torch.float32)
    split = z.new_empty(
        (splits if splits > 1 else 0, num_slots, tiles, tile.rows, tile.rows), dtype=torch.float32
    )
    finish = {
        "ZERO_DIAGONAL": zero_diagonal,
        "STORE": store,
        "BLOCK": tile.rows,
    }
    _gram_fwd_kernel[(tiles, num_slots, splits)](
        z_ptr=z,
        mean_ptr=z if mean is None else mean,
        gram_ptr=gram,
        norm_partial_ptr=norm,
        split_partial_ptr=split,
        batch=batch,
        dim=dim,
        stride_z_p=z.stride(0),
        stride_z_b=z.stride(1),
        stride_z_d=z.stride(2),
        scale=scale,
        depth_per_split=depth_per_split,
        ON_BATCH=on_batch(z),
        Center=mean is not None,
        IS_SPLIT=splits > 1,
        TYPE=triton_type(z.dtype),
        PRECISION=dot_precision(z.dtype),
        BLOCK_K=tile.depth,
        **product_options(tile),
        **finish,
    )
    if splits > 1:
        _gram_merge_kernel[(tiles, num_slots)](
            split_partial_ptr=split,
            gram_ptr=gram,
            norm_partial_ptr=norm,
            size=size,
            splits=splits,
            **launch_options(tile.num_warps),
            **finish,
        )
    return gram, norm
