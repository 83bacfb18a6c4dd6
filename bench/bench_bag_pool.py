"""bag_pool: mean and mean cosine of a bag, forward and backward, compared with torch.

Limited by memory: x once in forward, x and dx once in backward, 12 bytes per element.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bagssl_fast import ops
from harness.common import OURS
from harness.ops import COMPILED, Call, OpCase, gradients, main

EAGER = "mean + cosine_similarity"
SHAPES = {"P20 B256 D4096": (20, 256, 4096), "P20 B100 D1024": (20, 100, 1024)}


def eager(x: Tensor) -> Tensor:
    mean = x.mean(dim=0)
    cosine = F.cosine_similarity(x, mean.expand_as(x), dim=2).mean(dim=0)
    return mean.square().sum() + cosine.sum()


def ours(x: Tensor) -> Tensor:
    pooled = ops.bag_pool(x, cosine=True)
    assert pooled.cosine is not None
    return pooled.mean.square().sum() + pooled.cosine.sum()


PROVIDERS = {OURS: ours, EAGER: eager, COMPILED: torch.compile(eager)}


def build(provider: str, case_id: str) -> Call:
    torch.manual_seed(0)
    x = torch.randn(SHAPES[case_id], requires_grad=True)
    pool = PROVIDERS[provider]
    return lambda: gradients(pool(x), x)


def case(case_id: str, floors: dict[str, float]) -> OpCase:
    num_patches, batch, dim = SHAPES[case_id]
    return OpCase(case_id, (EAGER, COMPILED), floors, bytes=12 * num_patches * batch * dim)


CASES = [case("P20 B256 D4096", {EAGER: 2}), case("P20 B100 D1024", {})]

if __name__ == "__main__":
    main("bench_bag_pool", __doc__, CASES, build)
