"""Batch-norm statistics over all ranks, on any device (torch's own SyncBatchNorm needs CUDA)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from bagssl_fast.distributed.collectives import all_reduce_sum


class SharedBatchNorm(nn.modules.batchnorm._BatchNorm):
    """BatchNorm whose training statistics are those of the rows of every rank together.

    Parameters and buffers have the names of `nn.BatchNorm2d`: checkpoints fit both. The statistics
    are float32, or float64 for such input; every rank must hold equally many rows.
    """

    group: ProcessGroup | None = None

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"SharedBatchNorm: expected [N, C, ...], got {list(input.shape)}")

    def forward(self, input: Tensor) -> Tensor:
        """[N, C, ...] -> the same shape and type."""
        if not self.training or self.group is None:
            return super().forward(input)
        self._check_input_dim(input)
        x = input if input.dtype == torch.float64 else input.float()
        dims = [d for d in range(x.dim()) if d != 1]
        count = x.new_full((1,), float(x.numel() // x.shape[1]))  # filled on the device itself
        total = all_reduce_sum(torch.cat([x.sum(dims), count]), self.group)
        n = total[-1].detach()
        shape = [1, -1] + [1] * (x.dim() - 2)
        centered = x - (total[:-1] / n).view(shape)
        # Squares of centered values: E[x^2] - E[x]^2 would cancel.
        var = all_reduce_sum(centered.square().sum(dims), self.group) / n
        self._update(total[:-1].detach() / n, var.detach() * (n / (n - 1)))
        y = centered * torch.rsqrt(var + self.eps).view(shape)
        if self.weight is not None:
            y = y * self.weight.view(shape) + self.bias.view(shape)
        return y.to(input.dtype)

    @torch.no_grad()
    def _update(self, mean: Tensor, var: Tensor) -> None:
        if self.running_mean is None or self.running_var is None:
            return
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        step = self.momentum
        if step is None:
            step = 1.0 / float(self.num_batches_tracked)
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), step)
        self.running_var.lerp_(var.to(self.running_var.dtype), step)


def normalizes_by_batch(module: nn.Module) -> bool:
    """Whether anything inside `module` normalizes by the statistics of a batch."""
    return any(
        isinstance(m, nn.modules.batchnorm._BatchNorm) or hasattr(m, "group")
        for m in module.modules()
    )


def share_batch_norm(module: nn.Module, group: ProcessGroup) -> nn.Module:
    """Makes every batch norm inside `module` share its statistics over the ranks of `group`.

    torch's layers become torch's SyncBatchNorm on CUDA and `SharedBatchNorm` elsewhere; our own
    layers take the group as their attribute `group`.
    """
    for name, child in module.named_children():
        if isinstance(child, nn.modules.batchnorm._BatchNorm):
            setattr(module, name, _shared(child, group))
        else:
            share_batch_norm(child, group)
    if hasattr(module, "group"):
        setattr(module, "group", group)  # noqa: B010
    return module


def _shared(layer: nn.modules.batchnorm._BatchNorm, group: ProcessGroup) -> nn.Module:
    weight = layer.weight if layer.affine else layer.running_mean
    if weight is not None and weight.is_cuda:
        return nn.SyncBatchNorm.convert_sync_batchnorm(layer, group)
    shared = SharedBatchNorm(
        layer.num_features, layer.eps, layer.momentum, layer.affine, layer.track_running_stats
    )
    shared.group = group
    shared._parameters = layer._parameters
    shared._buffers = layer._buffers
    shared.train(layer.training)
    return shared
