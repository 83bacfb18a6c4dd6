"""The memory that the loader's threads write batches into."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from bagssl_fast._extension import _C
from bagssl_fast.augment import Augment
from bagssl_fast.data.batch import DTYPES, TABLE, device_options
from bagssl_fast.data.settings import Output
from bagssl_fast.ops import RaggedImages


class Ring:
    """Slots for the batches that are held, ready or being made.

    A slot holds patches, or with views="device" a table of views, `csrc/loader.h` says how.

    Attributes:
        options: What `ops.patch_views` is given to cut on a device; None where the threads cut.
        slots: One buffer per slot.
        pixels: With views="device", the images of each slot; these buffers grow.
    """

    def __init__(
        self,
        batch_size: int,
        patches: int,
        augments: Sequence[Augment],
        output: Output,
        batches_ahead: int,
    ) -> None:
        on_host = output.views == "host"
        self.options = None if on_host else device_options(augments, output.dtype)
        self.patches_per_image, self._size = patches, augments[0].size
        self._pinned = bool(output.pin_memory) and torch.cuda.is_available()
        if on_host:
            count, kind = patches * batch_size * self._size**2 * 3, DTYPES[output.dtype]
        else:
            count, kind = batch_size * (patches * 64 + 16), torch.uint8
        number = range(batches_ahead + _C.HELD_BATCHES)
        self.slots = [torch.empty(count, dtype=kind, pin_memory=self._pinned) for _ in number]
        self.pixels = [torch.empty(0, dtype=torch.uint8) for _ in number]

    def patches(self, slot: int, rows: int) -> Tensor:
        """The patches in a slot, [P, rows, 3, h, w]."""
        shape = (self.patches_per_image, rows, self._size, self._size, 3)
        return self.slots[slot][: int(np.prod(shape))].view(shape).permute(0, 1, 4, 2, 3)

    def images(
        self, slot: int, rows: int, pixel_bytes: int, native: _C.Loader
    ) -> tuple[RaggedImages, Tensor]:
        """The images in a slot and their views, [P, rows, 16]."""
        if pixel_bytes > len(self.pixels[slot]):
            size = pixel_bytes + pixel_bytes // 8
            larger = torch.empty(size, dtype=torch.uint8, pin_memory=self._pinned)
            native.move_pixels(slot, larger.data_ptr(), len(larger))
            self.pixels[slot] = larger
        views = self.patches_per_image * rows
        ends = np.cumsum([views * 64, rows * 8, rows * 4, rows * 4]).tolist()
        params, offsets, heights, widths = (
            self.slots[slot][begin:end].view(kind)
            for begin, end, kind in zip([0, *ends], ends, TABLE, strict=False)
        )
        images = RaggedImages(self.pixels[slot][:pixel_bytes], offsets, heights, widths)
        return images, params.view(self.patches_per_image, rows, 16)
