"""The dispatch page: which implementation of which op runs where, and the ops themselves.

An op is implemented in `ops/<cell>/<op>.py` (`kernels/<op>.py`), by a function of the op's name. A
missing cell is a written None: the reference runs there. The cell is chosen by the argument
`impl=`, else by `set_impl` for the whole process, else by the device of the input. Nothing falls
back on an exception: what an implementation does not support is a ValueError that names
`impl="reference"`.
"""

import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from bagssl_fast.distributed.collectives import (
    all_reduce_mean,
    all_reduce_sum,
    gather,
    slots_to_ranks,
    values_of_slots,
)
from bagssl_fast.ops.deferred import Deferred as Deferred
from bagssl_fast.ops.deferred import Normalized as Normalized
from bagssl_fast.ops.deferred import applied as applied
from bagssl_fast.ops.reference.vicreg import CONVENTIONS

DISPATCH: dict[str, tuple[str, str | None, str | None]] = {
    # op               reference    cpu    cuda (Triton)
    "patch_views": ("reference", "cpu", "kernels"),
    "patch_embed": ("reference", "cpu", "kernels"),
    "conv_bn_relu": ("reference", "cpu", None),
    "add_relu": ("reference", "cpu", None),
    "relu_mean": ("reference", "cpu", None),
    "linear_bn_relu": ("reference", "cpu", "kernels"),
    "vicreg": ("reference", "cpu", "kernels"),
    "tcr": ("reference", "cpu", "kernels"),
    "bag_pool": ("reference", "cpu", "kernels"),
}
IMPLS = ("reference", "cpu", "cuda")

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_INTS = (torch.int64, torch.int32, torch.int16, torch.uint8)
_state: dict[str, str | None] = {"impl": None}
_loaded: dict[tuple[str, str], Callable[..., Any]] = {}


class BagPool(NamedTuple):
    """What `bag_pool` returns; what was not asked for is None."""

    mean: Tensor  # [B, D]
    deviation: Tensor | None  # [B]
    cosine: Tensor | None  # [B]


class RaggedImages(NamedTuple):
    """Images of any sizes in one buffer: image b is [h, w, 3] at bytes[offsets[b]:]."""

    bytes: Tensor  # uint8 [total]
    offsets: Tensor  # int64 [B]
    heights: Tensor  # int32 [B]
    widths: Tensor  # int32 [B]

    def unpack(self) -> list[Tensor]:
        """The images one by one, views of the buffer; on a GPU this waits for the sizes."""
        columns = (self.offsets.tolist(), self.heights.tolist(), self.widths.tolist())
        return [
            self.bytes[first : first + h * w * 3].view(h, w, 3)
            for first, h, w in zip(*columns, strict=True)
        ]


# ---------------------------------------------------------------------------------------- the ops


def patch_views(
    images: Tensor | Sequence[Tensor] | RaggedImages,
    params: Tensor,
    *,
    size: int | tuple[int, int],
    interpolation: str = "bilinear",
    blur_kernel: int = 0,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype = torch.float32,
    impl: str | None = None,
) -> Tensor:
    """Cut, augment and normalize the patches of a batch: [P, B, C, h, w], channels-last memory.

    Args:
        images: uint8 [B, H, W, 3], or B tensors [H, W, 3] of any sizes, or `RaggedImages`.
        params: float32 [P, B, 16], one row of parameters per patch.
        size: output height and width.
        interpolation: "bilinear" or "bicubic", both antialiased.
        blur_kernel: odd size of the Gaussian blur's kernel, 0 = chosen from the patch size.
        mean, std: per channel, of pixels in 0..1.
        dtype: torch.float32, bfloat16 or float16 (normalized), or uint8 (not normalized).
        impl: "reference", "cpu" or "cuda"; by default what `table()` shows for the device.
    """
    op = "patch_views"
    _check(op, "params", params, (torch.float32,), 3, "[P, B, 16]")
    if isinstance(images, Tensor):
        _check(op, "images", images, (torch.uint8,), 4, "[B, H, W, 3]")
    elif isinstance(images, RaggedImages):
        _check(op, "images.bytes", images.bytes, (torch.uint8,), 1, "[total]")
    else:
        for i, image in enumerate(images):
            _check(op, f"images[{i}]", image, (torch.uint8,), 3, "[H, W, 3]")
    first = images if isinstance(images, Tensor) else images[0] if len(images) else params
    chosen = _chosen_cell(op, impl, first.device.type)
    if isinstance(images, RaggedImages) and chosen != "kernels":
        images = images.unpack()
    run = _load(op, chosen)
    return run(
        images,
        params,
        size=size,
        interpolation=interpolation,
        blur_kernel=blur_kernel,
        mean=mean,
        std=std,
        dtype=dtype,
    )


