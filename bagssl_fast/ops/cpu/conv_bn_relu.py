"""relu(batch_norm(conv2d(x))) whose activation is never written (`csrc/conv_bn_relu.h`).

The convolution computes the activation that it reads (x may be `Deferred`) while it packs it, and
the moments of each channel while its results are in the cache. What is returned is `Deferred`: the
raw result y and the affine map that batch normalization amounts to, for the next block to apply.
Backward likewise: each map is read once for both of its products, and the gradient that the block
below needs is written already masked, with its sums. Per block, forward reads one map and writes
one; backward reads three and writes one. Saved are y, x.y, the weights and vectors: no activation.

All of batch normalization but the moments is plain torch on vectors [C], and so are the gradients
with respect to them: autograd adds up several readers, and a group's statistics, as it always does.

Served are maps of float32 and bfloat16, any kernel, stride, padding and number of channels; maps
that are not channels-last are copied. Weights and vectors are float32. bfloat16 is taken under
autocast, too: maps and their gradients are stored in it, activations, gradients and weights rounded
to it where they are multiplied; sums, moments and gradients of weights are float32. Other types are
the reference's.
Statistics are joined by Chan's rule, in float32 within chunks of 72 rows, in double beyond. Any
number of threads gives the same bits. Derivatives of second order are the reference's alone.
"""

from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from bagssl_fast._extension import _C
from bagssl_fast.distributed.collectives import gather
from bagssl_fast.ops.deferred import Deferred, Normalized
from bagssl_fast.ops.reference.conv_bn_relu import conv_bn_relu as reference

Maybe = Tensor | None


