"""The figures of docs/scaling.md: `python bench/scaling.py`.

How well batches are mixed over shards (a simulation), what an epoch's order and a tar's index cost
(measured), and what the losses exchange (arithmetic).
"""

from __future__ import annotations

import argparse
import io
import resource
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bagssl_fast._extension import _C
from bagssl_fast.data.order import batch_ends, epoch_rows

Rows = NDArray[np.int64]


def ours(images: int, epoch: int) -> Rows:
    """BagLoader's order of an epoch: one permutation of all images."""
    return epoch_rows(np.arange(images), 0, epoch, shuffle=True)


def buffered(
    images: int, shards: int, ranks: int, batch: int, buffer: int, epoch: int
) -> list[Rows]:
    """Each rank's order where ranks share out whole shards and shuffle within a buffer."""
    random = np.random.default_rng(epoch)
    order = random.permutation(shards).reshape(ranks, -1)
    per_shard = images // shards
    result = []
    for mine in order:
        stream = (mine[:, None] * per_shard + np.arange(per_shard)).reshape(-1)
        held, out = stream[:buffer].copy(), []
        for image in stream[buffer:]:
            at = random.integers(len(held))
            out.append(held[at])
            held[at] = image
        result.append(np.concatenate([np.array(out, np.int64), random.permutation(held)]))
    return result


def mixing(batches: Rows, per_shard: int) -> tuple[float, float]:
    """Of global batches [N, B]: shards in one, and the share of its pairs from one shard."""
    found, pairs = [], []
    for batch in batches:
        counts = np.unique(batch // per_shard, return_counts=True)[1]
        found.append(len(counts))
        pairs.append((counts * (counts - 1)).sum() / (len(batch) * (len(batch) - 1)))
    return float(np.mean(found)), float(np.mean(pairs))


def print_mixing(images: int, shards: int, ranks: int, batch: int) -> None:
    per_shard, per_rank = images // shards, batch // ranks
    print(f"{images} images in {shards} shards, {ranks} ranks, global batch {batch}")
    print("order                  shards in a batch   pairs from one shard")
    rows = ours(images, 0)[: images // batch * batch].reshape(-1, batch)
    table: list[tuple[str, Rows]] = [("one permutation (ours)", rows)]
    for buffer in (1, 1000, 5000):
        parts = buffered(images, shards, ranks, batch, buffer, 0)
        steps = min(map(len, parts)) // per_rank
        whole = [part[: steps * per_rank].reshape(steps, per_rank) for part in parts]
        table.append((f"shards, buffer of {buffer}", np.concatenate(whole, axis=1)))
    for name, batches in table:
        found, pairs = mixing(batches, per_shard)
        print(f"{name:22} {found:17.1f} {pairs:22.4%}")


def measured(work: Callable[[], object]) -> tuple[float, float]:
    """CPU seconds, and megabytes by which the process's peak grew."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begin = time.process_time()
    work()
    seconds = time.process_time() - begin
    return seconds, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def print_order(images: int) -> None:
    indices = np.arange(images)

    def epoch() -> object:
        rows = epoch_rows(indices, 0, 0, shuffle=True)
        return batch_ends(rows, images // 512, 64, 0, 8, drop_last=True)

    seconds, megabytes = measured(epoch)
    print(
        f"order of an epoch of {images} images: {seconds:.2f} CPU s, peak {megabytes:.0f} MB "
        f"beside the {indices.nbytes / 1e6:.0f} MB of indices: "
        f"{megabytes * 2**20 / images:.0f} bytes an image"
    )


def print_index(members: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "shard.tar"
        with tarfile.open(path, "w") as tar:
            for i in range(members):
                entry = tarfile.TarInfo(f"{i // 3:09d}.{('jpg', 'json', 'txt')[i % 3]}")
                entry.size = 1024
                tar.addfile(entry, io.BytesIO(bytes(entry.size)))
        seconds, _ = measured(lambda: _C.index_tar(str(path).encode()))
    print(
        f"index of a tar of {members} members in the page cache: "
        f"{seconds * 1e6 / members:.2f} CPU us each"
    )


def print_traffic(slots: int, batch: int, dim: int, weights: float) -> None:
    """Megabytes that a rank receives per step, ring algorithms, float32."""
    print(f"P {slots}, B {batch} (global), D {dim}, {weights / 1e6:.1f} M weights; MB per rank")
    print("ranks   gradients   gathered z   reduced moments   sigreg, 256 directions")
    for n in (8, 64, 1000):
        part = (n - 1) / n
        gradients = 2 * part * weights * 4
        gathered = 3 * part * slots * batch * dim * 4  # and its gradient, reduced
        moments = 4 * part * slots * (dim * dim + dim) * 4  # and its gradient
        sketch = 4 * part * 2 * 8 * slots * 256 * 4
        row = (gradients, gathered, moments, sketch)
        print(f"{n:5} " + " ".join(f"{value / 1e6:14.1f}" for value in row))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=10_000_000, help="of the order")
    parser.add_argument("--members", type=int, default=30_000, help="of the tar")
    options = parser.parse_args()
    print_mixing(images=200_000, shards=200, ranks=8, batch=512)
    print_order(options.images)
    print_index(options.members)
    print_traffic(slots=2, batch=512, dim=8192, weights=174e6)
    print_traffic(slots=20, batch=1000, dim=1024, weights=25e6)


if __name__ == "__main__":
    main()
