"""Layers of torch that are one `ops.conv_bn_relu`: which ones fit, and the op on them."""

from typing import Any, cast

from torch import Tensor, nn

from bagssl_fast import ops
from bagssl_fast.distributed.sync_bn import SharedBatchNorm
from bagssl_fast.ops import Deferred


def is_block(*layers: nn.Module) -> bool:
    """Whether three layers are one that `conv_bn_relu` computes, with nobody hooked in between."""
    return (
        len(layers) == 3
        and is_conv_norm(*layers[:2])
        and type(layers[2]) is nn.ReLU
        and not any(is_hooked(m) for m in layers)
    )


def is_conv_norm(conv: nn.Module, norm: nn.Module) -> bool:
    """Whether `conv_bn_relu` computes a convolution and the batch norm after it."""
    return (
        type(conv) is nn.Conv2d
        and isinstance(norm, nn.BatchNorm2d | SharedBatchNorm)
        and norm.affine
        and isinstance(conv.padding, tuple)
        and len({*conv.padding}) == len({*conv.stride}) == 1
        and conv.groups == 1
        and conv.dilation == (1, 1)
        and conv.padding_mode == "zeros"
        and conv.bias is None
    )


def is_hooked(module: nn.Module) -> bool:
    """Whether someone watches what goes into a module or comes out of it."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def conv_bn_relu(
    x: Tensor | Deferred,
    conv: nn.Module,
    norm: nn.Module,
    stride: int | None = None,
    relu: bool = True,
) -> Any:
    """The op on the layers of a block: statistics, momentum and training mode are those of `norm`.

    Args:
        stride: instead of the convolution's own.
        relu: whether a ReLU follows.
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
        relu=relu,
    )
