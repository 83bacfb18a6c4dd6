"""Projection heads of other codebases: their modules and state dicts, our `linear_bn_relu`.

A head is an `nn.Sequential` of Linear, BatchNorm1d (or SyncBatchNorm) and ReLU. `fused_forward`
runs it with each such group as one op on the host's own parameters, so that state dicts, parameter
groups and `convert_sync_batchnorm` work as before.

A Linear that feeds a batch norm may have a bias (VICReg's and solo-learn's have): it cancels in
training. It still moves the running mean, and its gradient is exactly 0, where the host's is
rounding error.
"""

import itertools
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from bagssl_fast import ops


def fused_forward(layers: nn.Sequential, x: Tensor) -> Tensor:
    """The result of `layers(x)`; each Linear, batch norm and ReLU (if any) in a row are one op."""
    modules = list(layers)
    at = 0
    while at < len(modules):
        layer, norm, activation = (*modules[at : at + 3], None, None)[:3]
        if x.dim() == 2 and _is_fusible(layer, norm):
            relu = type(activation) is nn.ReLU
            x = _linear_bn_relu(x, layer, norm, relu)  # type: ignore[arg-type]
            at += 3 if relu else 2
        else:
            x = layer(x)  # type: ignore[misc]
            at += 1
    return x


def check_head(host: str, layers: object) -> None:
    """Raises ValueError unless `layers` is a Sequential in which something can be fused."""
    if not isinstance(layers, nn.Sequential):
        raise ValueError(
            f"{host}: the projection head is a {type(layers).__name__}, supported is nn.Sequential "
            "of Linear, BatchNorm1d and ReLU; switch this piece off by its argument"
        )
    if not any(_is_fusible(*pair) for pair in itertools.pairwise(layers)):
        names = ", ".join(type(layer).__name__ for layer in layers)
        raise ValueError(
            f"{host}: the projection head ({names}) has no Linear followed by a BatchNorm1d or "
            "SyncBatchNorm with affine=True and a momentum (and no hooks on them); switch this "
            "piece off by its argument"
        )


def expander(dims: Iterable[int], *, hidden_bias: bool, last_bias: bool) -> nn.Sequential:
    """Linear, BatchNorm1d, ReLU for each pair of sizes but the last, which is Linear alone."""
    pairs = list(itertools.pairwise(dims))
    if not pairs or min(itertools.chain(*pairs)) < 1:
        raise ValueError(f"projection head: sizes {pairs}, expected at least two, all at least 1")
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairs[:-1]:
        layers += [nn.Linear(fan_in, fan_out, bias=hidden_bias), nn.BatchNorm1d(fan_out), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(*pairs[-1], bias=last_bias))


def _is_fusible(layer: nn.Module | None, norm: nn.Module | None) -> bool:
    return (
        type(layer) is nn.Linear
        and isinstance(norm, (nn.BatchNorm1d, nn.SyncBatchNorm))
        and norm.affine
        and norm.momentum is not None
        and not (_has_hooks(layer) or _has_hooks(norm))
    )


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)


def _linear_bn_relu(x: Tensor, linear: nn.Linear, norm: nn.BatchNorm1d, relu: bool) -> Tensor:
    device = x.device.type
    if torch.is_autocast_enabled(device):  # the op's result has its input's type, as Linear's has
        x = x.to(torch.get_autocast_dtype(device))
    mean, var = norm.running_mean, norm.running_var
    training = norm.training or mean is None
    beta: Tensor = norm.bias
    if linear.bias is not None:
        # The op has no bias. With batch statistics it cancels, up to the running mean.
        gain = norm.weight * torch.rsqrt(var + norm.eps) if not training and var is not None else 0
        beta = beta + gain * linear.bias
    shift = linear.bias.detach() if training and mean is not None and linear.bias is not None else 0
    moved = mean - shift if mean is not None else None
    if norm.training and norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
    y = ops.linear_bn_relu(
        x,
        linear.weight,
        norm.weight,
        beta,
        moved,
        var,
        training=training,
        momentum=norm.momentum,  # type: ignore[arg-type]
        eps=norm.eps,
        relu=relu,
        group=_group(norm) if training else None,
    )
    if norm.training and mean is not None and moved is not None:
        mean.copy_(moved + shift)
    return y


def _group(norm: nn.BatchNorm1d) -> ProcessGroup | None:
    """The ranks that share a SyncBatchNorm's statistics."""
    if not isinstance(norm, nn.SyncBatchNorm) or not dist.is_initialized():
        return None
    group: ProcessGroup | None = norm.process_group or dist.group.WORLD
    return group if dist.get_world_size(group) > 1 else None
