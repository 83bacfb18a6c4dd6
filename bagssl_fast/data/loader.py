"""BagLoader: batches of bags of patches, made ahead by C++ threads."""

from __future__ import annotations

import os
import time
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from bagssl_fast._extension import _C
from bagssl_fast.augment import Augment
from bagssl_fast.data.batch import DTYPES, TABLE, Batch, ImageBatch, device_options
from bagssl_fast.data.checks import check_choice, check_integer
from bagssl_fast.data.decoding import MAX_PIXELS, ImageError, decode_image
from bagssl_fast.data.open import open_source
from bagssl_fast.data.order import batch_ends, epoch_rows, num_batches
from bagssl_fast.data.source import ON_ERROR, Source
from bagssl_fast.ops import RaggedImages


class BagLoader:
    """Batches of bags: each image is decoded once and its P patches are cut while it is hot.

    A bag depends on (seed, epoch, place in the data set, patch) and a batch on (seed, epoch, step)
    only: the same for any number of threads, after resuming, and, over all ranks together, for any
    world size. Iterating makes one epoch; the next one begins where that ended. A batch's memory is
    used again after two more batches were taken: keep it longer by `Batch.clone`.

    Args:
        source: A `Source`, or what `open_source` takes.
        batch_size: Images per batch and rank.
        patches: P, patches per image.
        augment: How patches are made; of a tuple, slot p uses entry p % len.
        sampler: "random" draws views; "grid" takes P = n * n even places at the mean scale,
            "center" (P = 1) the central square; neither of these two augments.
        shuffle: A new order each epoch, a function of (seed, epoch).
        drop_last: Leave out the last images where they do not fill a batch on every rank. Otherwise
            they are dealt out evenly, and ranks may get batches of unequal size, even empty ones.
        seed: Of order and bags; at least 0.
        dtype: Of the patches: float32, bfloat16, float16, or uint8 (not normalized).
        num_threads: 0 = the CPUs of this process, divided among the node's ranks, less one for a
            consumer that computes on the CPU.
        batches_ahead: Batches made in advance.
        rank: This process' place among `world_size`.
        world_size: Processes that share each global batch of `batch_size * world_size` images.
        on_error: "raise" for a bad image; "skip" takes the next good one of the data set instead
            and lists the bad one in `skipped`.
        pin_memory: Batches in page-locked memory, for copies to a GPU; nothing without CUDA.
        indices: Places in the data set to use; all by default.
        max_pixels: Larger images count as bad, before memory is set aside for them.
        views: Where patches are cut: "host" (by the threads), or "device": batches then are
            `ImageBatch`, and `batch.to(device).patches` cuts there. The views are the same.
        fast_decode: Decode JPEG at 1/2, 1/4 or 1/8 where every patch of an image needs no more
            pixels than that. Faster on large files, but pixels and crop edges change slightly.

    Attributes:
        data_wait: Seconds that the consumer has waited for batches so far.

    Raises:
        ValueError: For arguments out of range, and how to fix it.
    """

    def __init__(
        self,
        source: Source | Any,
        batch_size: int = 256,
        patches: int = 20,
        augment: Augment | Sequence[Augment] | None = None,
        sampler: str = "random",
        shuffle: bool = True,
        drop_last: bool = True,
        seed: int = 0,
        dtype: str = "float32",
        num_threads: int = 0,
        batches_ahead: int = 2,
        rank: int = 0,
        world_size: int = 1,
        on_error: str = "raise",
        pin_memory: bool = False,
        indices: ArrayLike | None = None,
        max_pixels: int = MAX_PIXELS,
        views: str = "host",
        fast_decode: bool = False,
    ) -> None:
        self.source = open_source(source)
        augment = Augment() if augment is None else augment
        self.augments = (augment,) if isinstance(augment, Augment) else tuple(augment)
        self.batch_size, self.patches, self.sampler = batch_size, patches, sampler
        self.shuffle, self.drop_last, self.seed = shuffle, drop_last, seed
        self.rank, self.world_size = rank, world_size
        check_choice("on_error", on_error, ON_ERROR)
        self._check_arguments(dtype, num_threads, batches_ahead, max_pixels)
        self._options = None if views == "host" else device_options(self.augments, views, dtype)
        self._indices = self._check_indices(indices)
        self._len = num_batches(len(self._indices), batch_size * world_size, drop_last)
        if self._len == 0:
            raise ValueError(
                f"{len(self._indices)} images do not fill one batch of batch_size {batch_size} x "
                f"world_size {world_size}: lower batch_size or set drop_last=False"
            )
        self.num_threads = num_threads or auto_threads()
        self.data_wait = 0.0

        size = self.augments[0].size
        self._shape = (size, size, 3)
        self._pinned = pin_memory and torch.cuda.is_available()
        ring = range(batches_ahead + _C.HELD_BATCHES)
        if self._options is None:
            count, kind = patches * batch_size * size * size * 3, DTYPES[dtype]
        else:
            count, kind = batch_size * (patches * 64 + 16), torch.uint8  # tables of views
        self._slots = [torch.empty(count, dtype=kind, pin_memory=self._pinned) for _ in ring]
        self._pixels = [torch.empty(0, dtype=torch.uint8) for _ in ring]  # grow as images come
        self._native: _C.Loader | None = _C.Loader(
            source=self.source.native,
            augments=self.augments,
            patches=patches,
            sampler=sampler,
            dtype=dtype,
            seed=seed,
            threads=self.num_threads,
            batches_ahead=batches_ahead,
            skip_bad=on_error == "skip",
            dct_scaling=fast_decode,
            max_pixels=max_pixels,
            cut=self._options is None,
            slots=[slot.data_ptr() for slot in self._slots],
            subset=np.unique(self._indices),
            decoder=decode_image,
            owner=(self._slots, self._pixels),
        )
        # Ends the threads before the interpreter, whose lock they may need, is gone.
        self._finalizer = weakref.finalize(self, self._native.stop)
        self._epoch = 0
        self._step = 0  # batches of this epoch that were taken
        self._begin = 0  # where the next iteration starts: 0 unless a state was loaded
        self._iteration = 0

    def _check_arguments(
        self, dtype: str, num_threads: int, batches_ahead: int, max_pixels: int
    ) -> None:
        least = {
            "batch_size": (self.batch_size, 1),
            "patches": (self.patches, 1),
            "batches_ahead": (batches_ahead, 1),
            "num_threads": (num_threads, 0),
            "seed": (self.seed, 0),
            "world_size": (self.world_size, 1),
            "max_pixels": (max_pixels, 1),
        }
        for name, (value, bound) in least.items():
            check_integer(name, value, bound)
        if not 0 <= self.rank < self.world_size:
            raise ValueError(
                f"rank={self.rank} of world_size={self.world_size}: ranks count from 0"
            )
        if dtype not in DTYPES:
            raise ValueError(f"dtype={dtype!r} is unknown: {', '.join(DTYPES)}")
        if not self.augments or not all(isinstance(a, Augment) for a in self.augments):
            raise ValueError("augment: one Augment or a tuple of at least one is expected")
        if len({a.size for a in self.augments}) > 1:
            sizes = [a.size for a in self.augments]
            raise ValueError(f"augment: sizes {sizes}; all patches of a bag have one size")
        if self.sampler not in ("random", "grid", "center"):
            raise ValueError(f"sampler={self.sampler!r} is unknown: random, grid or center")
        root = round(self.patches**0.5)
        if self.sampler == "grid" and root * root != self.patches:
            raise ValueError(
                f'patches={self.patches} with sampler="grid": a square number is expected, '
                f"{root * root} or {(root + 1) ** 2}"
            )
        if self.sampler == "center" and self.patches != 1:
            raise ValueError(f'patches={self.patches} with sampler="center": there is one, set 1')

    def _check_indices(self, indices: ArrayLike | None) -> NDArray[np.int64]:
        if indices is None:
            return np.arange(len(self.source), dtype=np.int64)
        chosen = np.asarray(indices)
        if chosen.ndim != 1 or len(chosen) == 0 or chosen.dtype.kind not in "iu":
            raise ValueError(
                f"indices of shape {list(chosen.shape)} and type {chosen.dtype}: a list of at "
                "least one whole number is expected"
            )
        if chosen.min() < 0 or chosen.max() >= len(self.source):
            raise ValueError(
                f"indices from {chosen.min()} to {chosen.max()}: the source has "
                f"{len(self.source)} images, counted from 0"
            )
        return chosen.astype(np.int64)

    def __len__(self) -> int:
        """Batches of an epoch, the same on every rank."""
        return self._len

    def __iter__(self) -> Iterator[Batch | ImageBatch]:
        native = self._open_native()
        self._iteration += 1
        self._step, self._begin = self._begin, 0
        rows = epoch_rows(self._indices, self.seed, self._epoch, self.shuffle)
        rows, ends = batch_ends(
            rows, self._len, self.batch_size, self.rank, self.world_size, self.drop_last
        )
        native.start(self._epoch, rows, ends, self._step)
        return _Epoch(self, native, self._iteration)

    def _take(self, native: _C.Loader, iteration: int) -> Batch | ImageBatch:
        if self._iteration != iteration:
            raise RuntimeError("this iteration ended when another one of its loader began")
        begin = time.perf_counter()
        taken = native.next()
        self.data_wait += time.perf_counter() - begin
        if taken is None:
            self._epoch, self._step = self._epoch + 1, 0
            raise StopIteration
        batch = self._wrap(*taken)
        self._step += 1
        return batch

    def _wrap(
        self, slot: int, index: NDArray[np.int64], pixels: int, bad: int, reason: str
    ) -> Batch | ImageBatch:
        if bad >= 0:
            raise ImageError(self.source.name(bad), reason)
        if self.source.labels is None:
            labels = torch.full((len(index),), -1, dtype=torch.int64)
        else:
            labels = torch.from_numpy(self.source.labels[index])
        rest = (labels, torch.from_numpy(index))
        if self._options is not None:
            images, params = self._images(slot, len(index), pixels)
            return ImageBatch(images, params, *rest, self._options)
        shape = (self.patches, len(index), *self._shape)
        flat = self._slots[slot][: int(np.prod(shape))]
        return Batch(flat.view(shape).permute(0, 1, 4, 2, 3), *rest)

    def _images(self, slot: int, rows: int, pixels: int) -> tuple[RaggedImages, Tensor]:
        """The images and the views of a batch: views of the slot's memory."""
        if pixels > len(self._pixels[slot]):
            roomy = torch.empty(pixels + pixels // 8, dtype=torch.uint8, pin_memory=self._pinned)
            self._open_native().move_pixels(slot, roomy.data_ptr(), len(roomy))
            self._pixels[slot] = roomy
        ends = np.cumsum([self.patches * rows * 64, rows * 8, rows * 4, rows * 4]).tolist()
        params, offsets, heights, widths = (
            self._slots[slot][begin:end].view(kind)
            for begin, end, kind in zip([0, *ends], ends, TABLE, strict=False)
        )
        images = RaggedImages(self._pixels[slot][:pixels], offsets, heights, widths)
        return images, params.view(self.patches, rows, 16)

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch of the next iteration, from 0.

        In the epoch that `seek` or `load_state_dict` chose, the step they chose is kept.
        """
        check_integer("epoch", epoch, least=0)
        if epoch != self._epoch:
            self._epoch, self._step, self._begin = epoch, 0, 0

    def seek(self, epoch: int, step: int = 0) -> None:
        """Chooses where the next iteration starts, and ends the current one.

        Args:
            epoch: From 0.
            step: Batch of that epoch, 0 to len(loader); len(loader) is the start of the next epoch.

        Raises:
            ValueError: For an epoch or a step out of range.
        """
        check_integer("epoch", epoch, least=0)
        check_integer("step", step, least=0)
        if step > len(self):
            raise ValueError(f"step must be at most {len(self)}, the batches per epoch, got {step}")
        if self._native is not None:
            self._native.stop()
        self._iteration += 1
        self._epoch, self._begin, self._step = int(epoch), int(step), 0
        if self._begin == len(self):
            self._epoch, self._begin = self._epoch + 1, 0

    @property
    def skipped(self) -> list[tuple[str, str]]:
        """Images that could not be decoded and were replaced: name and reason, each once."""
        found = self._native.skipped if self._native is not None else self._last_skipped
        return [(self.source.name(index), reason) for index, reason in found]

    def state_dict(self) -> dict[str, Any]:
        """Epoch, batches taken in it, and what the order of batches depends on."""
        return {"epoch": self._epoch, "step": self._step or self._begin, "config": self._config()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Seeks to the place where the state was saved.

        Raises:
            ValueError: If this loader's settings give other batches than those of the state.
        """
        missing = [key for key in ("epoch", "step", "config") if key not in state]
        if missing:
            raise ValueError(
                f"not a state of a BagLoader, it has no {', '.join(missing)}: use seek(epoch, step)"
            )
        mine, theirs = self._config(), state["config"]
        changed = [key for key in mine if theirs.get(key) != mine[key]]
        if changed:
            text = ", ".join(f"{key} was {theirs.get(key)}, is {mine[key]}" for key in changed)
            raise ValueError(
                f"the state belongs to other batches ({text}): use the settings it was saved "
                "with, or seek(epoch, step) to start there with the new ones"
            )
        self.seek(state["epoch"], state["step"])

    def _config(self) -> dict[str, str]:
        return {
            "source": self.source.fingerprint,
            "images": str(len(self._indices)),
            "global_batch": str(self.batch_size * self.world_size),
            "patches": str(self.patches),
            "augment": str([asdict(augment) for augment in self.augments]),
            "sampler": self.sampler,
            "shuffle": str(self.shuffle),
            "drop_last": str(self.drop_last),
            "seed": str(self.seed),
        }

    def close(self) -> None:
        """Ends the threads and gives back the ring's memory; batches still held keep theirs."""
        if self._native is not None:
            self._last_skipped = self._native.skipped
            self._finalizer()
            self._native = None
            self._slots, self._pixels = [], []
            self._iteration += 1

    def __enter__(self) -> BagLoader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _open_native(self) -> _C.Loader:
        if self._native is None:
            raise RuntimeError("this loader is closed: make a new BagLoader")
        return self._native


class _Epoch:
    """One iteration over a loader; the threads end with it, whenever it is dropped."""

    def __init__(self, loader: BagLoader, native: _C.Loader, iteration: int) -> None:
        self._loader, self._native, self._iteration = loader, native, iteration
        self._ended = False

    def __iter__(self) -> _Epoch:
        return self

    def __next__(self) -> Batch | ImageBatch:
        if self._ended:
            raise StopIteration
        try:
            return self._loader._take(self._native, self._iteration)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Ends the threads, unless they work for another iteration by now."""
        if not self._ended and self._loader._iteration == self._iteration:
            self._native.stop()
        self._ended = True

    def __del__(self) -> None:
        self.close()


def auto_threads() -> int:
    """Threads for num_threads=0."""
    cpus = _C.available_cpus() // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    return max(1, cpus if torch.cuda.is_available() else cpus - 1)
