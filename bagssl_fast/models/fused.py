"""Conv2d, BatchNorm2d, ReLU as one op, in networks that are written as these three layers."""

from collections.abc import Iterator
from typing import cast

from torch import Tensor, nn

from bagssl_fast import ops
from bagssl_fast.models.blocks import conv_bn_relu, is_block
from bagssl_fast.models.residual import ResidualBlock, become_fused, kind_of, misfit
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
    """Lets the parts of `net` that `ops.conv_bn_relu` computes run on it, in place.

    These are each Sequential that holds Conv2d, BatchNorm2d, ReLU, and the ResNets of torchvision
    and timm: stem, BasicBlocks and Bottlenecks. Parameters, their names and the memory they are in
    stay as they are; layers that somebody has hooked run as they are.

    Raises:
        ValueError: there is no such part, or a ResNet has one that does not fit.
    """
    reason = obstacle(net)
    if reason is not None:
        raise ValueError(f"fuse: {type(net).__name__}{reason}; use it as it is")
    for module in list(net.modules()):
        if _has_blocks(module):
            module.__class__ = FusedSequential
        elif kind_of(module) is not None:
            become_fused(module)
    return net


def obstacle(net: nn.Module) -> str | None:
    """Why `fuse` refuses a network, None if it does not."""
    found, first = False, ""
    for name, module in net.named_modules():
        if kind_of(module) is not None or isinstance(module, ResidualBlock):
            part = misfit(module)
            if part is not None:
                place = ".".join(filter(None, (name, part)))
                found_type = type(net.get_submodule(place)).__name__
                return f": {place} ({found_type}) is not what conv_bn_relu computes"
            found = True
        found = found or _has_blocks(module)
        if not first and isinstance(module, nn.Conv2d | nn.Linear):
            first = f"; its first layer is {name or 'itself'} ({type(module).__name__})"
    if found:
        return None
    return (
        " has no Sequential with a Conv2d (square stride and padding, no bias, groups or "
        f"dilation), BatchNorm2d and ReLU in a row, and no ResNet of torchvision or timm{first}"
    )


def _has_blocks(module: nn.Module) -> bool:
    if type(module) not in (nn.Sequential, FusedSequential):
        return False
    layers = list(cast(nn.Sequential, module))
    return any(is_block(*layers[i : i + 3]) for i in range(len(layers)))
