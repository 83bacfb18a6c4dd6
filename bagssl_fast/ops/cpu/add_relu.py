"""The residual sum relu(x + identity), normalized as it is read (`csrc/add_relu.h`).

Forward reads two maps and writes one; backward reads three or four and writes two, with the sums
that the blocks of both sides need. Saved are both maps, the vectors and the result.

Served is `Normalized` x of float32 or bfloat16, with identity of the same type a tensor,
`Normalized` or `Deferred`; all others are the reference's, and so are derivatives of second order.
Any number of threads gives the same bits.
"""

from typing import Any

import torch
from torch import Tensor

from bagssl_fast._extension import _C
from bagssl_fast.ops.cpu.conv_bn_relu import is_served, pixels, vector
from bagssl_fast.ops.deferred import Deferred, Normalized
from bagssl_fast.ops.reference.add_relu import add_relu as reference

Maybe = Tensor | None


def _forward(
    y: Tensor,
    center: Tensor,
    scale: Tensor,
    shift: Tensor,
    identity: Tensor,
    identity_center: Tensor | None,
    identity_scale: Tensor | None,
    identity_shift: Tensor | None,
    relu: bool,
) -> Tensor:
    """The sum's activation, as y."""
    out = torch.empty_like(y, memory_format=torch.channels_last)
    _C.add_relu(
        pixels(y), vector(center), vector(scale), vector(shift), pixels(identity),
        vector(identity_center), vector(identity_scale), vector(identity_shift), relu,
        pixels(out), num_threads=torch.get_num_threads(),
    )  # fmt: skip
    return out


add_relu_forward = torch.library.custom_op(
    "bagssl::add_relu_cpu", _forward, mutates_args=(), device_types="cpu"
)


@add_relu_forward.register_fake
def _(y: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(y, memory_format=torch.channels_last)


def _backward(
    dout: Tensor,
    out: Tensor,
    y: Tensor,
    center: Tensor,
    scale: Tensor,
    shift: Tensor,
    identity: Tensor,
    identity_center: Tensor | None,
    identity_scale: Tensor | None,
    identity_shift: Tensor | None,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of y, scale, shift, identity, its scale and shift (empty where it has none)."""
    results = _like_gradients(
        dout, out, y, center, scale, shift, identity,
        identity_center, identity_scale, identity_shift, relu,
    )  # fmt: skip
    dy, dscale, dshift, didentity, more_scale, more_shift = results
    _C.add_relu_backward(
        pixels(dout), pixels(out), pixels(y), vector(center), vector(scale), vector(shift),
        pixels(identity), vector(identity_center), vector(identity_scale), vector(identity_shift),
        relu, pixels(dy), vector(dscale), vector(dshift), pixels(didentity),
        None if identity_scale is None else vector(more_scale),
        None if identity_scale is None else vector(more_shift),
        num_threads=torch.get_num_threads(),
    )  # fmt: skip
    return results


add_relu_backward = torch.library.custom_op(
    "bagssl::add_relu_cpu_backward", _backward, mutates_args=(), device_types="cpu"
)


@add_relu_backward.register_fake
def _like_gradients(
    dout: Tensor,
    out: Tensor,
    y: Tensor,
    center: Tensor,
    scale: Tensor,
    shift: Tensor,
    identity: Tensor,
    identity_center: Tensor | None,
    identity_scale: Tensor | None,
    identity_shift: Tensor | None,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    maps = [torch.empty_like(y, memory_format=torch.channels_last) for _ in range(2)]
    count = 0 if identity_scale is None else len(scale)
    more_scale, more_shift = (scale.new_empty(count) for _ in range(2))
    dscale, dshift = torch.empty_like(scale), torch.empty_like(shift)
    return maps[0], dscale, dshift, maps[1], more_scale, more_shift


class _AddRelu(torch.autograd.Function):
    """As `_ConvMoments`: registered ops where a graph is compiled, plain calls otherwise."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        out = (add_relu_forward if torch.compiler.is_compiling() else _forward)(*inputs)
        ctx.relu = inputs[-1]
        ctx.save_for_backward(out, *inputs[:-1])
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Maybe, ...]:
        run: Any = add_relu_backward if torch.compiler.is_compiling() else _backward
        dy, dscale, dshift, didentity, more_scale, more_shift = run(
            dout, *ctx.saved_tensors, ctx.relu
        )
        scale, identity_scale = ctx.saved_tensors[3], ctx.saved_tensors[7]
        own = (dy, -scale * dshift, dscale, dshift, didentity)
        if identity_scale is None:
            return *own, None, None, None, None
        return *own, -identity_scale * more_shift, more_scale, more_shift, None


def add_relu(x: Tensor | Normalized, identity: Tensor | Normalized | Deferred) -> Tensor:
    """[N, C, H, W]; see `ops.add_relu`."""
    other = (identity, None, None, None) if isinstance(identity, Tensor) else identity
    given = () if isinstance(x, Tensor) else (*x, *other)
    if not given or other[0].dtype != given[0].dtype or not is_served(*given[:4], *other[1:]):
        return reference(x, identity)
    return _AddRelu.apply(*given, isinstance(identity, Deferred))
