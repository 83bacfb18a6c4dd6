"""Residual networks on `ops.conv_bn_relu`: torchvision's and timm's ResNets, changed in place."""

from typing import Any, cast

from torch import Tensor, nn

from bagssl_fast import ops
from bagssl_fast.models.blocks import conv_bn_relu, is_conv_norm, is_hooked
from bagssl_fast.ops import Deferred

_made: dict[type[nn.Module], type[nn.Module]] = {}


class _Fused(nn.Module):
    """What becomes of a module of another library: a subclass of its class and of this one."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _again, (type(self).__bases__[1],), self.__dict__


def _again(cls: type[nn.Module]) -> nn.Module:
    """An empty module of the class that fusing makes of `cls`, for copy and pickle."""
    fused = _class_of(cls)
    return fused.__new__(fused)


def _class_of(cls: type[nn.Module]) -> type[nn.Module]:
    if cls not in _made:
        _made[cls] = type(f"Fused{cls.__name__}", (KINDS[_name(cls)], cls), {})
    return _made[cls]


def _name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


class ResidualBlock(_Fused):
    """A BasicBlock or Bottleneck: each convolution is one op, and so is the residual sum."""

    downsample: nn.Sequential | None

    def forward(self, x: Tensor | Deferred) -> Tensor:
        """x `[N, C, H, W]`, an activation that is written or not -> `[N, M, H', W']`."""
        if misfit(self) is not None or any(is_hooked(m) for m in _inner(self)):
            return cast(Tensor, super().forward(ops.applied(x)))
        (*below, (conv, norm)), shortcut = _convolutions(self), self.downsample
        y: Any = x
        for block in below:
            y = conv_bn_relu(y, *block)
        y = conv_bn_relu(y, conv, norm, relu=False)
        identity: Any = x
        if shortcut is not None:
            identity = conv_bn_relu(x, shortcut[0], shortcut[1], relu=False)
        return ops.add_relu(y, identity)


class _ResNet(_Fused):
    """A ResNet up to its last map: the stem is one op, and so are its blocks' layers."""

    conv1: nn.Module
    bn1: nn.Module
    maxpool: nn.Module
    layer1: nn.Module
    layer2: nn.Module
    layer3: nn.Module
    layer4: nn.Module

    def maps(self, x: Tensor) -> Tensor:
        """x `[N, 3, H, W]` -> the last map `[N, C, h, w]`."""
        relu = _activation(self, 1)
        if is_conv_norm(self.conv1, self.bn1) and not any(
            is_hooked(m) for m in (self.conv1, self.bn1, relu)
        ):
            y: Any = conv_bn_relu(x, self.conv1, self.bn1)
        else:
            y = relu(self.bn1(self.conv1(x)))
        if type(self.maxpool) is not nn.Identity or is_hooked(self.maxpool):
            y = self.maxpool(ops.applied(y))
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            y = layer(y)
        return cast(Tensor, y)


class TorchvisionResNet(_ResNet):
    """torchvision's ResNet."""

    avgpool: nn.Module
    fc: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        """x `[N, 3, H, W]` -> `[N, F]`."""
        return cast(Tensor, self.fc(self.avgpool(self.maps(x)).flatten(1)))


class TimmResNet(_ResNet):
    """timm's ResNet."""

    def forward_features(self, x: Tensor) -> Tensor:
        """As timm's."""
        if self.grad_checkpointing:
            return cast(Tensor, cast(Any, super()).forward_features(x))
        return self.maps(x)


KINDS: dict[str, type[_Fused]] = {
    "torchvision.models.resnet.BasicBlock": ResidualBlock,
    "torchvision.models.resnet.Bottleneck": ResidualBlock,
    "torchvision.models.resnet.ResNet": TorchvisionResNet,
    "timm.models.resnet.BasicBlock": ResidualBlock,
    "timm.models.resnet.Bottleneck": ResidualBlock,
    "timm.models.resnet.ResNet": TimmResNet,
}


def kind_of(module: nn.Module) -> type[_Fused] | None:
    """What `module` becomes; None for one that is none of these or has become it already."""
    return KINDS.get(_name(type(module)))


def become_fused(module: nn.Module) -> None:
    """Changes a module of KINDS in place; parameters, names and memory stay as they are."""
    module.__class__ = _class_of(type(module))


def misfit(module: Any) -> str | None:
    """The first part of a module of KINDS, by its name in it, that the ops do not compute."""
    if hasattr(module, "layer1"):
        if not is_conv_norm(module.conv1, module.bn1):
            return "conv1" if type(module.conv1) is not nn.Conv2d else "bn1"
        if type(_activation(module, 1)) is not nn.ReLU:
            return "act1"
        for name in ("layer1", "layer2", "layer3", "layer4"):
            for i, block in enumerate(getattr(module, name)):
                if not isinstance(block, ResidualBlock) and kind_of(block) is not ResidualBlock:
                    return f"{name}.{i}"
                part = misfit(block)
                if part is not None:
                    return f"{name}.{i}.{part}"
        return None
    for i, (conv, norm) in enumerate(_convolutions(module), 1):
        if not is_conv_norm(conv, norm):
            return f"conv{i}"
        if type(_activation(module, i)) is not nn.ReLU:
            return f"act{i}"
    for name in ("se", "aa", "drop_block", "drop_path"):
        part = getattr(module, name, None)
        if part is not None and type(part) is not nn.Identity:
            return name
    shortcut = module.downsample
    if shortcut is not None and not (
        type(shortcut) is nn.Sequential and len(shortcut) == 2 and is_conv_norm(*shortcut)
    ):
        return "downsample"
    return None


def _convolutions(block: nn.Module) -> list[tuple[nn.Module, nn.Module]]:
    """The block's convolutions with their norms, in order."""
    count = 3 if hasattr(block, "conv3") else 2
    return [(getattr(block, f"conv{i}"), getattr(block, f"bn{i}")) for i in range(1, count + 1)]


def _activation(module: nn.Module, i: int) -> nn.Module:
    """torchvision has one for all of a module's layers, timm one for each."""
    return cast(nn.Module, getattr(module, f"act{i}", None) or module.relu)


def _inner(block: nn.Module) -> list[nn.Module]:
    return [m for m in block.modules() if m is not block]
