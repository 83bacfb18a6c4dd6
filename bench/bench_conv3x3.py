"""conv3x3: the four 3x3 layers of ResNet-18 on patches of 32x32, compared with torch's convolution.

64 patches in channels-last memory, forward and backward to x and weight; torch is oneDNN on a CPU.
Parity is checked against torch in float64. Memory is not compared: ours keeps its buffers (up to
20 MiB) from call to call, which the peak of a later call does not show.
"""

from __future__ import annotations

import torch

from bagssl_fast import ops
from harness.common import OURS
from harness.ops import Call, OpCase, main

TORCH, EXACT = "torch", "torch in float64"
SHAPES = {
    "64 channels 32x32": (64, 32),
    "128 channels 16x16": (128, 16),
    "256 channels 8x8": (256, 8),
    "512 channels 4x4": (512, 4),
}
BATCH = 64


def build(provider: str, case_id: str) -> Call:
    torch.manual_seed(0)
    channels, side = SHAPES[case_id]
    layout = torch.channels_last
    dtype = torch.float64 if provider == EXACT else torch.float32
    x = torch.randn(BATCH, channels, side, side).contiguous(memory_format=layout)
    weight = torch.randn(channels, channels, 3, 3).contiguous(memory_format=layout)
    dy = torch.randn_like(x).to(dtype)
    x, weight = x.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()
    impl = None if provider == OURS else "reference"

    def call() -> list[torch.Tensor]:
        y = ops.conv3x3(x, weight, impl=impl)
        return [y.detach(), *torch.autograd.grad(y, (x, weight), dy)]

    return call


def parity(provider: str, case_id: str) -> Call:
    """Against float64, which stands in for the peer."""
    return build(EXACT if provider == TORCH else provider, case_id)


CASES = [
    OpCase(
        case_id,
        (TORCH,),
        floors={TORCH: 1.7},
        # Three products, in 36 points of each 4x4 tile.
        flops=3 * 2 * 36 * BATCH * (side // 4) ** 2 * channels**2,
        tolerance=2e-6,
        parity=parity,
        memory=False,
        quick=side in (32, 4),
    )
    for case_id, (channels, side) in SHAPES.items()
]

if __name__ == "__main__":
    main("bench_conv3x3", __doc__, CASES, build)
