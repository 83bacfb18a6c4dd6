"""BagLoader: batches of bags of patches, made in advance by C++ threads."""

from __future__ import annotations

import os
import threading
import time
import warnings
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch.utils.data import get_worker_info

from bagssl_fast._extension import _C
from bagssl_fast.augment import Augment
from bagssl_fast.data.batch import Batch, ImageBatch
from bagssl_fast.data.checks import check_integer, check_type
from bagssl_fast.data.decoding import ImageError, decode_image
from bagssl_fast.data.open import open_source
from bagssl_fast.data.order import batch_ends, epoch_rows, num_batches
from bagssl_fast.data.ring import Ring, as_bytes
from bagssl_fast.data.settings import (
    Decoding,
    Order,
    Output,
    Share,
    Threads,
    as_augments,
    check_sampler,
    choose_images,
)
from bagssl_fast.data.source import Source

LAST_EPOCH = 2**32 - 1  # a view is drawn from 32 bits of it
PATIENCE = 5.0  # seconds that stopping waits for reads that do not return

_living: weakref.WeakSet[BagLoader] = weakref.WeakSet()


class BagLoader:
    """Batches of bags: each image is decoded once and its P patches are cut while it is in cache.

    A bag depends on (seed, epoch, index of the image, patch) and a batch on (seed, epoch, step)
    only: the same for any number of threads, after resuming, and, over all ranks together, for any
    world size. Iterating makes one epoch; the next iteration makes the next one.

    A batch stays as it is until two more were taken, in whatever epoch or iteration; keep it longer
    by `Batch.clone`. In pinned memory it stays for as long as it is used, by copies on any stream.
    Threads may share a loader and its iterator: each batch goes to one of them. A signal's handler
    runs while a batch is waited for. A child of fork() continues by itself.

    Args:
        source: A `Source`, or what `open_source` takes.
        batch_size: Images per batch and rank.
        patches: P, patches per image.
        augment: How patches are made; of a tuple, slot p uses entry p % len.
        sampler: "random" draws views; "grid" takes P = n * n boxes spread evenly, of the mean
            scale; "center" (P = 1) takes the central square. The last two do not augment.
        order: Shuffling, seed, choice of images: `Order(shuffle, drop_last, seed, indices)`.
        share: Distributed training: `Share(rank, world_size)`.
        output: Type and place of the patches: `Output(dtype, views, pin_memory)`.
        decoding: Bad images, limits, speed: `Decoding(on_error, max_pixels, fast_decode)`.
        threads: Work in the background: `Threads(num_threads, batches_ahead)`.

    Attributes:
        num_threads: Threads in use.
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
        order: Order = Order(),
        share: Share = Share(),
        output: Output = Output(),
        decoding: Decoding = Decoding(),
        threads: Threads = Threads(),
    ) -> None:
        check_integer("batch_size", batch_size, 1)
        check_sampler(sampler, patches)
        for name, value, record in (
            ("order", order, Order),
            ("share", share, Share),
            ("output", output, Output),
            ("decoding", decoding, Decoding),
            ("threads", threads, Threads),
        ):
            check_type(name, value, record)
        self.source = open_source(source, max_inflation=decoding.max_inflation)
        self.augments = as_augments(augment)
        self.batch_size, self.patches, self.sampler = batch_size, patches, sampler
        self.order, self.share, self.output = order, share, output
        self.decoding, self.threads = decoding, threads
        self.num_threads = threads.resolve()
        self.data_wait = 0.0
        self._indices = choose_images(order, self.source)
        images, world_size = len(self._indices), share.world_size
        self._len = num_batches(images, batch_size * world_size, order.drop_last)
        if self._len == 0:
            raise ValueError(
                f"{images} images do not fill one batch of batch_size {batch_size} x world_size "
                f"{world_size}: use a smaller batch_size or Order(drop_last=False)"
            )
        self._ring = Ring(batch_size, patches, self.augments, output, threads.batches_ahead)
        self._native: _C.Loader | None = self._make_native(self._ring)
        # Ends the threads before the interpreter, whose lock they may need, is gone.
        self._finalizer = weakref.finalize(self, self._native.stop)
        self._epoch = 0
        self._step = 0  # batches of this epoch that were taken
        self._begin = 0  # where the next iteration starts: 0 unless `seek` chose another step
        self._run = -1  # the native number of the current iteration
        self._make_locks()
        _living.add(self)

    def _make_locks(self) -> None:
        self._control = threading.RLock()  # of the attributes above
        self._turn = threading.Lock()  # one thread takes a batch at a time

    def _make_native(self, ring: Ring) -> _C.Loader:
        return _C.Loader(
            source=self.source.native,
            augments=self.augments,
            patches=self.patches,
            sampler=self.sampler,
            dtype=self.output.dtype,
            seed=self.order.seed,
            threads=self.num_threads,
            batches_ahead=self.threads.batches_ahead,
            skip_bad=self.decoding.on_error == "skip",
            dct_scaling=self.decoding.fast_decode,
            max_pixels=self.decoding.max_pixels,
            max_bytes=self.decoding.max_bytes,
            max_scans=self.decoding.max_scans,
            cut=ring.options is None,
            slots=[as_bytes(slot) for slot in ring.slots],
            subset=np.unique(self._indices),
            decoder=decode_image,
        )

    def __len__(self) -> int:
        """Batches of an epoch, the same on every rank."""
        return self._len

    def __iter__(self) -> Iterator[Batch | ImageBatch]:
        refuse_workers()
        with self._control:
            native = self._open_native()
            self._stop(native, self._run)
            order, share = self.order, self.share
            rows = epoch_rows(self._indices, order.seed, self._epoch, order.shuffle)
            rows, ends = batch_ends(
                rows, self._len, self.batch_size, share.rank, share.world_size, order.drop_last
            )
            self._run = native.start(self._epoch, rows, ends, self._begin)
            self._step, self._begin = self._begin, 0
            return _Epoch(self, native, self._ring, self._run)

    def _take(self, native: _C.Loader, ring: Ring, run: int) -> Batch | ImageBatch | None:
        """The next batch of an iteration, None at its end. For one thread at a time."""
        begin = time.perf_counter()
        ring.make_room(native)
        taken = native.next(run)
        if taken is not None:
            ring.took(taken[0])
        with self._control:
            self.data_wait += time.perf_counter() - begin
            if self._run != run:
                pass  # the place of another iteration
            elif taken is None:
                self._epoch, self._step = self._epoch + 1, 0
            elif taken[3] < 0:  # a good batch
                self._step += 1
        if taken is None:
            return None
        slot, index, pixel_bytes, bad, reason = taken
        if bad >= 0:
            raise ImageError(self.source.name(bad), reason)
        known = self.source.labels
        labels = np.full(len(index), -1, np.int64) if known is None else known[index]
        rest = (torch.from_numpy(labels), torch.from_numpy(index))
        if ring.options is None:
            return Batch(ring.patches(slot, len(index)), *rest)
        images, params = ring.images(slot, len(index), pixel_bytes, native, run)
        return ImageBatch(images, params, *rest, ring.options)

    def _stop(self, native: _C.Loader, run: int) -> None:
        """Ends an iteration's threads, unless they work for another one already."""
        if run < 0:
            return
        waiting = native.stop(run, PATIENCE)
        if waiting:
            warnings.warn(
                f"{self.source.name(waiting[0])}: its read has not returned for {PATIENCE:g} s; "
                "the thread is left behind until it does",
                RuntimeWarning,
                stacklevel=3,
            )

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch of the next iteration, from 0.

        In the epoch that `seek` or `load_state_dict` chose, the step they chose is kept.
        """
        check_integer("epoch", epoch, 0, LAST_EPOCH)
        with self._control:
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
        check_integer("epoch", epoch, 0, LAST_EPOCH)
        check_integer("step", step, 0, len(self))
        with self._control:
            run, self._run = self._run, -1
            self._epoch, self._begin, self._step = int(epoch), int(step), 0
            if self._begin == len(self):
                self._epoch, self._begin = self._epoch + 1, 0
            if self._native is not None:
                self._stop(self._native, run)

    @property
    def skipped(self) -> list[tuple[str, str]]:
        """Images that were replaced because they could not be decoded: name and reason of each."""
        native = self._native
        found = self._last_skipped if native is None else native.skipped
        return [(self.source.name(index), reason) for index, reason in found]

    def state_dict(self) -> dict[str, Any]:
        """Epoch, batches taken in it, and the settings that decide the batches."""
        with self._control:
            epoch, step = self._epoch, self._step or self._begin
        return {"epoch": epoch, "step": step, "config": self._config()}

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
            "global_batch": str(self.batch_size * self.share.world_size),
            "patches": str(self.patches),
            "augment": str([asdict(augment) for augment in self.augments]),
            "sampler": self.sampler,
            "shuffle": str(self.order.shuffle),
            "drop_last": str(self.order.drop_last),
            "seed": str(self.order.seed),
        }

    def close(self) -> None:
        """Ends the threads and frees the ring's memory; batches still in use keep theirs."""
        with self._control:
            if self._native is None:
                return
            native, run = self._native, self._run
            self._native, self._run = None, -1
            del self._ring
            self._stop(native, run)
            self._last_skipped = native.skipped
            self._finalizer.detach()

    def __enter__(self) -> BagLoader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _open_native(self) -> _C.Loader:
        if self._native is None:
            raise RuntimeError("this loader is closed: make a new BagLoader")
        return self._native


