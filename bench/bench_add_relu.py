"""add_relu, forward and backward, compared with torch: batch norm's affine map, sum, ReLU.

The residual sums of ResNet-18 on 64 patches of 32x32, identity a written activation. Limited by
memory: forward reads two maps and writes one, backward reads three and writes two, 32 bytes per
element.
"""

from __future__ import annotations

import torch

from bagssl_fast import ops
from harness.common import OURS
from harness.ops import COMPILED, Call, OpCase, gradients, main

EAGER = "affine + sum + ReLU"
SHAPES = {"N64 C64 32x32": (64, 64, 32), "N64 C512 4x4": (64, 512, 4)}


def eager(x: ops.Normalized, identity: torch.Tensor) -> torch.Tensor:
    return torch.relu_(ops.applied(x) + identity)


PROVIDERS = {OURS: ops.add_relu, EAGER: eager, COMPILED: torch.compile(eager)}


def build(provider: str, case_id: str) -> Call:
    torch.manual_seed(0)
    n, channels, side = SHAPES[case_id]
    y, identity = (
        torch.randn(n, channels, side, side).contiguous(memory_format=torch.channels_last)
        for _ in range(2)
    )
    center, shift = torch.randn(2, channels)
    scale = 1 + torch.rand(channels)
    leaves = [v.requires_grad_() for v in (y, scale, shift, identity)]
    add = PROVIDERS[provider]

    def call() -> list[torch.Tensor]:
        out = add(ops.Normalized(y, center, scale, shift), identity)
        return gradients(out.square().sum(), *leaves)

    return call


def case(case_id: str) -> OpCase:
    n, channels, side = SHAPES[case_id]
    return OpCase(
        case_id,
        (EAGER, COMPILED),
        floors={EAGER: 1.1 if side < 8 else 1.3},  # calls are half of the time of a small map
        bytes=32 * n * channels * side**2,
    )


CASES = [case(case_id) for case_id in SHAPES]

if __name__ == "__main__":
    main("bench_add_relu", __doc__, CASES, build)