def patch_embed(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    positions: Tensor,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    relu: bool = False,
    impl: str | None = None,
) -> Tensor:
    """A linear layer over patches cut from uint8 images: [P, B, M], differentiable in its weights.

    `y[p, b] = W . vec((patch / 255 - mean) / std) + bias`, patch (h, w) at `positions[p (, b)]`.

    Args:
        images: uint8 [B, H, W, C].
        weight: [M, C, h, w]; the result has its dtype.
        bias: [M] or None.
        positions: integer (top, left), [P, 2] for all images or [P, B, 2] for each.
        mean, std: per channel, of pixels in 0..1.
        relu: apply ReLU to the result.
        impl: "reference", "cpu" or "cuda"; by default what `table()` shows for the device.

    Raises:
        ValueError: wrong rank, dtype or device; a patch that is not inside the image.
    """
    op = "patch_embed"
    _check(op, "images", images, (torch.uint8,), 4, "[B, H, W, C]")
    _check(op, "weight", weight, _FLOATS, 4, "[M, C, h, w]")
    _check(op, "positions", positions, _INTS, (2, 3), "[P, 2] or [P, B, 2]")
    _check_same_device(op, images=images, weight=weight, bias=bias, positions=positions)
    batch, height, width, channels = images.shape
    out_dim, weight_channels, patch_h, patch_w = weight.shape
    expected = (2,) if positions.dim() == 2 else (batch, 2)
    if tuple(positions.shape[1:]) != expected:
        raise ValueError(
            f"{op}: positions are {list(positions.shape)}, expected [P, 2] or [P, {batch}, 2]"
        )
    if weight_channels != channels or len(mean) != channels or len(std) != channels:
        raise ValueError(
            f"{op}: images have {channels} channels, weight {weight_channels}, mean {len(mean)}, "
            f"std {len(std)}; they must agree"
        )
    if min(patch_h, patch_w) < 1 or patch_h > height or patch_w > width:
        raise ValueError(
            f"{op}: a patch of {patch_h}x{patch_w} does not fit into images of {height}x{width}; "
            "use smaller patches or larger images"
        )
    if bias is not None and tuple(bias.shape) != (out_dim,):
        raise ValueError(f"{op}: bias is {list(bias.shape)}, expected [{out_dim}]")
    _check_positions(op, positions, height - patch_h, width - patch_w)
    run = _implementation(op, impl, images)
    return run(images, weight, bias, positions, mean=mean, std=std, relu=relu)


