"""Heads: what turns embeddings into the projections that the loss sees."""

import itertools
import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from bagssl_fast import ops


class LinearBNReLU(nn.Module):
    """`relu(batch_norm(x W^T))` over the last dimension, all leading ones being the batch.

    The linear layer has no bias: batch normalization would subtract it again.
    """

    running_mean: Tensor
    running_var: Tensor
    group: ProcessGroup | None = None  # ranks that share the batch statistics

    def __init__(self, in_dim: int, out_dim: int, momentum: float = 0.1, eps: float = 1e-5) -> None:
        super().__init__()
        self.momentum, self.eps = momentum, eps
        self.weight = nn.Parameter(torch.empty(out_dim, in_dim))
        self.gamma = nn.Parameter(torch.ones(out_dim))
        self.beta = nn.Parameter(torch.zeros(out_dim))
        self.register_buffer("running_mean", torch.zeros(out_dim))
        self.register_buffer("running_var", torch.ones(out_dim))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        """x `[..., in_dim]` -> `[..., out_dim]`."""
        return ops.linear_bn_relu(
            x,
            self.weight,
            self.gamma,
            self.beta,
            self.running_mean,
            self.running_var,
            training=self.training,
            momentum=self.momentum,
            eps=self.eps,
            group=self.group,
        )

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]}, {self.weight.shape[0]}"


class Projector(nn.Module):
    """VICReg's expander: `num_layers - 1` times Linear-BN-ReLU, then one Linear.

    Args:
        in_dim: embedding size F.
        hidden: units of the hidden layers.
        out: projection size D; `hidden` if not given.
        num_layers: linear layers in all, at least 1.
        last_bias: whether the last layer has a bias (VICReg's has none).
        normalize: L2-normalize the projections (TCR needs that).
    """

    def __init__(
        self,
        in_dim: int,
        hidden: int = 2048,
        out: int | None = None,
        num_layers: int = 3,
        last_bias: bool = False,
        normalize: bool = False,
    ) -> None:
        super().__init__()
        if num_layers < 1 or in_dim < 1 or hidden < 1 or (out is not None and out < 1):
            raise ValueError(
                f"Projector: in_dim {in_dim}, hidden {hidden}, out {out} and num_layers "
                f"{num_layers} must all be at least 1"
            )
        self.embedding_dim = in_dim
        self.out_dim = out or hidden
        self.normalize = normalize
        dims = [in_dim] + [hidden] * (num_layers - 1)
        self.hidden = nn.Sequential(*(LinearBNReLU(i, o) for i, o in itertools.pairwise(dims)))
        self.last = nn.Linear(dims[-1], self.out_dim, bias=last_bias)

    def embed(self, h: Tensor) -> Tensor:
        """The embedding that evaluation pools: the backbone's own output."""
        return h

    def forward(self, h: Tensor) -> Tensor:
        """h `[..., F]` -> z `[..., D]`."""
        z = self.last(self.hidden(h))
        return F.normalize(z, dim=-1) if self.normalize else z


class EMPHead(nn.Module):
    """EMP-SSL's head: `pre_feature` (Linear-BN-ReLU), then a projector with unit-length output.

    The embedding for evaluation is the output of `pre_feature`, as in EMP-SSL's code.
    """

    def __init__(
        self, in_dim: int, hidden: int = 4096, projector: int = 4096, out: int = 1024
    ) -> None:
        super().__init__()
        if min(in_dim, hidden, projector, out) < 1:
            raise ValueError(
                f"EMPHead: in_dim {in_dim}, hidden {hidden}, projector {projector} and out {out} "
                "must all be at least 1"
            )
        self.embedding_dim, self.out_dim = hidden, out
        self.pre_feature = LinearBNReLU(in_dim, hidden)
        self.projection = nn.Sequential(LinearBNReLU(hidden, projector), nn.Linear(projector, out))

    def embed(self, h: Tensor) -> Tensor:
        """The embedding that evaluation pools: backbone output `[..., F]` -> `[..., hidden]`."""
        return cast(Tensor, self.pre_feature(h))

    def forward(self, h: Tensor) -> Tensor:
        """Embedding (the output of `embed`) `[..., hidden]` -> z `[..., D]` of unit length."""
        return F.normalize(self.projection(h), dim=-1)
