"""The residual sum relu(x + identity), by torch."""

import torch
from torch import Tensor

from bagssl_fast.ops.deferred import Deferred, Normalized, applied


def add_relu(x: Tensor | Normalized, identity: Tensor | Normalized | Deferred) -> Tensor:
    """[N, C, H, W]; see `ops.add_relu`."""
    return torch.relu_(applied(x) + applied(identity))
