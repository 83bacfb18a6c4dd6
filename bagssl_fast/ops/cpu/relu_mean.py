"""The mean of an activation over its map, which is read once and not written (`csrc/relu_mean.h`).

Served are `Deferred` activations of float32 and bfloat16, whose means are float32; all others are
the reference's, and so are derivatives of second order. Any number of threads gives the same bits.
"""

from typing import Any

import torch
from torch import Tensor

from bagssl_fast._extension import _C
from bagssl_fast.ops.cpu.conv_bn_relu import is_served, pixels, vector
from bagssl_fast.ops.deferred import Deferred
from bagssl_fast.ops.reference.relu_mean import relu_mean as reference


def _forward(y: Tensor, center: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Means [N, C] of the activation of y [N, C, H, W]."""
    means = scale.new_empty(y.shape[:2])
    _C.relu_mean(
        pixels(y),
        vector(center),
        vector(scale),
        vector(shift),
        vector(means),
        num_threads=torch.get_num_threads(),
    )
    return means


relu_mean_forward = torch.library.custom_op(
    "bagssl::relu_mean_cpu", _forward, mutates_args=(), device_types="cpu"
)


@relu_mean_forward.register_fake
def _(y: Tensor, center: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return scale.new_empty(y.shape[:2])


def _backward(
    dmeans: Tensor, y: Tensor, center: Tensor, scale: Tensor, shift: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of y, scale and shift."""
    dy, dscale, dshift = _like_gradients(dmeans, y, center, scale, shift)
    _C.relu_mean_backward(
        vector(dmeans),
        pixels(y),
        vector(center),
        vector(scale),
        vector(shift),
        pixels(dy),
        vector(dscale),
        vector(dshift),
        num_threads=torch.get_num_threads(),
    )
    return dy, dscale, dshift


relu_mean_backward = torch.library.custom_op(
    "bagssl::relu_mean_cpu_backward", _backward, mutates_args=(), device_types="cpu"
)


@relu_mean_backward.register_fake
def _like_gradients(
    dmeans: Tensor, y: Tensor, center: Tensor, scale: Tensor, shift: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    dy = torch.empty_like(y, memory_format=torch.channels_last)
    return dy, torch.empty_like(scale), torch.empty_like(shift)


class _ReluMean(torch.autograd.Function):
    """As `_ConvMoments`: registered ops where a graph is compiled, plain calls otherwise."""

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*inputs)
        return (relu_mean_forward if torch.compiler.is_compiling() else _forward)(*inputs)

    @staticmethod
    def backward(ctx: Any, dmeans: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        run = relu_mean_backward if torch.compiler.is_compiling() else _backward
        dy, dscale, dshift = run(dmeans, *ctx.saved_tensors)
        return dy, -ctx.saved_tensors[2] * dshift, dscale, dshift


def relu_mean(x: Tensor | Deferred) -> Tensor:
    """[N, C] of `x` [N, C, H, W]; see `ops.relu_mean`."""
    if isinstance(x, Tensor) or not is_served(*x):
        return reference(x)
    return _ReluMean.apply(*x)
