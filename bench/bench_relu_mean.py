"""relu_mean, forward and backward, compared with torch: batch norm's affine map, ReLU, mean.

Limited by memory: y once in forward, y and dy once in backward, 12 bytes per element. torch writes
the activation and reads it again.
"""

from __future__ import annotations

import torch

from bagssl_fast import ops
from harness.common import OURS
from harness.ops import COMPILED, Call, OpCase, gradients, main

EAGER = "affine + ReLU + mean"
SHAPES = {  # N, C, side
    "N1024 C512 3x3": (1024, 512, 3),  # PatchNet's top
    "N1024 C96 7x7": (1024, 96, 7),  # PatchNet's first tap
    "N64 C512 4x4": (64, 512, 4),  # ResNet-18's top
}


def eager(x: ops.Deferred) -> torch.Tensor:
    return ops.applied(x).mean((2, 3))


PROVIDERS = {OURS: ops.relu_mean, EAGER: eager, COMPILED: torch.compile(eager)}


def build(provider: str, case_id: str) -> Call:
    torch.manual_seed(0)
    n, channels, side = SHAPES[case_id]
    y = torch.randn(n, channels, side, side).contiguous(memory_format=torch.channels_last)
    center, shift = torch.randn(2, channels)
    scale = 1 + torch.rand(channels)
    leaves = [v.requires_grad_() for v in (y, scale, shift)]
    mean = PROVIDERS[provider]

    def call() -> list[torch.Tensor]:
        return gradients(mean(ops.Deferred(y, center, scale, shift)).square().sum(), *leaves)

    return call


def case(case_id: str) -> OpCase:
    n, channels, side = SHAPES[case_id]
    return OpCase(
        case_id, (EAGER, COMPILED), floors={EAGER: 1.5}, bytes=12 * n * channels * side**2
    )


CASES = [case(case_id) for case_id in SHAPES]

if __name__ == "__main__":
    main("bench_relu_mean", __doc__, CASES, build)
