"""The mean of an activation over its map, by torch."""

from torch import Tensor

from bagssl_fast.ops.deferred import Deferred, applied


def relu_mean(x: Tensor | Deferred) -> Tensor:
    """[N, C] of `x` [N, C, H, W]; see `ops.relu_mean`."""
    return applied(x).mean((2, 3))
