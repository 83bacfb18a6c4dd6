"""conv_bn_relu, forward and backward, beside torch's Conv2d, BatchNorm2d and ReLU, channels-last.

PatchNet's blocks on 1,024 patches of 16x16 and ResNet-18's on 64 patches of 32x32, one by one, and
both networks whole, with their means over the patch and ResNet-18's residual sums. A block of ours
reads a deferred activation, returns one: it applies the normalization below it, and leaves its own
to the next; in a chain every normalization is counted once, as in torch's. Parity is checked
against float64, inputs being such that no ReLU is near its edge. Where the processor computes
bfloat16, every case comes again in it: ours and torch's layers under autocast.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from bagssl_fast import machine, ops
from bagssl_fast.models.blocks import conv_bn_relu
from bagssl_fast.models.encoders import build_encoder
from bagssl_fast.models.patchnet import PatchNet
from harness.common import OURS
from harness.ops import COMPILED, Call, OpCase, main

LAYERS = "Conv2d + BatchNorm2d + ReLU"
SHAPES = {  # N, C, M, kernel, stride, padding, side
    "PatchNet 3 to 96, 4x4/2": (1024, 3, 96, 4, 2, 0, 16),
    "PatchNet 96 to 64, 1x1": (1024, 96, 64, 1, 1, 0, 7),
    "PatchNet 64 to 128, 3x3/2": (1024, 64, 128, 3, 2, 0, 7),
    "PatchNet 128 to 128, 1x1": (1024, 128, 128, 1, 1, 0, 3),
    "PatchNet 128 to 512, 1x1": (1024, 128, 512, 1, 1, 0, 3),
    "ResNet-18 3 to 64, 3x3": (64, 3, 64, 3, 1, 1, 32),
    "ResNet-18 64 to 64, 3x3": (64, 64, 64, 3, 1, 1, 32),
    "ResNet-18 64 to 128, 3x3/2": (64, 64, 128, 3, 2, 1, 32),
    "ResNet-18 64 to 128, 1x1/2": (64, 64, 128, 1, 2, 0, 32),
    "ResNet-18 128 to 128, 3x3": (64, 128, 128, 3, 1, 1, 16),
    "ResNet-18 128 to 256, 3x3/2": (64, 128, 256, 3, 2, 1, 16),
    "ResNet-18 256 to 256, 3x3": (64, 256, 256, 3, 1, 1, 8),
    "ResNet-18 256 to 512, 3x3/2": (64, 256, 512, 3, 2, 1, 8),
    "ResNet-18 512 to 512, 3x3": (64, 512, 512, 3, 1, 1, 4),
}
WHOLE = {
    "PatchNet, 1,024 patches": "PatchNet 3 to 96, 4x4/2",
    "ResNet-18, 64 patches": "ResNet-18 3 to 64, 3x3",
}


BF16 = ", bf16"  # ends the names of cases under autocast


def split(case_id: str) -> tuple[str, bool]:
    """The name of a case in float32, and whether this one is in bfloat16."""
    return case_id.removesuffix(BF16), case_id.endswith(BF16)


def autocast(bf16: bool) -> Any:
    return torch.autocast("cpu", torch.bfloat16, enabled=bf16)


def layers_of(case_id: str) -> nn.Sequential:
    _, channels, out, kernel, stride, padding, _ = SHAPES[case_id]
    conv = nn.Conv2d(channels, out, kernel, stride, padding, bias=False)
    block = nn.Sequential(conv, nn.BatchNorm2d(out), nn.ReLU(inplace=True))
    return block.to(memory_format=torch.channels_last)


def input_of(case_id: str) -> Tensor:
    n, channels, *_, side = SHAPES[case_id]
    x = torch.randn(n, channels, side, side)
    return x.contiguous(memory_format=torch.channels_last)


def build(provider: str, case_id: str) -> Call:
    torch.manual_seed(0)
    case_id, bf16 = split(case_id)
    if case_id in WHOLE:
        return build_whole(provider, case_id, bf16)
    block, x = layers_of(case_id), input_of(case_id)
    if bf16 and x.shape[1] > 3:
        x = x.bfloat16()  # what the block below gives
    image = x.shape[1] == 3
    if provider == OURS:
        vectors = [v.expand(x.shape[1]).clone() for v in torch.tensor([[0.0], [1.0], [0.0]])]
        wrt = [] if image else [v.requires_grad_() for v in (x, *vectors[1:])]
        given = x if image else ops.Deferred(x, *vectors)

        def call() -> list[Tensor]:
            with autocast(bf16):
                out = conv_bn_relu(given, block[0], block[1])
            read = (out.y, out.scale, out.shift)
            grads = [torch.ones_like(v) for v in read]
            return [out.y.detach(), *torch.autograd.grad(read, [*wrt, *block.parameters()], grads)]

        return call
    run = torch.compile(block) if provider == COMPILED else block
    wrt = [] if image else [x.requires_grad_()]

    def call_layers() -> list[Tensor]:
        with autocast(bf16):
            y = run(x)
        grads = torch.autograd.grad(y, [*wrt, *block.parameters()], torch.ones_like(y))
        return [y.detach(), *grads]

    return call_layers


def build_whole(provider: str, case_id: str, bf16: bool) -> Call:
    net = PatchNet(16) if case_id.startswith("PatchNet") else build_encoder("resnet18", 32)
    net = net.to(memory_format=torch.channels_last)
    x = input_of(WHOLE[case_id])
    run = torch.compile(net) if provider == COMPILED else net

    def call() -> list[Tensor]:
        with ops.use_impl(None if provider == OURS else "reference"):
            with autocast(bf16):
                y = run(x)
            return [y.detach(), *torch.autograd.grad(y, [*net.parameters()], torch.ones_like(y))]

    return call


def parity(provider: str, case_id: str) -> Call:
    """A block's activation and gradients; each channel is positive throughout or nowhere."""
    torch.manual_seed(0)
    case_id, bf16 = split(case_id)
    block = layers_of(WHOLE.get(case_id, case_id))
    x = input_of(WHOLE.get(case_id, case_id))[:32]
    with torch.no_grad():
        block[1].bias.copy_(10 * torch.randint(0, 2, block[1].bias.shape) - 5)
    dy = torch.randn_like(block(x))
    exact = provider == LAYERS
    if exact:
        block, x, dy = block.double(), x.double(), dy.double()
    x.requires_grad_()

    def call() -> list[Tensor]:
        with autocast(bf16 and not exact):
            y = block(x) if provider != OURS else ops.applied(conv_bn_relu(x, block[0], block[1]))
        return [y.detach(), *torch.autograd.grad(y, [x, *block.parameters()], dy.to(y))]

    return call