def conv_bn_relu(
    x: Tensor | Deferred,
    weight: Tensor,
    gamma: Tensor,
    beta: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    stride: int = 1,
    padding: int = 0,
    training: bool,
    momentum: float = 0.1,
    eps: float = 1e-5,
    group: ProcessGroup | None = None,
    relu: bool = True,
    impl: str | None = None,
) -> Tensor | Deferred | Normalized:
    """`relu(batch_norm(conv2d(x, weight)))`, a block of a convolutional network.

    On a CPU the normalized activation is never written: what is returned there is `Deferred`, which
    the next block and `relu_mean` take as it is, and `applied` turns into the activation itself.
    There 3x3 convolutions with stride 1 may run by Winograd's F(4x4, 3x3), which samples tiles of
    6x6 pixels: a NaN reaches every pixel of the 4x4 tiles that read it. Under autocast to bfloat16
    maps and operands of products are of that type there, sums and statistics float32.

    Args:
        x: [N, C, H, W] or an activation that a block returned.
        weight: [M, C, h, w]. gamma, beta: [M].
        running_mean, running_var: [M], moved in place when training; may be None when training.
        stride, padding: of the convolution, along both dimensions.
        training: normalize by the batch's statistics rather than the running ones.
        momentum: weight of the new value in the running statistics.
        eps: added to the variance.
        group: ranks over which statistics are taken; all of them must call, with equal shapes.
        relu: apply ReLU; without, the result is a tensor or `Normalized`, which `add_relu` takes.
        impl: "reference", "cpu" or "cuda"; by default what `table()` shows for the device.

    Returns:
        The activation of [N, M, H', W'], written or not.

    Raises:
        ValueError: wrong rank, shape, dtype or device; a kernel larger than the padded map; one
            value per channel where statistics are needed.
    """
    op = "conv_bn_relu"
    maps = x.y if isinstance(x, Deferred) else x
    _check(op, "x", maps, _FLOATS, 4, "[N, C, H, W]")
    _check(op, "weight", weight, _FLOATS, 4, "[M, C, h, w]")
    vectors = {
        "gamma": gamma,
        "beta": beta,
        "running_mean": running_mean,
        "running_var": running_var,
    }
    _check_same_device(op, x=maps, weight=weight, **vectors)
    channels, kernel = weight.shape[0], weight.shape[2:]
    if weight.shape[1] != maps.shape[1]:
        raise ValueError(
            f"{op}: weight is {list(weight.shape)}, expected [M, {maps.shape[1]}, h, w] for x "
            f"{list(maps.shape)}"
        )
    for name, tensor in vectors.items():
        if tensor is not None and tuple(tensor.shape) != (channels,):
            raise ValueError(f"{op}: {name} is {list(tensor.shape)}, expected [{channels}]")
    if stride < 1 or padding < 0:
        raise ValueError(f"{op}: stride {stride} must be at least 1, padding {padding} at least 0")
    sides = [
        (side + 2 * padding - k) // stride + 1
        for side, k in zip(maps.shape[2:], kernel, strict=True)
    ]
    if min(sides) < 1 or min(kernel) < 1:
        raise ValueError(
            f"{op}: a kernel of {kernel[0]}x{kernel[1]} does not fit into maps of "
            f"{maps.shape[2]}x{maps.shape[3]} padded by {padding}; use larger maps"
        )
    count = maps.shape[0] * sides[0] * sides[1]
    if training and count < 2 and group is None:
        raise ValueError(
            f"{op}: {count} values per channel in training, batch statistics need at least 2"
        )
    if not training and (running_mean is None or running_var is None):
        raise ValueError(f"{op}: evaluation needs running_mean and running_var, one is None")
    run = _implementation(op, impl, maps)
    return run(
        x,
        weight,
        gamma,
        beta,
        running_mean,
        running_var,
        stride=stride,
        padding=padding,
        training=training,
        momentum=momentum,
        eps=eps,
        group=group,
        relu=relu,
    )


def add_relu(
    x: Tensor | Normalized, identity: Tensor | Normalized | Deferred, *, impl: str | None = None
) -> Tensor:
    """The residual sum `relu(x + identity)`, written: it has two readers.

    Args:
        x: [N, C, H, W] or what `conv_bn_relu` returned without its ReLU.
        identity: the same, or an activation that `conv_bn_relu` returned.
        impl: "reference", "cpu" or "cuda"; by default what `table()` shows for the device.

    Returns:
        [N, C, H, W].

    Raises:
        ValueError: wrong rank, dtype or device, maps of different shapes.
    """
    op = "add_relu"
    maps = x.y if isinstance(x, Normalized) else x
    others = identity.y if isinstance(identity, Normalized | Deferred) else identity
    _check(op, "x", maps, _FLOATS, 4, "[N, C, H, W]")
    _check(op, "identity", others, _FLOATS, 4, "[N, C, H, W]")
    _check_same_device(op, x=maps, identity=others)
    if maps.shape != others.shape:
        raise ValueError(
            f"{op}: x is {list(maps.shape)}, identity {list(others.shape)}; they must agree"
        )
    return cast(Tensor, _implementation(op, impl, maps)(x, identity))


