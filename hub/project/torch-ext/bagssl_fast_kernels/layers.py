"""Layers that `kernels.kernelize` puts in place of others; state is that of the replaced layer."""

import torch
from torch import nn

from .linear_bn_relu import linear_bn_relu
from .vicreg import vicreg


class LinearBNReLU(nn.Module):
    """In place of bagssl_fast's: `relu(batch_norm(x W^T))` over the last dimension."""

    has_backward = True
    can_torch_compile = True

    weight: torch.Tensor
    gamma: torch.Tensor
    beta: torch.Tensor
    running_mean: torch.Tensor
    running_var: torch.Tensor
    momentum: float
    eps: float

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear_bn_relu(
            x,
            self.weight,
            self.gamma,
            self.beta,
            self.running_mean,
            self.running_var,
            training=self.training,
            momentum=self.momentum,
            eps=self.eps,
            group=getattr(self, "group", None),
        )


class VICRegLoss(nn.Module):
    """In place of lightly's: the loss of two views, z_a and z_b [B, D]."""

    has_backward = True
    can_torch_compile = True

    lambda_param: float
    mu_param: float
    nu_param: float
    gather_distributed: bool
    eps: float

    def forward(self, z_a: torch.Tensor, z_b: torch.Tensor) -> torch.Tensor:
        if self.gather_distributed:
            raise ValueError(
                "VICRegLoss: this layer does not gather over ranks, got gather_distributed=True; "
                "call vicreg on gathered projections, or keep lightly's layer"
            )
        invariance, variance, covariance = vicreg(torch.stack((z_a, z_b)), eps=self.eps)
        return (
            self.lambda_param * invariance + self.mu_param * variance + self.nu_param * covariance
        )
