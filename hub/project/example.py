# /// script
# requires-python = ">=3.10"
# dependencies = ["kernels", "torch"]
# ///
"""VICReg's loss of two views, with its gradient."""

from pathlib import Path

import torch

from kernels import get_local_kernel

k = get_local_kernel(Path(__file__).parent)
z = torch.randn(2, 256, 1024, device="cuda", requires_grad=True)
invariance, variance, covariance = k.vicreg(z)
loss = 25 * invariance + 25 * variance + covariance
loss.backward()
print(float(loss), float(z.grad.norm()))
