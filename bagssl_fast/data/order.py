"""Which images a batch is made of: pure functions of (seed, epoch) and the rank."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def epoch_rows(
    indices: NDArray[np.int64], seed: int, epoch: int, shuffle: bool
) -> NDArray[np.int64]:
    """The indices in an epoch's order.

    Sorting by the raw bits of a counter-based generator gives the same order with every version of
    numpy, which a Generator's `permutation` does not promise.
    """
    if not shuffle:
        return indices
    # As uint64: of a list with an entry from 2^63 on, numpy would make rounded floats.
    key = np.array([seed, epoch], np.uint64)
    keys = np.random.Philox(key=key).random_raw(len(indices))
    return indices[np.argsort(keys, kind="stable")]


def num_batches(images: int, global_batch: int, drop_last: bool) -> int:
    """Batches of an epoch."""
    return images // global_batch if drop_last else -(-images // global_batch)


def batch_ends(
    rows: NDArray[np.int64],
    batches: int,
    batch_size: int,
    rank: int,
    world_size: int,
    drop_last: bool,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """A rank's rows of every global batch, one after the other, and where each batch ends.

    Global batch b is rows [b * G, (b + 1) * G), G = batch_size * world_size, and the ranks' parts
    follow each other in it. A last batch that is not full is divided as evenly as possible, so that
    every rank makes the same number of steps.
    """
    whole = len(rows) // (batch_size * world_size)
    full = rows[: whole * batch_size * world_size].reshape(whole, world_size, batch_size)
    mine = full[:, rank].reshape(-1)
    ends = batch_size * np.arange(1, whole + 1, dtype=np.int64)
    if batches > whole and not drop_last:
        rest = rows[whole * batch_size * world_size :]
        begin, end = len(rest) * rank // world_size, len(rest) * (rank + 1) // world_size
        mine = np.concatenate([mine, rest[begin:end]])
        ends = np.append(ends, len(mine))
    return np.ascontiguousarray(mine), ends
