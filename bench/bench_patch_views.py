"""patch_views: patches cut, augmented and normalized from images, compared with torchvision v2.

All providers get the same images and the same parameters, drawn beforehand. The peer runs
torchvision's functional ops on uint8 tensors patch by patch, as its transforms do, and normalizes
all patches at once. There is no backward.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from bagssl_fast import ops
from bagssl_fast._extension import _C
from bagssl_fast.augment import Augment
from baselines.patch_views import torchvision_view
from harness.ops import REFERENCE, Call, OpCase, main

TORCHVISION = "torchvision v2"


@dataclass(frozen=True)
class Shape:
    """B images of one size, and the P patches that are cut from each."""

    batch: int
    image: tuple[int, int]
    patches: int
    augment: Augment


SHAPES = {
    # EMP-SSL's augmentation; its blur, Pillow's, is unlimited: 13 pixels are three sigma.
    "P20 B100, 32x32 -> 32": Shape(100, (32, 32), 20, Augment(size=32, blur_kernel=13)),
    "P4 B8, 500x375 -> 64": Shape(
        8, (375, 500), 4, Augment(size=64, scale=(0.1, 0.1), blur_kernel=13)
    ),
    # Two views as VICReg and SimCLR take them, twice.
    "P4 B8, 500x375 -> 224": Shape(
        8,
        (375, 500),
        4,
        Augment(size=224, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3), blur_prob=0.5, blur_kernel=23),
    ),
}


def drawn(shape: Shape) -> Tensor:
    """The parameters [P, B, 16] of all patches."""
    sizes = np.tile(np.array(shape.image, dtype=np.int64), (shape.batch, 1))
    index = np.arange(shape.batch)
    return torch.from_numpy(
        _C.draw_views([shape.augment], sizes, index, patches=shape.patches, seed=0, epoch=0)
    )


def torchvision(images: Tensor, params: Tensor, augment: Augment) -> Tensor:
    """[P, B, 3, h, w] of images [B, 3, H, W]."""
    size = (augment.size, augment.size)
    patches = torch.stack(
        [
            torchvision_view(image, row, size, augment.interpolation, augment.blur_kernel)
            for rows in params.tolist()
            for image, row in zip(images, rows, strict=True)
        ]
    )
    pixels = F.to_dtype(patches, torch.float32, scale=True)
    pixels = F.normalize(pixels, list(augment.mean), list(augment.std), inplace=True)
    return pixels.unflatten(0, params.shape[:2])


def build(provider: str, case_id: str) -> Call:
    shape = SHAPES[case_id]
    a = shape.augment
    generator = torch.Generator().manual_seed(0)
    size = (shape.batch, *shape.image, 3)
    images = torch.randint(0, 256, size, dtype=torch.uint8, generator=generator)
    params = drawn(shape)
    if provider == TORCHVISION:
        planes = images.permute(0, 3, 1, 2).contiguous()
        return lambda: [torchvision(planes, params, a)]
    impl = "reference" if provider == REFERENCE else None

    def call() -> list[Tensor]:
        return [
            ops.patch_views(
                images,
                params,
                size=a.size,
                interpolation=a.interpolation,
                blur_kernel=a.blur_kernel,
                mean=a.mean,
                std=a.std,
                impl=impl,
            )
        ]

    return call


def case(case_id: str, floor: float) -> OpCase:
    # Blurs, and resizes where torch has no AVX2 kernel, may round a tie the other way, by 1/255.
    return OpCase(case_id, (TORCHVISION, REFERENCE), {TORCHVISION: floor}, tolerance=2e-3)


CASES = [case(case_id, floor) for case_id, floor in zip(SHAPES, (40, 10, 8), strict=True)]

if __name__ == "__main__":
    main("bench_patch_views", __doc__, CASES, build)
