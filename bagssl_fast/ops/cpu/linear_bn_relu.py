"""relu(batch_norm(x W^T)) by torch's own product and batch norm, the ReLU in place.

The products take nearly all of the time: what is left to save is a pass over memory here and there
(`bench/bench_linear_bn_relu.py`). Synchronized statistics are the reference's, and so are running
ones of another dtype than that of the batch's, which torch's batch norm does not take.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from bagssl_fast.ops.reference.linear_bn_relu import linear_bn_relu as reference


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
    """As `reference.linear_bn_relu`."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    if group is not None or (running_mean is not None and running_mean.dtype != dtype):
        tensors = x, weight, gamma, beta, running_mean, running_var
        return reference(
            *tensors, training=training, momentum=momentum, eps=eps, relu=relu, group=group
        )
    flat = x.reshape(-1, x.shape[-1])
    h = F.linear(flat.to(dtype), weight.to(dtype))  # half precision gains nothing on a CPU
    with torch.autocast("cpu", enabled=False):
        h, gamma, beta = h.to(dtype), gamma.to(dtype), beta.to(dtype)
        y = F.batch_norm(h, running_mean, running_var, gamma, beta, training, momentum, eps)
        y = y.relu_() if relu else y
    return y.to(x.dtype).reshape(*x.shape[:-1], weight.shape[0])
