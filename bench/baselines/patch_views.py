"""One patch by torchvision's functional ops (v2), with parameters that are given, not drawn."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

ORDERS = tuple(itertools.permutations(range(4)))
STAGES = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)


def torchvision_view(
    image: Tensor,
    row: Sequence[float],
    size: tuple[int, int],
    interpolation: str = "bilinear",
    blur_kernel: int = 3,
) -> Tensor:
    """A patch uint8 [3, h, w] of an image uint8 [3, H, W].

    Args:
        image: The image.
        row: The patch's row of `ops.patch_views`' params: top, left, height, width, flip, the
            strengths of the four color stages, their order, grayscale, blur sigma, solarize.
        size: Height and width of the patch.
        interpolation: "bilinear" or "bicubic".
        blur_kernel: Odd size of the blur's kernel.
    """
    top, left, height, width, flip, *strengths, order, gray, sigma, solarize = row[:13]
    box = (int(top), int(left), int(height), int(width))
    x = F.resized_crop(image, *box, list(size), InterpolationMode(interpolation), antialias=True)
    if flip:
        x = F.horizontal_flip(x)
    if order >= 0:
        for stage in ORDERS[int(order)]:
            x = STAGES[stage](x, strengths[stage])
    if gray:
        x = F.rgb_to_grayscale(x, 3)
    if sigma > 0:
        x = F.gaussian_blur(x, [blur_kernel] * 2, [sigma] * 2)
    return F.solarize(x, solarize) if solarize < 256 else x
