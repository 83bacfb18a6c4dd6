"""The settings of a `BagLoader`, checked: groups of them, its augmentations, sampler, images."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from bagssl_fast._extension import _C
from bagssl_fast.augment import Augment
from bagssl_fast.data.batch import DTYPES
from bagssl_fast.data.checks import check_bool, check_choice, check_integer
from bagssl_fast.data.decoding import MAX_BYTES, MAX_INFLATION, MAX_PIXELS, MAX_SCANS
from bagssl_fast.data.source import ON_ERROR, Source


@dataclass(frozen=True, eq=False)  # arrays have no truth value to compare by
class Order:
    """Which images make up an epoch, and in which order.

    Args:
        shuffle: A new order each epoch, a function of (seed, epoch).
        drop_last: Leave out the last images where they do not fill a batch on every rank. Otherwise
            they are divided evenly, and ranks may get batches of unequal size, even empty ones.
        seed: Of the order and of the augmentations, 0 to 2^64 - 1.
        indices: The images to use, as indices into the source; all by default.
    """

    shuffle: bool = True
    drop_last: bool = True
    seed: int = 0
    indices: ArrayLike | None = None

    def __post_init__(self) -> None:
        check_bool("shuffle", self.shuffle)
        check_bool("drop_last", self.drop_last)
        check_integer("seed", self.seed, 0, 2**64 - 1)
        if self.indices is None:
            return
        chosen = np.asarray(self.indices)
        if chosen.ndim != 1 or len(chosen) == 0 or chosen.dtype.kind not in "iu":
            raise ValueError(
                "indices must be a list of at least one integer, got an array of type "
                f"{chosen.dtype} and shape {list(chosen.shape)}"
            )


@dataclass(frozen=True)
class Share:
    """The share of each global batch that a process of distributed training loads.

    Args:
        rank: This process among `world_size`, counted from 0.
        world_size: Number of processes; a global batch has `batch_size * world_size` images.
    """

    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        check_integer("world_size", self.world_size, 1)
        check_integer("rank", self.rank, 0)
        if self.rank >= self.world_size:
            raise ValueError(
                f"rank must be less than world_size {self.world_size}, got {self.rank}"
            )


@dataclass(frozen=True)
class Output:
    """What batches are made of, and where.

    Args:
        dtype: Type of the patches: float32, bfloat16, float16, or uint8 (not normalized).
        views: Where patches are cut: "host" (by the loader's threads), or "device": batches are
            then `ImageBatch`, and `batch.to(device).patches` cuts there. The views are the same.
        pin_memory: Batches in page-locked memory, for copies to a GPU; ignored without CUDA.
    """

    dtype: str = "float32"
    views: str = "host"
    pin_memory: bool = False

    def __post_init__(self) -> None:
        check_choice("dtype", self.dtype, DTYPES)
        check_choice("views", self.views, ("host", "device"))
        check_bool("pin_memory", self.pin_memory)


@dataclass(frozen=True)
class Decoding:
    """How images are decoded, and what happens to those that cannot be.

    Args:
        on_error: "raise" for a bad image; "skip" takes the next good image of the data set instead
            and lists the bad one in `BagLoader.skipped`.
        max_pixels: Larger images count as bad; no memory is allocated for them. At the default
            limit, Pillow's own, a PNG takes 2 GB while it is decoded, a JPEG 0.6 GB.
        max_bytes: Larger files count as bad, likewise.
        max_scans: Progressive JPEGs of more scans count as bad: a file of a few KB may ask for
            thousands of passes over a large image.
        max_inflation: A compressed file of arrays (`.npz`, `.gz`) that claims more than so many
            times its own size is not opened; 256 MB are in any case.
        fast_decode: Decode JPEG at 1/2, 1/4 or 1/8 of its size where every patch of the image is
            made smaller by at least as much. Faster on large files, but pixels and the edges of
            crops change slightly.
    """

    on_error: str = "raise"
    max_pixels: int = MAX_PIXELS
    max_bytes: int = MAX_BYTES
    max_scans: int = MAX_SCANS
    max_inflation: int = MAX_INFLATION
    fast_decode: bool = False

    def __post_init__(self) -> None:
        check_choice("on_error", self.on_error, ON_ERROR)
        check_integer("max_pixels", self.max_pixels, 1)
        check_integer("max_bytes", self.max_bytes, 1)
        check_integer("max_scans", self.max_scans, 1, 2**31 - 1)
        check_integer("max_inflation", self.max_inflation, 1)
        check_bool("fast_decode", self.fast_decode)


@dataclass(frozen=True)
class Threads:
    """How much work is done ahead; batches do not depend on it.

    Args:
        num_threads: Threads of the loader; 0 takes the CPUs that this process may use (by its
            affinity and its container's quota), divided among the ranks of the node, less one for
            the training where that computes on the CPU.
        batches_ahead: Batches made in advance.
    """

    num_threads: int = 0
    batches_ahead: int = 2

    def __post_init__(self) -> None:
        check_integer("num_threads", self.num_threads, 0)
        check_integer("batches_ahead", self.batches_ahead, 1)

    def resolve(self) -> int:
        """The number of threads, also where `num_threads` is 0."""
        if self.num_threads:
            return int(self.num_threads)
        cpus = _C.available_cpus() // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        return max(1, cpus if torch.cuda.is_available() else cpus - 1)


def as_augments(augment: Augment | Sequence[Augment] | None) -> tuple[Augment, ...]:
    """The augmentations of a loader's slots, all of one patch size.

    Raises:
        ValueError: If there is none, if one makes no sense, or if their sizes differ.
    """
    augment = Augment() if augment is None else augment
    augments = tuple(augment) if isinstance(augment, Sequence) else (augment,)
    if not augments or not all(isinstance(entry, Augment) for entry in augments):
        raise ValueError(f"augment must be an Augment or a tuple of at least one, got {augment!r}")
    for entry in augments:
        _C.check_augment(entry)
    sizes = [entry.size for entry in augments]
    if len(set(sizes)) > 1:
        raise ValueError(f"augment: all patches of a bag must have one size, got sizes {sizes}")
    return augments


def check_sampler(sampler: str, patches: int) -> None:
    """Raises a ValueError unless the sampler is known and makes so many patches."""
    check_integer("patches", patches, 1)
    check_choice("sampler", sampler, ("random", "grid", "center"))
    root = round(patches**0.5)
    if sampler == "grid" and root * root != patches:
        raise ValueError(
            f'patches must be a square number with sampler="grid", got {patches}: use '
            f"{root * root} or {(root + 1) ** 2}"
        )
    if sampler == "center" and patches != 1:
        raise ValueError(f'patches must be 1 with sampler="center", got {patches}')


def choose_images(order: Order, source: Source) -> NDArray[np.int64]:
    """The indices of the images to use.

    Raises:
        ValueError: If the source does not have all of them.
    """
    if order.indices is None:
        return np.arange(len(source), dtype=np.int64)
    chosen = np.asarray(order.indices)
    if chosen.min() < 0 or chosen.max() >= len(source):
        raise ValueError(
            f"indices must be from 0 to {len(source) - 1}, as the source has {len(source)} images, "
            f"got {chosen.min()} to {chosen.max()}"
        )
    return chosen.astype(np.int64)