def _forward(
    x: Tensor,
    center: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    weight: Tensor,
    stride: int,
    padding: int,
    moments: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y [N, M, H', W'], channels-last, and its mean and biased variance [M] (else empty)."""
    y, mean, var = _like_results(x, center, scale, shift, weight, stride, padding, moments)
    _C.conv_bn_relu(
        pixels(x),
        vector(center),
        vector(scale),
        vector(shift),
        weight.detach().numpy(),
        stride,
        padding,
        pixels(y),
        vector(mean) if moments else None,
        vector(var) if moments else None,
        num_threads=torch.get_num_threads(),
    )
    return y, mean, var


conv_moments = torch.library.custom_op(
    "bagssl::conv_moments_cpu", _forward, mutates_args=(), device_types="cpu"
)


@conv_moments.register_fake
def _like_results(
    x: Tensor,
    center: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    weight: Tensor,
    stride: int,
    padding: int,
    moments: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    height, width = (
        (side + 2 * padding - kernel) // stride + 1
        for side, kernel in zip(x.shape[2:], weight.shape[2:], strict=True)
    )
    shape = (x.shape[0], weight.shape[0], height, width)
    y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    count = weight.shape[0] if moments else 0
    return y, weight.new_empty(count), weight.new_empty(count)


def _backward(
    dy: Tensor,
    y: Tensor,
    mean: Tensor,
    dmean: Tensor | None,
    dvar: Tensor | None,
    x: Tensor,
    center: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    weight: Tensor,
    stride: int,
    padding: int,
    of_x: bool,
    of_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx, dscale, dshift, dweight; empty where not asked for."""
    results = _like_gradients(
        dy, y, mean, dmean, dvar, x, center, scale, shift, weight, stride, padding, of_x, of_weight
    )
    dx, dscale, dshift, dweight = results
    _C.conv_bn_relu_backward(
        pixels(dy),
        pixels(y),
        vector(mean) if dmean is not None else None,
        vector(dmean),
        vector(dvar),
        pixels(x),
        vector(center),
        vector(scale),
        vector(shift),
        weight.detach().numpy(),
        stride,
        padding,
        pixels(dx) if of_x else None,
        vector(dscale) if of_x and scale is not None else None,
        vector(dshift) if of_x and scale is not None else None,
        dweight.numpy() if of_weight else None,
        num_threads=torch.get_num_threads(),
    )
    return results


conv_moments_backward = torch.library.custom_op(
    "bagssl::conv_moments_cpu_backward", _backward, mutates_args=(), device_types="cpu"
)


@conv_moments_backward.register_fake
def _like_gradients(
    dy: Tensor,
    y: Tensor,
    mean: Tensor,
    dmean: Tensor | None,
    dvar: Tensor | None,
    x: Tensor,
    center: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    weight: Tensor,
    stride: int,
    padding: int,
    of_x: bool,
    of_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    count = x.shape[1] if of_x and scale is not None else 0
    return (
        torch.empty_like(x, memory_format=torch.channels_last) if of_x else x.new_empty(0),
        weight.new_empty(count),
        weight.new_empty(count),
        torch.empty_like(weight) if of_weight else weight.new_empty(0),
    )


def pixels(x: Tensor) -> Any:
    """[N, H, W, C], an array over channels-last memory (a copy of other memory).

    bfloat16, which numpy does not have, is uint16.
    """
    rows = x.detach().contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)
    return (rows.view(torch.uint16) if x.dtype == torch.bfloat16 else rows).numpy()


def vector(x: Tensor | None) -> Any:
    """An array over contiguous memory (a copy of other memory), None for None."""
    return None if x is None else x.detach().contiguous().numpy()


class _ConvMoments(torch.autograd.Function):
    """`conv_moments` and its gradients. A registered op costs as much again as a small block's
    kernels before it runs, so only a graph that is compiled calls those."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        run = conv_moments if torch.compiler.is_compiling() else _forward
        x, center, scale, shift, weight, ctx.stride, ctx.padding, ctx.moments = inputs
        y, mean, var = run(*inputs)
        ctx.save_for_backward(x, center, scale, shift, weight, y, mean)
        return y, mean, var

    @staticmethod
    def backward(ctx: Any, dy: Tensor, dmean: Maybe, dvar: Maybe) -> tuple[Maybe, ...]:
        x, center, scale, shift, weight, y, mean = ctx.saved_tensors
        of_x, of_weight = any(ctx.needs_input_grad[:4]), ctx.needs_input_grad[4]
        if not ctx.moments:
            dmean = dvar = None
        run = conv_moments_backward if torch.compiler.is_compiling() else _backward
        dx, dscale, dshift, dweight = run(
            dy, y, mean, dmean, dvar, x, center, scale, shift, weight, ctx.stride, ctx.padding,
            of_x, of_weight,
        )  # fmt: skip
        of_vectors: tuple[Maybe, ...] = (None, None, None)
        if of_x and scale is not None:
            of_vectors = (-scale * dshift, dscale, dshift)
        of_x_and_vectors = (dx if of_x else None, *of_vectors)
        return *of_x_and_vectors, dweight if of_weight else None, None, None, None


def is_served(y: Tensor, *vectors: Tensor | None) -> bool:
    """Whether kernels compute with maps of this type, and these vectors."""
    types = (torch.float32, torch.bfloat16)
    return y.dtype in types and all(v is None or v.dtype == torch.float32 for v in vectors)


def _type_of(y: Tensor, *others: Tensor | None) -> torch.dtype | None:
    """The type of maps that the kernels compute with; None for what is not theirs to work on."""
    if not is_served(y, *others) or any(x is not None and x.numel() == 0 for x in (y, *others)):
        return None
    if not torch.is_autocast_enabled("cpu"):
        return y.dtype
    dtype = torch.get_autocast_dtype("cpu")
    return dtype if dtype == torch.bfloat16 else None


def _over_ranks(
    mean: Tensor, var: Tensor, count: int, group: ProcessGroup | None
) -> tuple[Tensor, Tensor, int | Tensor]:
    """Moments of the values of all ranks, and how many these are."""
    if group is None:
        return mean, var, count
    own = torch.stack([torch.full_like(mean, count), mean, var])
    counts, means, variances = gather(own[None], 0, group).unbind(1)
    total = counts.sum(0)
    mean = (counts * means).sum(0) / total
    var = (counts * (variances + (means - mean).square())).sum(0) / total
    return mean, var, total.detach()


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
) -> Tensor | Deferred | Normalized:
    """The activation of [N, M, H', W']; see `ops.conv_bn_relu`."""
    y, *vectors = x if isinstance(x, Deferred) else (x, None, None, None)
    dtype = _type_of(y, *vectors, weight, gamma, beta, running_mean, running_var)
    if dtype is None:
        return reference(
            x, weight, gamma, beta, running_mean, running_var, stride=stride, padding=padding,
            training=training, momentum=momentum, eps=eps, group=group, relu=relu,
        )  # fmt: skip
    y, mean, var = _ConvMoments.apply(y.to(dtype), *vectors, weight, stride, padding, training)
    if training:
        mean, var, count = _over_ranks(mean, var, y.numel() // y.shape[1], group)
        if running_mean is not None and running_var is not None:
            with torch.no_grad():
                running_mean.lerp_(mean, momentum)
                running_var.lerp_(var * (count / (count - 1)), momentum)
    else:
        assert running_mean is not None and running_var is not None
        mean, var = running_mean, running_var
    kind = Deferred if relu else Normalized
    return kind(y, mean, gamma * torch.rsqrt(var + eps), beta)
