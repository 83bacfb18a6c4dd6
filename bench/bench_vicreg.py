"""vicreg: all three terms and their gradients, compared with the authors' formula and lightly.

The authors' formula (`baselines/losses.py`) runs slot by slot; lightly's class runs where there are
two slots. Timed: the weighted loss (25, 25, 1), forward and backward to z.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bagssl_fast import ops
from baselines.losses import vicreg
from harness.common import OURS
from harness.ops import COMPILED, REFERENCE, Call, OpCase, gradients, main

AUTHORS, LIGHTLY = "authors' formula", "lightly"
SHAPES = {
    "B256 D2048 P2": (2, 256, 2048),
    "B512 D8192 P2": (2, 512, 8192),
    "B2048 D2048 P2": (2, 2048, 2048),
    "B128 D1024 P20": (20, 128, 1024),
}


def lightly(z: Tensor) -> Tensor:
    from lightly.loss import VICRegLoss

    return VICRegLoss()(z[0], z[1])


def ours(z: Tensor, impl: str | None = None) -> Tensor:
    invariance, variance, covariance = ops.vicreg(z, impl=impl)
    return 25 * invariance + 25 * variance + covariance


def reference(z: Tensor) -> Tensor:
    return ours(z, impl="reference")


PROVIDERS = {
    OURS: ours,
    AUTHORS: vicreg,
    LIGHTLY: lightly,
    REFERENCE: reference,
    COMPILED: torch.compile(reference),
}


def build(provider: str, case_id: str) -> Call:
    torch.manual_seed(0)
    z = torch.randn(SHAPES[case_id], requires_grad=True)
    loss = PROVIDERS[provider]
    return lambda: gradients(loss(z), z)


def case(case_id: str, floor: float, **options) -> OpCase:
    num_slots, batch, dim = SHAPES[case_id]
    peers = (AUTHORS, LIGHTLY, REFERENCE, COMPILED) if num_slots == 2 else (AUTHORS, COMPILED)
    return OpCase(
        case_id,
        options.pop("providers", peers),
        floors={AUTHORS: floor},
        flops=(1.25 + 2) * num_slots * min(batch, dim) * batch * dim,
        **options,
    )


CASES = [
    case("B256 D2048 P2", 8),
    case(
        "B512 D8192 P2",
        12,
        memory_floors={AUTHORS: 8},
        rounds=3,
        quick=False,
        providers=(AUTHORS, LIGHTLY),
    ),
    case("B2048 D2048 P2", 1.5, rounds=5, quick=False),
    case("B128 D1024 P20", 8, rounds=5),
]

if __name__ == "__main__":
    main("bench_vicreg", __doc__, CASES, build)