def relu_mean(x: Tensor | Deferred, *, impl: str | None = None) -> Tensor:
    """The mean of an activation over its map, without writing one that is `Deferred`.

    Args:
        x: [N, C, H, W] or an activation that `conv_bn_relu` returned.
        impl: "reference", "cpu" or "cuda"; by default what `table()` shows for the device.

    Returns:
        [N, C], float32 of bfloat16 maps that are `Deferred` on a CPU.

    Raises:
        ValueError: wrong rank, dtype or device, a map without pixels.
    """
    op = "relu_mean"
    maps = x.y if isinstance(x, Deferred) else x
    _check(op, "x", maps, _FLOATS, 4, "[N, C, H, W]")
    if maps.shape[2] * maps.shape[3] == 0:
        raise ValueError(f"{op}: x is {list(maps.shape)}, expected at least one pixel")
    return cast(Tensor, _implementation(op, impl, maps)(x))


def linear_bn_relu(
    x: Tensor,
    weight: Tensor,
    gamma: Tensor,
    beta: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    training: bool,
    momentum: float = 0.1,
    eps: float = 1e-5,
    relu: bool = True,
    group: ProcessGroup | None = None,
    impl: str | None = None,
) -> Tensor:
    """`relu(batch_norm(x W^T))`, a projector's block, as torch's Linear, BatchNorm1d, ReLU.

    Args:
        x: [..., F]; all leading dimensions are the batch. The result [..., M] has its dtype.
        weight: [M, F]. gamma, beta: [M].
        running_mean, running_var: [M], moved in place when training; may be None when training.
        training: normalize by the batch's statistics rather than the running ones.
        momentum: weight of the new value in the running statistics.
        eps: added to the variance.
        relu: apply ReLU to the result.
        group: ranks over which statistics are taken; all of them must call.
        impl: "reference", "cpu" or "cuda"; by default what `table()` shows for the device.

    Raises:
        ValueError: wrong rank, shape, dtype or device; one row where statistics are needed.
    """
    op = "linear_bn_relu"
    _check(op, "x", x, _FLOATS, None, "[..., F]")
    _check(op, "weight", weight, _FLOATS, 2, "[M, F]")
    _check_same_device(op, x=x, weight=weight, gamma=gamma, beta=beta, running_mean=running_mean)
    out_dim, in_dim = weight.shape
    if x.dim() < 2 or x.shape[-1] != in_dim:
        raise ValueError(f"{op}: x is {list(x.shape)}, expected [..., {in_dim}] as weight has it")
    for name, tensor in {
        "gamma": gamma,
        "beta": beta,
        "running_mean": running_mean,
        "running_var": running_var,
    }.items():
        if tensor is not None and tuple(tensor.shape) != (out_dim,):
            raise ValueError(f"{op}: {name} is {list(tensor.shape)}, expected [{out_dim}]")
    rows = x.numel() // in_dim if in_dim else 0
    if training and rows < 2 and group is None:
        raise ValueError(f"{op}: {rows} rows in training, batch statistics need at least 2")
    if not training and (running_mean is None or running_var is None):
        raise ValueError(f"{op}: evaluation needs running_mean and running_var, one is None")
    run = _implementation(op, impl, x)
    return run(
        x,
        weight,
        gamma,
        beta,
        running_mean,
        running_var,
        training=training,
        momentum=momentum,
        eps=eps,
        relu=relu,
        group=group,
    )


