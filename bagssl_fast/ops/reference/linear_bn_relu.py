"""relu(batch_norm(x W^T)), a projector's block, with torch's BatchNorm1d semantics.

Training: normalize by the biased variance of the batch, move the running statistics toward the
batch's mean and *unbiased* variance by `momentum`. Evaluation: normalize by the running statistics.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from bagssl_fast.distributed.collectives import all_reduce_sum


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
) -> Tensor:
    """Outputs [..., M] of `x` [..., F], in x's dtype; statistics in float32 or float64.

    Args:
        weight: [M, F]. `gamma`, `beta`: [M]. `running_mean`, `running_var`: [M], updated in place
            when training.
        group: ranks over which statistics are taken (every rank must call).
    """
    flat = x.reshape(-1, x.shape[-1])
    h = F.linear(flat, weight.to(flat.dtype))
    with torch.autocast(x.device.type, enabled=False):
        h = h if h.dtype == torch.float64 else h.float()
        if training:
            mean, var = batch_statistics(h, running_mean, running_var, momentum, group)
        else:
            if running_mean is None or running_var is None:
                raise ValueError("linear_bn_relu: evaluation needs running_mean and running_var")
            mean, var = running_mean.to(h.dtype), running_var.to(h.dtype)
        y = (h - mean) * torch.rsqrt(var + eps) * gamma + beta
        y = torch.relu(y) if relu else y
    return y.to(x.dtype).reshape(*x.shape[:-1], weight.shape[0])


def batch_statistics(
    h: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    group: ProcessGroup | None,
) -> tuple[Tensor, Tensor]:
    """Mean and biased variance [M] of `h` [N, M] over all ranks; moves the running statistics."""
    count = h.new_full((), float(h.shape[0]))  # a tensor from here would wait for the device
    if group is None:
        mean = h.mean(dim=0)
        var = (h - mean).square().mean(dim=0)
    else:
        # Two rounds, mean then centered squares: one round of x and x^2 would cancel.
        sums = all_reduce_sum(torch.cat([h.sum(dim=0), count[None]]), group)
        count = sums[-1].detach()
        mean = sums[:-1] / count
        var = all_reduce_sum((h - mean).square().sum(dim=0), group) / count
    if running_mean is not None and running_var is not None:
        with torch.no_grad():
            unbiased = var * (count / (count - 1))
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            running_var.lerp_(unbiased.to(running_var.dtype), momentum)
    return mean, var
