"""tcr: the coding rate of P slots and its gradient, compared with EMP-SSL's loop.

EMP-SSL's code calls `logdet(I + D / (B eps) Z^T Z) / 2`, D x D, once for each of the P patches of
a bag (`baselines/losses.py`). Rows have norm 1, like its projections.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bagssl_fast import ops
from baselines.losses import coding_rate
from harness.common import OURS
from harness.ops import COMPILED, REFERENCE, Call, OpCase, gradients, main

EMP_SSL = "EMP-SSL's loop"
SHAPES = {
    "B100 D1024 P20": (20, 100, 1024),
    "B256 D512 P50": (50, 256, 512),
    "B1024 D256 P4": (4, 1024, 256),
}


def reference(z: Tensor) -> Tensor:
    return ops.tcr(z, impl="reference").mean()


PROVIDERS = {
    OURS: lambda z: ops.tcr(z).mean(),
    EMP_SSL: coding_rate,
    REFERENCE: reference,
    COMPILED: torch.compile(coding_rate),
}


def build(provider: str, case_id: str) -> Call:
    torch.manual_seed(0)
    z = F.normalize(torch.randn(SHAPES[case_id]), dim=2).requires_grad_()
    rate = PROVIDERS[provider]
    return lambda: gradients(rate(z), z)


def case(case_id: str, floors: dict[str, float], **options) -> OpCase:
    num_slots, batch, dim = SHAPES[case_id]
    flops = 4 * num_slots * min(batch, dim) * batch * dim
    providers = (EMP_SSL, COMPILED)
    # The peer's gradient goes through a D x D inverse in float32.
    return OpCase(case_id, providers, floors=floors, flops=flops, tolerance=1e-4, **options)


CASES = [
    case("B100 D1024 P20", {EMP_SSL: 25}, rounds=3),
    case("B256 D512 P50", {}, rounds=3, quick=False),
    case("B1024 D256 P4", {}, quick=False),
]

if __name__ == "__main__":
    main("bench_tcr", __doc__, CASES, build)
