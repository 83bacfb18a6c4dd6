"""patch_embed: a linear layer over patches of uint8 images, compared with unfold + linear.

The peer normalizes the images, cuts the patches with `F.unfold` (or by indexing, at positions that
form no grid) and applies `F.linear`. Timed: forward, and backward to weight and bias.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bagssl_fast import ops
from harness.common import OURS
from harness.ops import COMPILED, Call, OpCase, main

UNFOLD, INDEX = "unfold + linear", "indexing + linear"
MEAN, STD = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)
# images, image side, patch side, out_dim, positions
SHAPES = {
    "256 patches 16x16 of 32x32, B64 M256": (64, 32, 16, 256, "grid"),
    "256 patches anywhere, B64 M256": (64, 32, 16, 256, "anywhere"),
    "256 patches anywhere in each image, B64 M256": (64, 32, 16, 256, "each"),
    "625 patches 8x8 of 32x32, B64 M128": (64, 32, 8, 128, "grid"),
}


def positions_of(case_id: str) -> Tensor:
    batch, side, patch, _, kind = SHAPES[case_id]
    if kind == "each":
        return torch.randint(0, side - patch + 1, (256, batch, 2))
    count = 16 if patch == 16 else side - patch + 1
    grid = torch.cartesian_prod(torch.arange(count), torch.arange(count))
    return grid if kind == "grid" else grid[torch.randperm(len(grid))]


def normalized(images: Tensor) -> Tensor:
    pixels = images.permute(0, 3, 1, 2).float() / 255
    return (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def unfold(images: Tensor, weight: Tensor, bias: Tensor, positions: Tensor) -> Tensor:
    reach = int(positions.max()) + weight.shape[2]  # a square of positions
    columns = F.unfold(normalized(images)[:, :, :reach, :reach], weight.shape[2:])
    return F.linear(columns.transpose(1, 2), weight.flatten(1), bias).transpose(0, 1)


def indexing(images: Tensor, weight: Tensor, bias: Tensor, positions: Tensor) -> Tensor:
    height, width = weight.shape[2:]
    windows = normalized(images).unfold(2, height, 1).unfold(3, width, 1).permute(2, 3, 0, 1, 4, 5)
    if positions.dim() == 2:
        patches = windows[positions[:, 0], positions[:, 1]]
    else:
        patches = windows[positions[..., 0], positions[..., 1], torch.arange(len(images))]
    patches = patches.flatten(2)  # [P, B, C h w]
    return F.linear(patches, weight.flatten(1), bias)


def ours(images: Tensor, weight: Tensor, bias: Tensor, positions: Tensor) -> Tensor:
    return ops.patch_embed(images, weight, bias, positions, mean=MEAN, std=STD)


PROVIDERS = {OURS: ours, UNFOLD: unfold, INDEX: indexing, COMPILED: torch.compile(unfold)}


def build(provider: str, case_id: str) -> Call:
    torch.manual_seed(0)
    batch, side, patch, out_dim, _ = SHAPES[case_id]
    images = torch.randint(0, 256, (batch, side, side, 3), dtype=torch.uint8)
    weight = (torch.randn(out_dim, 3, patch, patch) / (3 * patch**2) ** 0.5).requires_grad_()
    bias = torch.zeros(out_dim, requires_grad=True)
    positions = positions_of(case_id)
    dy = torch.randn(len(positions), batch, out_dim)
    embed = PROVIDERS[provider]

    def call() -> list[Tensor]:
        y = embed(images, weight, bias, positions)
        return [y.detach(), *torch.autograd.grad(y, (weight, bias), dy)]

    return call


GRID, ANYWHERE, EACH, SMALL = SHAPES
CASES = [
    OpCase(GRID, (UNFOLD, COMPILED), {UNFOLD: 3}, {UNFOLD: 10}),
    OpCase(ANYWHERE, (INDEX,)),
    OpCase(EACH, (INDEX,), flops=4 * 256 * 64 * 768 * 256),
    OpCase(SMALL, (UNFOLD, COMPILED)),
]

if __name__ == "__main__":
    main("bench_patch_embed", __doc__, CASES, build)
