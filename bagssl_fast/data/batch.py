"""A batch of bags: patches cut by the loader, or images and views for a device to cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bagssl_fast import ops
from bagssl_fast._extension import _C
from bagssl_fast.augment import Augment, differing

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "uint8": torch.uint8,
}
TABLE = (torch.float32, torch.int64, torch.int32, torch.int32)  # params, offsets, heights, widths


@dataclass(frozen=True)
class Batch:
    """One batch of a rank.

    Attributes:
        patches: [P, B, 3, h, w]; in memory [P, B, h, w, 3], so that every [P * B, 3, h, w] is
            channels-last.
        labels: Class per image, int64 [B]; -1 where the source has no labels.
        index: Index in the data set per image, int64 [B]; for an image that could not be decoded,
            the index of its replacement.
    """

    patches: Tensor
    labels: Tensor
    index: Tensor

    def clone(self) -> Batch:
        """A copy with memory of its own, which later batches do not overwrite."""
        return Batch(self.patches.clone(), self.labels.clone(), self.index.clone())

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The batch with its patches on a device; labels and index stay where they are."""
        return replace(self, patches=self.patches.to(device, non_blocking=non_blocking))


@dataclass(frozen=True)
class ImageBatch:
    """One batch of a rank before cutting: a device is sent the images instead of P patches each.

    Attributes:
        images: Of each image the part that its views use, one after another in one buffer.
        params: The views, float32 [P, B, 16]; boxes are relative to that part.
        labels, index: As in `Batch`.
        options: Of `ops.patch_views`: size, interpolation, blur_kernel, mean, std, dtype.
    """

    images: ops.RaggedImages
    params: Tensor
    labels: Tensor
    index: Tensor
    options: dict[str, Any]

    @property
    def patches(self) -> Tensor:
        """[P, B, 3, h, w], channels-last; cut on the images' device, again at every access."""
        return ops.patch_views(self.images, self.params, **self.options)

    def clone(self) -> ImageBatch:
        """A copy with memory of its own, which later batches do not overwrite."""
        images = ops.RaggedImages(*(x.clone() for x in self.images))
        params, labels, index = self.params.clone(), self.labels.clone(), self.index.clone()
        return ImageBatch(images, params, labels, index, self.options)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> ImageBatch:
        """The batch with images and views on a device; labels and index stay where they are."""
        images = (x.to(device, non_blocking=non_blocking) for x in self.images)
        params = self.params.to(device, non_blocking=non_blocking)
        return replace(self, images=ops.RaggedImages(*images), params=params)


def device_options(augments: Sequence[Augment], dtype: str) -> dict[str, Any]:
    """The arguments of `ops.patch_views` other than images and views.

    Raises:
        ValueError: If the slots differ in one of these.
    """
    if differing(augments):
        raise ValueError(
            "augment: the entries differ in interpolation, blur_kernel, mean or std, but "
            'views="device" cuts all slots in one call: make them equal or use views="host"'
        )
    first = augments[0]
    kernel = first.blur_kernel or _C.auto_blur_kernel(first.size, first.size)
    if kernel // 2 >= first.size and any(augment.blur_prob > 0 for augment in augments):
        raise ValueError(f"augment: blur_kernel {kernel} is too large for patches of {first.size}")
    return {
        "size": first.size,
        "interpolation": first.interpolation,
        "blur_kernel": kernel,
        "mean": tuple(first.mean),
        "std": tuple(first.std),
        "dtype": DTYPES[dtype],
    }
