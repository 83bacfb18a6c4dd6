"""The C++ patch views (`csrc/patch_views.h`) for tensors: the pixels that the loader cuts."""

from collections.abc import Sequence

import torch
from torch import Tensor

from bagssl_fast._extension import _C

_NAMES = {
    torch.float32: "float32",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.uint8: "uint8",
}


def patch_views(
    images: Tensor | Sequence[Tensor],
    params: Tensor,
    *,
    size: int | tuple[int, int],
    interpolation: str = "bilinear",
    blur_kernel: int = 0,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Patches [P, B, 3, h, w], channels-last in memory; see `ops.patch_views`."""
    if dtype not in _NAMES:
        names = ", ".join(_NAMES.values())
        raise ValueError(f"patch_views: dtype is {dtype}, supported are {names}")
    height, width = (size, size) if isinstance(size, int) else size
    patches = torch.empty((*params.shape[:2], height, width, 3), dtype=dtype)
    # numpy has no bfloat16: its bits travel as integers.
    out = patches.view(torch.uint16) if dtype == torch.bfloat16 else patches
    _C.patch_views(
        [image.contiguous().numpy() for image in images],
        params.numpy(),
        size=(height, width),
        interpolation=interpolation,
        blur_kernel=blur_kernel,
        mean=tuple(mean),
        std=tuple(std),
        dtype=_NAMES[dtype],
        out=out.numpy(),
    )
    return patches.permute(0, 1, 4, 2, 3)
