"""linear_bn_relu, forward and backward, compared with torch's Linear, BatchNorm1d and ReLU.

Limited by its three matrix products, 6 N F M FLOPs for x [N, F] and W [M, F].
"""

from __future__ import annotations

import torch
from torch import nn

from bagssl_fast.models.heads import LinearBNReLU
from bagssl_fast.ops import use_impl
from harness.common import OURS
from harness.ops import COMPILED, REFERENCE, Call, OpCase, gradients, main

LAYERS = "Linear + BatchNorm1d + ReLU"
SHAPES = {  # N, F, M
    "EMP-SSL's, N2000 F512 M4096": (2000, 512, 4096),
    "VICReg's, N512 F2048 M8192": (512, 2048, 8192),
    "the recipe's, N1024 F512 M256": (1024, 512, 256),
}


def build(provider: str, case_id: str) -> Call:
    rows, features, outputs = SHAPES[case_id]
    torch.manual_seed(0)
    x = torch.randn(rows, features, requires_grad=True)
    linear = nn.Linear(features, outputs, bias=False)
    block: nn.Module = nn.Sequential(linear, nn.BatchNorm1d(outputs), nn.ReLU(inplace=True))
    if provider in (OURS, REFERENCE):
        block = LinearBNReLU(features, outputs)
        with torch.no_grad():
            block.weight.copy_(linear.weight)
    elif provider == COMPILED:
        block = torch.compile(block)
    wrt = (x, *block.parameters())

    def call() -> list[torch.Tensor]:
        with use_impl("reference" if provider == REFERENCE else None):
            return gradients(block(x).square().mean(), *wrt)

    return call


CASES = [
    OpCase(case_id, (LAYERS, REFERENCE, COMPILED), flops=6 * rows * features * outputs)
    for case_id, (rows, features, outputs) in SHAPES.items()
]

if __name__ == "__main__":
    main("bench_linear_bn_relu", __doc__, CASES, build)