class _Epoch:
    """One iteration over a loader; deleting it at any time ends the threads."""

    def __init__(self, loader: BagLoader, native: _C.Loader, ring: Ring, run: int) -> None:
        self._loader, self._native, self._ring, self._run = loader, native, ring, run
        self._is_over = False

    def __iter__(self) -> _Epoch:
        return self

    def __next__(self) -> Batch | ImageBatch:
        with self._loader._turn:
            if self._is_over:
                raise StopIteration
            try:
                batch = self._loader._take(self._native, self._ring, self._run)
            except BaseException:
                self.close()
                raise
            if batch is None:
                self._is_over = True
                raise StopIteration
            return batch

    def close(self) -> None:
        """Ends the threads, unless they work for another iteration already."""
        if not self._is_over:
            self._loader._stop(self._native, self._run)

    def __del__(self) -> None:
        self.close()


def _continue_in_child() -> None:
    """After fork(): threads of the parent are gone, and may have held locks."""
    for loader in list(_living):
        loader._make_locks()
        if loader._native is not None:
            loader._native.after_fork()


os.register_at_fork(after_in_child=_continue_in_child)


def refuse_workers() -> None:
    """Raises a RuntimeError in one of several worker processes of torch's DataLoader."""
    worker = get_worker_info()
    if worker is not None and worker.num_workers > 1:
        raise RuntimeError(
            f"a BagLoader in each of {worker.num_workers} DataLoader workers would give every "
            f"image {worker.num_workers} times: iterate over it directly, as it has threads of its "
            "own, or use num_workers=0"
        )
