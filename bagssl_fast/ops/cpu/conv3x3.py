"""A 3x3 convolution with stride 1 and padding 1, forward and backward (`csrc/winograd.h`).

Two ways, chosen by what comes in:

*Winograd.* float32 maps in channels-last memory with enough channels and pixels. All three products
(y, dx, dweight) take F(4x4, 3x3): 36 matrix products per 4x4 tile of outputs in place of 144. The
tile is sampled at 0, +-5/8, +-3/2 and infinity, where float32 loses half of what the textbook's
points lose: results are within 1.2e-6 (relative L2) of float64, torch's own within 0.5e-6.

*torch.* Anything else: other dtypes and memory formats, under autocast, the first layer of a
network, maps that tiles of 4x4 fit badly.

Saved for backward: x and weight. Memory beyond the results: up to 20 MiB that each calling thread
keeps. Derivatives of second order are the reference's alone.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bagssl_fast._extension import _C

MIN_CHANNELS = 32  # in and out; with fewer the transforms cost more than the products save
MIN_TILES = 32  # with fewer the weights' transforms do
MIN_GAIN = 2.0  # how many times fewer multiply-adds


@torch.library.custom_op("bagssl::conv3x3_cpu", mutates_args=(), device_types="cpu")
def conv3x3_forward(x: Tensor, weight: Tensor) -> Tensor:
    """y [N, K, H, W], channels-last, of float32 tensors."""
    y = _like_maps(x, weight.shape[0])
    _C.conv3x3(_pixels(x), _taps(weight), _pixels(y), num_threads=torch.get_num_threads())
    return y


@conv3x3_forward.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return _like_maps(x, weight.shape[0])


@torch.library.custom_op("bagssl::conv3x3_cpu_dx", mutates_args=(), device_types="cpu")
def conv3x3_dx(dy: Tensor, weight: Tensor) -> Tensor:
    """dx [N, C, H, W], channels-last."""
    dx = _like_maps(dy, weight.shape[1])
    _C.conv3x3_dx(_pixels(dy), _taps(weight), _pixels(dx), num_threads=torch.get_num_threads())
    return dx


@conv3x3_dx.register_fake
def _(dy: Tensor, weight: Tensor) -> Tensor:
    return _like_maps(dy, weight.shape[1])


@torch.library.custom_op("bagssl::conv3x3_cpu_dweight", mutates_args=(), device_types="cpu")
def conv3x3_dweight(x: Tensor, dy: Tensor, channels_last: bool) -> Tensor:
    """dweight [K, C, 3, 3], in channels-last memory or contiguous."""
    dweight = _like_weight(x, dy, channels_last)
    _C.conv3x3_dweight(
        _pixels(x), _pixels(dy), dweight.numpy(), num_threads=torch.get_num_threads()
    )
    return dweight


@conv3x3_dweight.register_fake
def _like_weight(x: Tensor, dy: Tensor, channels_last: bool) -> Tensor:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    shape = (dy.shape[1], x.shape[1], 3, 3)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)


def _like_maps(x: Tensor, channels: int) -> Tensor:
    shape = (x.shape[0], channels, *x.shape[2:])
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _pixels(x: Tensor) -> Any:
    """[N, H, W, C], an array over channels-last memory (a copy of other memory)."""
    return x.detach().contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1).numpy()


def _taps(weight: Tensor) -> Any:
    if not _is_channels_last(weight):
        weight = weight.contiguous()
    return weight.detach().numpy()


def _is_channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last)


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None]:
    x, weight = ctx.saved_tensors
    of_x, of_weight = ctx.needs_input_grad
    dx = conv3x3_dx(dy, weight) if of_x else None
    dweight = conv3x3_dweight(x, dy, _is_channels_last(weight)) if of_weight else None
    return dx, dweight


conv3x3_forward.register_autograd(_backward, setup_context=_setup_context)


def _worthwhile(x: Tensor, weight: Tensor) -> bool:
    """Whether Winograd's way is open and the faster one."""
    if x.dtype != torch.float32 or weight.dtype != torch.float32:
        return False
    if torch.is_autocast_enabled("cpu") or not _is_channels_last(x):
        return False
    batch, _, height, width = x.shape
    tiles = batch * -(-height // 4) * -(-width // 4)
    return (
        min(weight.shape[:2]) >= MIN_CHANNELS
        and tiles >= MIN_TILES
        and 9 * batch * height * width >= MIN_GAIN * 36 * tiles
    )


def conv3x3(x: Tensor, weight: Tensor) -> Tensor:
    """y [N, K, H, W] of `x` [N, C, H, W] and `weight` [K, C, 3, 3]; see `ops.conv3x3`."""
    return conv3x3_forward(x, weight) if _worthwhile(x, weight) else F.conv2d(x, weight, padding=1)
