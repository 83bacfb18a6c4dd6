"""The memory that the loader's threads write batches into."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bagssl_fast._extension import _C
from bagssl_fast.augment import Augment
from bagssl_fast.data.batch import DTYPES, TABLE, device_options
from bagssl_fast.data.settings import Output
from bagssl_fast.ops import RaggedImages


class Ring:
    """Slots for the batches that are held, ready or being made.

    A slot holds patches, or with views="device" a table of views, `csrc/loader.h` says how.

    A pinned slot is not written to again: copies to a GPU may read it long after they were asked
    for, on streams that are not known here. Before it would be, the slot is given other memory,
    and torch's allocator of pinned memory reuses the old one when the copies are done.

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
        self.slots = [self._empty(count, kind) for _ in number]
        self.pixels = [torch.empty(0, dtype=torch.uint8) for _ in number]
        self._taken: list[int] = []  # slots of the latest batches

    def _empty(self, count: int, kind: torch.dtype) -> Tensor:
        return torch.empty(count, dtype=kind, pin_memory=self._pinned)

    def make_room(self, native: _C.Loader) -> None:
        """To be called before a batch is taken, upon which the oldest held slot is overwritten."""
        if not self._pinned or len(self._taken) < _C.HELD_BATCHES:
            return
        slot = self._taken.pop(0)
        old, pixels = self.slots[slot], self.pixels[slot]
        self.slots[slot] = self._empty(len(old), old.dtype)
        native.set_slot(slot, as_bytes(self.slots[slot]))
        if len(pixels):
            self.pixels[slot] = self._empty(len(pixels), torch.uint8)
            native.set_pixels(slot, as_bytes(self.pixels[slot]))

    def took(self, slot: int) -> None:
        """To be called with the slot of each batch that was taken."""
        self._taken.append(slot)
        del self._taken[: -_C.HELD_BATCHES]

    def patches(self, slot: int, rows: int) -> Tensor:
        """The patches in a slot, [P, rows, 3, h, w]."""
        shape = (self.patches_per_image, rows, self._size, self._size, 3)
        return self.slots[slot][: int(np.prod(shape))].view(shape).permute(0, 1, 4, 2, 3)

    def images(
        self, slot: int, rows: int, pixel_bytes: int, native: _C.Loader, run: int
    ) -> tuple[RaggedImages, Tensor]:
        """The images in a slot and their views, [P, rows, 16]."""
        if pixel_bytes > len(self.pixels[slot]):
            size = pixel_bytes + pixel_bytes // 8
            larger = self._empty(size, torch.uint8)
            native.move_pixels(run, slot, as_bytes(larger))
            self.pixels[slot] = larger
        views = self.patches_per_image * rows
        ends = np.cumsum([views * 64, rows * 8, rows * 4, rows * 4]).tolist()
        params, offsets, heights, widths = (
            self.slots[slot][begin:end].view(kind)
            for begin, end, kind in zip([0, *ends], ends, TABLE, strict=False)
        )
        images = RaggedImages(self.pixels[slot][:pixel_bytes], offsets, heights, widths)
        return images, params.view(self.patches_per_image, rows, 16)


def as_bytes(memory: Tensor) -> NDArray[np.uint8]:
    """The memory of a contiguous tensor of any type, as the C++ side takes it."""
    return memory.view(torch.uint8).numpy()