def case(case_id: str) -> OpCase:
    n, channels, out, kernel, stride, padding, side = SHAPES[case_id]
    pixels = n * ((side + 2 * padding - kernel) // stride + 1) ** 2
    read, written = n * side**2 * channels, pixels * out
    products = 2 if channels == 3 else 3
    patchnet = case_id.startswith("PatchNet")
    return OpCase(
        case_id,
        (LAYERS, COMPILED),
        floors={LAYERS: 1.1},
        memory_floors={LAYERS: 1.8} if patchnet else {},
        flops=products * 2 * pixels * out * channels * kernel**2,
        # Forward reads x and writes y; backward reads x, y and dy, and writes dx.
        bytes=4 * ((2 if channels == 3 else 3) * read + 3 * written),
        tolerance=5e-6,
        parity=parity,
        quick=patchnet,
    )


CASES = [
    OpCase(
        "PatchNet, 1,024 patches", (LAYERS, COMPILED), floors={LAYERS: 1.9, COMPILED: 1.6},
        memory_floors={LAYERS: 1.8}, tolerance=5e-6, parity=parity,
    ),
    OpCase(
        "ResNet-18, 64 patches", (LAYERS,), floors={LAYERS: 1.6}, rounds=5, tolerance=5e-6,
        parity=parity, quick=False,
    ),
    *map(case, SHAPES),
]  # fmt: skip


def in_bf16(case: OpCase) -> OpCase:
    """The same under autocast. Products have another peak there; ResNet-18's floor is lower."""
    floors = {LAYERS: 1.15} if case.id == "ResNet-18, 64 patches" else case.floors
    return replace(
        case,
        id=case.id + BF16,
        floors=floors,
        flops=0.0,
        bytes=case.bytes / 2,
        tolerance=2e-2,
        quick=False,
    )


if machine.computes_bf16(machine.cpu_flags()):
    CASES += map(in_bf16, CASES[:])

if __name__ == "__main__":
    main("bench_conv_bn_relu", __doc__, CASES, build)
