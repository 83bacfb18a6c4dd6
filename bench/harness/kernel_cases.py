"""The kernels at the shapes of the recipes, launched on meta tensors (to compile) or on data.

A case calls the launchers of `kernels/`; a pass names its kernels and the minimum of bytes that
must cross the memory bus: every input, every result and every tensor saved for backward once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from bagssl_fast.kernels import _lars as lars
from bagssl_fast.kernels import bag_pool, patch_embed, patch_views, tcr, vicreg
from bagssl_fast.kernels import linear_bn_relu as block

Make = Callable[..., torch.Tensor]


@dataclass(frozen=True)
class Pass:
    """Launches that do one job: kernels, minimum of bytes, arithmetic, and the limit if any."""

    name: str
    kernels: tuple[str, ...]
    fewest: float
    flops: float = 0.0
    floor: float | None = None  # at most this many times the minimum of bytes


@dataclass(frozen=True)
class Case:
    """`launch(make, dtype)` runs all launchers; `passes(dtype)` describes them."""

    op: str
    label: str
    launch: Callable[[Make, torch.dtype], None]
    passes: Callable[[torch.dtype], list[Pass]]
    count_label: str = ""  # how the counted run is smaller, if so
    count: Callable[[Make, torch.dtype], None] | None = None
    count_passes: Callable[[torch.dtype], list[Pass]] | None = None
    quick: bool = field(default=False)


FLOOR = 1.15


def bag_pool_case(num_patches: int, batch: int, dim: int, quick: bool = False) -> Case:
    elements, rows = num_patches * batch * dim, batch * dim

    def launch(make: Make, dtype: torch.dtype) -> None:
        x = make(num_patches, batch, dim, dtype=dtype)
        outs = bag_pool.bag_pool_fwd(x, False, True, True, True)
        pooled, norm, _, _, direction = outs
        grads = make(batch, dim), make(batch), make(batch)
        bag_pool.bag_pool_bwd(x, pooled, norm, direction, *grads, False, True, True)

    def passes(dtype: torch.dtype) -> list[Pass]:
        x, kept = elements * dtype.itemsize, 4 * rows
        fwd = x + 2 * kept + 8 * batch
        bwd = 2 * x + 3 * kept + 8 * batch
        return [
            Pass("forward", ("_bag_pool_fwd_kernel",), fwd, 8 * elements, FLOOR),
            Pass("backward", ("_bag_pool_bwd_kernel",), bwd, 9 * elements, FLOOR),
        ]

    return Case("bag_pool", f"P={num_patches} B={batch} D={dim}", launch, passes, quick=quick)


def gram_bytes(num_slots: int, batch: int, dim: int, size: int) -> tuple[float, float]:
    """Elements of z and Gram that a product must read."""
    return num_slots * batch * dim, num_slots * size * size


def vicreg_case(num_slots: int, batch: int, dim: int, quick: bool = False) -> Case:
    size = min(batch, dim)

    def launch(make: Make, dtype: torch.dtype) -> None:
        z = make(num_slots, batch, dim, dtype=dtype)
        _, *stats = vicreg.vicreg_fwd(z, 1.0, 1e-4, True)
        vicreg.vicreg_bwd(z, *stats, make(3), 1.0, 1e-4)

    def passes(dtype: torch.dtype) -> list[Pass]:
        z, gram = gram_bytes(num_slots, batch, dim, size)
        columns, means = 8 * num_slots * dim, 4 * batch * dim
        product = float(num_slots) * size * batch * dim
        stored = 4 * gram if batch <= dim else 0
        again = 0 if batch <= dim else 1  # backward recomputes the D x D Gram
        return [
            Pass(
                "statistics",
                ("_stats_fwd_kernel", "_stats_merge_kernel"),
                z * dtype.itemsize + columns + means,
                9 * z,
                FLOOR,
            ),
            Pass(
                "gram",
                ("_gram_fwd_kernel", "_gram_merge_kernel"),
                (z * dtype.itemsize + columns / 2) * (1 + again) + max(stored, 4 * gram * again),
                product * (1 + again),
            ),
            Pass(
                "backward",
                ("_vicreg_bwd_kernel",),
                2 * z * dtype.itemsize + columns + means + 4 * gram,
                2 * product,
            ),
        ]

    return Case("vicreg", f"P={num_slots} B={batch} D={dim}", launch, passes, quick=quick)


def tcr_case(num_slots: int, batch: int, dim: int) -> Case:
    size = min(batch, dim)

    def launch(make: Make, dtype: torch.dtype) -> None:
        z = make(num_slots, batch, dim, dtype=dtype)
        _, inverse = tcr.tcr_fwd(z, 0.2, True)
        tcr.tcr_bwd(z, inverse, make(num_slots), 0.2)

    def passes(dtype: torch.dtype) -> list[Pass]:
        z, gram = gram_bytes(num_slots, batch, dim, size)
        product = float(num_slots) * size * batch * dim
        runs = 1 if batch <= dim else 2
        once = z * dtype.itemsize + 4 * gram
        return [
            Pass("gram", ("_gram_fwd_kernel", "_gram_merge_kernel"), once * runs, product * runs),
            Pass("backward", ("_tcr_bwd_kernel",), once + z * dtype.itemsize, 2 * product),
        ]

    return Case("tcr", f"P={num_slots} B={batch} D={dim}", launch, passes)


def block_case(rows: int, cols: int, quick: bool = False) -> Case:
    def launch(make: Make, dtype: torch.dtype) -> None:
        y, column = make(rows, cols, dtype=dtype), make(cols)
        block.batch_stats_fwd(y)
        out = block.normalize_fwd(y, column, column, column, column, True, dtype)
        sums = block.reduce_bwd(y, out, column, column, column, column, True)
        block.normalize_bwd(y, out, column, column, column, column, sums, True, True)

    def passes(dtype: torch.dtype) -> list[Pass]:
        y, column = rows * cols * dtype.itemsize, 4 * cols
        elements = rows * cols
        stats = ("_stats_fwd_kernel", "_stats_merge_kernel")
        return [
            Pass("statistics", stats, y + 3 * column, 4 * elements, FLOOR),
            Pass("normalize", ("_normalize_fwd_kernel",), 2 * y + 4 * column, 4 * elements, FLOOR),
            Pass("dgamma, dbeta", ("_reduce_bwd_kernel",), 2 * y + 6 * column, 7 * elements, FLOOR),
            Pass("dy", ("_normalize_bwd_kernel",), 3 * y + 6 * column, 9 * elements, FLOOR),
        ]

    return Case("linear_bn_relu", f"N={rows} M={cols}", launch, passes, quick=quick)


def embed_case(
    batch: int, side: int, positions: int, patch: int, out_dim: int, quick: bool = False
) -> Case:
    depth = 3 * patch * patch

    def launch(make: Make, dtype: torch.dtype) -> None:
        images = make(batch, side, side, 3, dtype=torch.uint8)
        where = make(positions, 2, dtype=torch.int64)[:, None].expand(-1, batch, -1)
        folded = make(depth, out_dim, dtype=dtype)
        out = patch_embed.patch_embed_fwd(
            images, where, folded, make(out_dim), [patch, patch], True
        )
        patch_embed.patch_embed_bwd(images, where, out, out, [patch, patch], True)

    def passes(dtype: torch.dtype) -> list[Pass]:
        rows = positions * batch
        images, y = batch * side * side * 3, rows * out_dim * dtype.itemsize
        weights = depth * out_dim
        flops = 2.0 * rows * depth * out_dim
        fwd = images + weights * dtype.itemsize + 4 * out_dim + y + 16 * positions
        bwd = images + 2 * y + 4 * weights + 4 * out_dim + 16 * positions
        return [
            Pass("forward", ("_patch_embed_fwd_kernel",), fwd, flops),
            Pass("backward", ("_patch_embed_bwd_kernel",), bwd, flops),
        ]

    label = f"B={batch} {side}x{side}, {positions} patches {patch}x{patch}, M={out_dim}"
    return Case("patch_embed", label, launch, passes, quick=quick)


def lars_case(emp: bool, *sizes: int, quick: bool = False) -> Case:
    """One step of a group; float32 whatever the dtype."""
    total = sum(sizes)

    def launch(make: Make, dtype: torch.dtype) -> None:
        triple = [[make(size) for size in sizes] for _ in range(3)]
        options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-6, "eta": 0.001}
        lars.lars(*triple, **options, adapt=True, emp=emp)

    def passes(dtype: torch.dtype) -> list[Pass]:
        norms = ("_lars_norms_kernel", "_lars_ratio_kernel")
        return [
            Pass("norms", norms, 8 * total, 6 * total, FLOOR),
            Pass("update", ("_lars_update_kernel",), 20 * total, 6 * total, FLOOR),
        ]

    label = f"{'EMP-SSL' if emp else 'VICReg'}, {len(sizes)} tensors, {total / 1e6:.1f} M"
    return Case("lars", label, launch, passes, quick=quick)


def view_table(num_slots: int, batch: int, image: int) -> torch.Tensor:
    """Crops of a quarter of the image on average, every augmentation at its usual probability."""
    generator = torch.Generator().manual_seed(0)

    def uniform(low: float, high: float) -> torch.Tensor:
        return low + (high - low) * torch.rand(num_slots, batch, generator=generator)

    params = torch.zeros(num_slots, batch, 16)
    side = (image * uniform(0.1, 0.5).sqrt()).floor()
    params[..., 2] = side
    params[..., 3] = side
    params[..., 0] = ((image - side) * uniform(0, 1)).floor()
    params[..., 1] = ((image - side) * uniform(0, 1)).floor()
    params[..., 4] = uniform(0, 2).floor()
    for column in (5, 6, 7):
        params[..., column] = uniform(0.6, 1.4)
    params[..., 8] = uniform(-0.1, 0.1)
    params[..., 9] = torch.where(uniform(0, 1) < 0.8, uniform(0, 24).floor(), torch.tensor(-1.0))
    params[..., 10] = (uniform(0, 1) < 0.2).float()
    params[..., 11] = torch.where(uniform(0, 1) < 0.5, uniform(0.1, 2.0), torch.tensor(0.0))
    params[..., 12] = torch.where(uniform(0, 1) < 0.1, torch.tensor(128.0), torch.tensor(256.0))
    return params


def view_case(
    size: int,
    bicubic: bool,
    image: int,
    counted: int,
    quick: bool = False,
    num_slots: int = 20,
    batch: int = 256,
) -> Case:
    kernels = ("_small_views_kernel", "_large_views_kernel")
    table = view_table(1, counted, image)

    def run(make: Make, dtype: torch.dtype, slots: int, images: int) -> None:
        data = make(images * image * image * 3, dtype=torch.uint8)
        offsets = make(images, dtype=torch.int64)
        sides = make(images, dtype=torch.int32)
        params = make(slots, images, 16)
        if data.device.type != "meta":
            offsets.copy_(torch.arange(images) * image * image * 3)
            sides.fill_(image)
            params.copy_(view_table(slots, images, image))
        patch_views.patch_views_fwd(
            data, offsets, sides, sides, params, [size, size], bicubic,
            max(3, (size // 10) | 1), [0.5] * 3, [0.2] * 3, dtype,
        )  # fmt: skip

    def describe(params: torch.Tensor, dtype: torch.dtype) -> list[Pass]:
        patches = params.shape[0] * params.shape[1]
        crops = 3 * float((params[..., 2] * params[..., 3]).sum())
        result = patches * size * size * 3 * dtype.itemsize
        fewest = crops + result + patches * 84
        # Per crop pixel 2 bytes of weight, as multiply-adds over blocks of 16 in both products.
        return [Pass("forward", kernels, fewest, floor=FLOOR)]

    full = view_table(num_slots, batch, image)
    filter_name = "bicubic" if bicubic else "bilinear"
    return Case(
        "patch_views",
        f"{size}x{size} {filter_name} of {image}x{image}, P={num_slots} B={batch}",
        lambda make, dtype: run(make, dtype, num_slots, batch),
        lambda dtype: describe(full, dtype),
        f"{counted} of the patches",
        lambda make, dtype: run(make, dtype, 1, counted),
        lambda dtype: describe(table, dtype),
        quick,
    )


CASES: list[Case] = [
    bag_pool_case(20, 256, 4096, quick=True),
    bag_pool_case(200, 100, 1024),
    vicreg_case(2, 256, 2048, quick=True),
    vicreg_case(2, 512, 8192),
    vicreg_case(20, 128, 1024),
    vicreg_case(2, 2048, 1024),
    tcr_case(20, 100, 1024),
    tcr_case(200, 100, 1024),
    tcr_case(20, 512, 256),
    block_case(4096, 8192),
    block_case(2000, 4096, quick=True),
    block_case(51200, 512),
    lars_case(False, 2048 * 2048, 512 * 512 * 9, 64 * 64 * 9, quick=True),
    lars_case(True, 4096 * 4096, 4096 * 512, 512 * 512 * 9),
    embed_case(64, 32, 256, 16, 256),
    embed_case(256, 224, 20, 32, 512),
    view_case(32, False, 64, 6, quick=True),
    view_case(32, True, 64, 6),
    view_case(64, False, 160, 6),
    view_case(96, False, 224, 2),
    view_case(224, False, 400, 2),
    view_case(224, True, 400, 1),
]
