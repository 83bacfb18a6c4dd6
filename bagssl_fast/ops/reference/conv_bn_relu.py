"""relu(batch_norm(conv2d(x))) by torch's own layers: it reads and returns activations as written.

Training: normalize by the biased variance of the batch, move the running statistics toward the
batch's mean and *unbiased* variance by `momentum`. Evaluation: normalize by the running statistics.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from bagssl_fast.ops.deferred import Deferred, applied
from bagssl_fast.ops.reference.linear_bn_relu import batch_statistics


def conv_bn_relu(
    x: Tensor | Deferred,
    weight: Tensor,
    gamma: Tensor,
    beta: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    stride: int = 1,
    padding: int = 0,
    training: bool,
    momentum: float = 0.1,
    eps: float = 1e-5,
    group: ProcessGroup | None = None,
    relu: bool = True,
) -> Tensor:
    """The activation [N, M, H', W'] in the convolution's dtype; see `ops.conv_bn_relu`.

    Statistics are in float32, or float64 where the convolution is.
    """
    y = F.conv2d(applied(x), weight, None, stride, padding)
    dtype = torch.float64 if y.dtype == torch.float64 else torch.float32
    gamma, beta = gamma.to(dtype), beta.to(dtype)
    if group is None or not training:
        h = F.batch_norm(y, running_mean, running_var, gamma, beta, training, momentum, eps)
        return torch.relu_(h) if relu else h
    with torch.autocast(y.device.type, enabled=False):
        rows = y.to(dtype).movedim(1, -1)
        flat = rows.flatten(0, -2)
        mean, var = batch_statistics(flat, running_mean, running_var, momentum, group)
        h = (rows - mean) * torch.rsqrt(var + eps) * gamma + beta
    return (torch.relu_(h) if relu else h).movedim(-1, 1).to(y.dtype)
