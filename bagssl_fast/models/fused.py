"""Conv2d, BatchNorm2d, ReLU as one op, in networks that are written as these three layers."""

from collections.abc import Iterator
from typing import cast

from torch import Tensor, nn

from bagssl_fast import ops
from bagssl_fast.distributed.sync_bn import SharedBatchNorm
from bagssl_fast.ops import Deferred


class FusedSequential(nn.Sequential):
    """A Sequential whose runs of Conv2d, BatchNorm2d, ReLU are each one `ops.conv_bn_relu`.

    Its layers are torch's own, and so are the names of parameters and buffers: state dicts of the
    plain Sequential fit. What passes from one block to the next need not be written. Layers of any
    other kind run as they are, and so do blocks that `is_block` tells from those that fit.
    """

    def outputs(self, x: Tensor | Deferred) -> Iterator[tuple[int, Tensor | Deferred]]:
        """The index of each block's or other layer's last layer, and what comes out there."""
        layers, i = list(self), 0
        while i < len(layers):
            if is_block(*layers[i : i + 3]):
                x = conv_bn_relu(x, layers[i], layers[i + 1])
                i += 2
            else:
                x = layers[i](ops.applied(x))
            yield i, x
            i += 1

    def forward(self, input: Tensor) -> Tensor:
        """As the plain Sequential."""
        x: Tensor | Deferred = input
        for _, x in self.outputs(input):  # noqa: B007
            pass
        return ops.applied(x)


def fuse(net: nn.Module) -> nn.Module:
    """Lets each Sequential in `net` that holds Conv2d, BatchNorm2d, ReLU run them as one, in place.

    Parameters, their names and the memory they are in stay as they are.

    Raises:
        ValueError: there is none.
    """
    found = False
    for module in net.modules():
        if type(module) in (nn.Sequential, FusedSequential):
            layers = list(cast(nn.Sequential, module))
            if any(is_block(*layers[i : i + 3]) for i in range(len(layers))):
                module.__class__ = FusedSequential
                found = True
    if not found:
        raise ValueError(
            f"fuse: {type(net).__name__} has no Sequential with a Conv2d (square stride and "
            "padding, no bias, groups or dilation), BatchNorm2d and ReLU in a row; use it as it is"
        )
    return net


def is_block(*layers: nn.Module) -> bool:
    """Whether three layers are one that `conv_bn_relu` computes, with nobody hooked in between."""
    if len(layers) != 3:
        return False
    conv, norm, relu = layers
    if type(conv) is not nn.Conv2d or type(relu) is not nn.ReLU:
        return False
    return (
        isinstance(norm, nn.BatchNorm2d | SharedBatchNorm)
        and norm.affine
        and isinstance(conv.padding, tuple)
        and len({*conv.padding}) == len({*conv.stride}) == 1
        and conv.groups == 1
        and conv.dilation == (1, 1)
        and conv.padding_mode == "zeros"
        and conv.bias is None
        and not any(m._forward_hooks or m._forward_pre_hooks for m in layers)
    )


def conv_bn_relu(
    x: Tensor | Deferred, conv: nn.Module, norm: nn.Module, stride: int | None = None
) -> Tensor | Deferred:
    """The op on the layers of a block: statistics, momentum and training mode are those of `norm`.

    Args:
        stride: instead of the convolution's own.
    """
    assert isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d | SharedBatchNorm)
    moved = norm.training and norm.running_mean is not None
    momentum = norm.momentum
    if moved and norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if momentum is None:  # the mean over all batches
            momentum = 1.0 / float(norm.num_batches_tracked)
    return ops.conv_bn_relu(
        x,
        conv.weight,
        norm.weight,
        norm.bias,
        norm.running_mean,
        norm.running_var,
        stride=conv.stride[0] if stride is None else stride,
        padding=cast(int, conv.padding[0]),
        training=norm.training or norm.running_mean is None,
        momentum=0.0 if momentum is None else momentum,
        eps=norm.eps,
        group=getattr(norm, "group", None),
    )