def vicreg(
    z: Tensor,
    *,
    gamma: float = 1.0,
    eps: float = 1e-4,
    convention: str = "official",
    group: ProcessGroup | None = None,
    impl: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Invariance, variance and covariance, unweighted scalars (VICReg's loss is 25, 25, 1 of them).

    See `reference/vicreg.py` for the formulas and for what `convention` scales: at P = 2 the terms
    are those of "official" (the authors' code, lightly), "paper", "solo_learn" or "vicregl".

    Args:
        z: [P, B, D]: P slots of B images, at least 2 of each.
        gamma: standard deviation below which a feature is pushed apart.
        eps: added to the variance before its root, positive.
        convention: a name of `reference.vicreg.CONVENTIONS`.
        group: ranks that together hold the batch; the value is that of the global batch.
        impl: "reference", "cpu" or "cuda"; by default what `table()` shows for the device.

    Returns:
        Three scalars in float32 (float64 if z is). Non-finite z gives non-finite terms.

    Raises:
        ValueError: wrong rank, dtype or device, P or B below 2, an unknown convention.
    """
    op = "vicreg"
    _check(op, "z", z, _FLOATS, 3, "[P, B, D]")
    num_slots, batch, dim = z.shape
    if num_slots < 2:
        raise ValueError(f"{op}: {num_slots} slots in z {list(z.shape)}, pairs need at least 2")
    if convention not in CONVENTIONS:
        raise ValueError(
            f"{op}: convention {convention!r}; expected one of " + ", ".join(CONVENTIONS)
        )
    if eps <= 0:
        raise ValueError(
            f"{op}: eps is {eps}, expected > 0 (a constant feature has no gradient at 0)"
        )
    total = batch * (1 if group is None else dist.get_world_size(group))
    _check_batch(op, z, total)
    if group is None or total < dim:
        run = _implementation(op, impl, z)
        terms = run(gather(z, 1, group, alike=True), gamma=gamma, eps=eps)
    else:
        terms = _vicreg_by_moments(z, total, gamma, eps, group)
    scales = (dim if scale == "D" else float(scale) for scale in CONVENTIONS[convention])
    invariance, variance, covariance = (
        term if scale == 1 else scale * term for term, scale in zip(terms, scales, strict=True)
    )
    return invariance, variance, covariance


def tcr(
    z: Tensor, *, eps: float = 0.2, group: ProcessGroup | None = None, impl: str | None = None
) -> Tensor:
    """Total coding rate of each slot, [P]: `1/2 logdet(I + D / (B eps) Z_p^T Z_p)`.

    Larger is more spread: a loss subtracts it. `eps` as in EMP-SSL's code (its paper's eps^2).

    Args:
        z: [P, B, D]; EMP-SSL's rows have norm 1.
        eps: distortion, positive.
        group: ranks that together hold the batch; the value is that of the global batch. The slots
            are shared among the ranks.
        impl: "reference", "cpu" or "cuda"; by default what `table()` shows for the device.

    Returns:
        [P] in float32 (float64 if z is). A slot with non-finite values has a non-finite rate.

    Raises:
        ValueError: wrong rank, dtype or device, an empty slot, eps not positive.
    """
    op = "tcr"
    _check(op, "z", z, _FLOATS, 3, "[P, B, D]")
    if z.numel() == 0:
        raise ValueError(
            f"{op}: z is {list(z.shape)}, expected at least one slot, image and feature"
        )
    if eps <= 0:
        raise ValueError(f"{op}: eps is {eps}, expected > 0")
    run = _implementation(op, impl, z)
    if group is None:
        return cast(Tensor, run(z, eps=eps))
    own = slots_to_ranks(z, group)
    # A rank without a slot has no rates, but takes part in the way back.
    rates = run(own, eps=eps) if len(own) else own.sum(dim=(1, 2), dtype=_sums(z))
    return values_of_slots(rates, len(z), group)


def bag_pool(
    x: Tensor,
    *,
    normalize: bool = False,
    deviation: bool = False,
    cosine: bool = False,
    impl: str | None = None,
) -> BagPool:
    """The mean of each bag and, on request, how closely its patches agree.

    Args:
        x: [P, B, D].
        normalize: divide the mean by its L2 norm (deviation and cosine stay about the plain mean).
        deviation: also return `mean_{p,d} (x_p - mean)^2`, [B].
        cosine: also return `mean_p cos(x_p, mean)`, [B]: EMP-SSL's invariance.
        impl: "reference", "cpu" or "cuda"; by default what `table()` shows for the device.

    Returns:
        `BagPool(mean [B, D], deviation, cosine)` in float32 (float64 if x is). B = 0 is empty.

    Raises:
        ValueError: wrong rank, dtype or device, P or D of 0.
    """
    op = "bag_pool"
    _check(op, "x", x, _FLOATS, 3, "[P, B, D]")
    if x.shape[0] == 0 or x.shape[2] == 0:
        raise ValueError(f"{op}: x is {list(x.shape)}, expected at least one patch and one feature")
    run = _implementation(op, impl, x)
    return BagPool(*run(x, normalize=normalize, deviation=deviation, cosine=cosine))


# ------------------------------------------------------------------------------------- the choice


def set_impl(impl: str | None) -> None:
    """Choose for all ops of this process: "reference", "cpu", "cuda", or None for the device's."""
    if impl is not None and impl not in IMPLS:
        raise ValueError(f"set_impl: got {impl!r}, expected one of {', '.join(IMPLS)}, None")
    _state["impl"] = impl


@contextmanager
def use_impl(impl: str | None) -> Iterator[None]:
    """As `set_impl`, for the length of a `with` block."""
    before = _state["impl"]
    set_impl(impl)
    try:
        yield
    finally:
        _state["impl"] = before


def table() -> str:
    """What runs where under the present choice, one line per op, for logs."""
    lines = [f"{'op':<16}{'on cpu':<12}{'on cuda':<12}"]
    for op in DISPATCH:
        cells = (_cell(op, _state["impl"] or device) for device in ("cpu", "cuda"))
        lines.append(f"{op:<16}" + "".join(f"{cell:<12}" for cell in cells))
    return "\n".join(line.rstrip() for line in lines)


def cell(op: str, device: str) -> str:
    """The folder that runs an op on a device ("cpu", "cuda") under the present choice.

    Raises:
        ValueError: If the present choice does not run there.
    """
    return _chosen_cell(op, None, device)


def _cell(op: str, impl: str) -> str:
    """The folder of the implementation that `impl` names; the reference's where there is none."""
    return DISPATCH[op][IMPLS.index(impl)] or DISPATCH[op][0]


def _implementation(op: str, impl: str | None, x: Tensor) -> Callable[..., Any]:
    """The function that runs `op` on `x`."""
    return _load(op, _chosen_cell(op, impl, x.device.type))


def _chosen_cell(op: str, impl: str | None, device: str) -> str:
    """The folder that runs `op`: by `impl`, by the process-wide choice, by the device."""
    choice = impl or _state["impl"] or (device if device in IMPLS else "reference")
    if choice not in IMPLS:
        raise ValueError(f"{op}: impl={choice!r}, expected one of {', '.join(IMPLS)}")
    cell = _cell(op, choice)
    interpreted = choice == "cuda" and os.environ.get("TRITON_INTERPRET") == "1"
    if cell != "reference" and choice != device and not interpreted:
        raise ValueError(
            f"{op}: impl={choice!r} was given a tensor on {device}, expected {choice} tensors; "
            f'move the tensor, or use impl="reference"'
        )
    return cell


def _load(op: str, cell: str) -> Callable[..., Any]:
    """The function of a cell, imported on first use: Triton may be absent if it is not needed."""
    if (op, cell) not in _loaded:
        package = "bagssl_fast.kernels" if cell == "kernels" else f"bagssl_fast.ops.{cell}"
        _loaded[op, cell] = getattr(importlib.import_module(f"{package}.{op}"), op)
    return _loaded[op, cell]


def _load_for_compile() -> None:
    """Import every op: torch.compile can look a function up, but not trace an import."""
    on_gpu = torch.cuda.is_available() and importlib.util.find_spec("triton") is not None
    cells = IMPLS if on_gpu else ("reference", "cpu")
    for op in DISPATCH:
        for impl in cells:
            _load(op, _cell(op, impl))


# ------------------------------------------------------------------------------------- the checks


def _check(
    op: str,
    name: str,
    x: Tensor,
    dtypes: Sequence[torch.dtype],
    rank: int | tuple[int, ...] | None,
    shape: str,
) -> None:
    """Raise ValueError unless `x` is a tensor of one of these ranks and dtypes."""
    if not isinstance(x, Tensor):
        raise ValueError(f"{op}: {name} is a {type(x).__name__}, expected a tensor {shape}")
    ranks = (rank,) if isinstance(rank, int) else rank
    if ranks is not None and x.dim() not in ranks:
        raise ValueError(f"{op}: {name} is {list(x.shape)}, expected {shape}")
    if x.dtype not in dtypes:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(f"{op}: {name} is {x.dtype}, supported are {names}; convert it first")


def _check_same_device(op: str, **tensors: Tensor | None) -> None:
    devices = {name: x.device for name, x in tensors.items() if x is not None}
    if len(set(devices.values())) > 1:
        came = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise ValueError(f"{op}: tensors on several devices ({came}); move them to one")


def _check_positions(op: str, positions: Tensor, last_top: int, last_left: int) -> None:
    # On a GPU this would wait for the device, so there positions are not checked.
    if positions.device.type != "cpu" or torch.compiler.is_compiling() or not positions.numel():
        return
    low, high = positions.amin().item(), positions.reshape(-1, 2).amax(dim=0).tolist()
    if low < 0 or high[0] > last_top or high[1] > last_left:
        raise ValueError(
            f"{op}: positions reach from {low} to (top, left) = {tuple(high)}, expected from 0 to "
            f"({last_top}, {last_left}), where patches still fit into the images"
        )


def _check_batch(op: str, z: Tensor, total: int) -> None:
    if total < 2 or z.shape[2] == 0:
        raise ValueError(
            f"{op}: z is {list(z.shape)}, statistics over the batch need B >= 2 and D >= 1 "
            "(drop_last=True avoids a last batch of one)"
        )


# ------------------------------------------------------------------------------------- many ranks


def _sums(z: Tensor) -> torch.dtype:
    return torch.float64 if z.dtype == torch.float64 else torch.float32


def _vicreg_by_moments(
    z: Tensor, total: int, gamma: float, eps: float, group: ProcessGroup
) -> tuple[Tensor, Tensor, Tensor]:
    """VICReg's terms from all-reduced mean and D x D second moment, for global batches >= D.

    Sends P*D*D words where gathering z would send P*B*D, and splits the Gram over the ranks.
    """
    num_slots, _, dim = z.shape
    with torch.autocast(z.device.type, enabled=False):
        z = z.to(_sums(z))
        invariance = all_reduce_mean(2 * z.var(dim=0).mean(), group, alike=True)
        with torch.no_grad():  # the moments about the mean do not change with it
            mean = all_reduce_sum(z.sum(dim=1, keepdim=True), group) / total
        zc = z - mean
        gram = all_reduce_sum(zc.mT @ zc, group, alike=True)  # [P, D, D]
        squares = gram.diagonal(dim1=1, dim2=2)  # [P, D]
        variance = torch.relu(gamma - torch.sqrt(squares / (total - 1) + eps)).mean()
        off_diagonal = (gram - torch.diag_embed(squares)).square().sum()
        scale = 2 / (num_slots * dim * (total - 1) ** 2)
    return invariance, variance, scale * off_diagonal


_load_for_compile()
