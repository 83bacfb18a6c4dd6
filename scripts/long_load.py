"""The loader under long load: what it holds must not grow.

Four loads, each over a small set of JPEG and PNG files: loaders that are opened and dropped midway;
epochs; more threads than cores with a consumer that is slow, one that comes in bursts and one that
vanishes. After a tenth of each load, and at its end, the threads, the open descriptors and the
resident memory of the process are counted.

    python scripts/long_load.py                    # 1,000 loaders, 1,000 epochs: a few minutes
    python scripts/long_load.py --loaders 50 --epochs 50 --bursts 20

It prints a row of a table for each load (docs/reliability.md has one); the exit code is 1 if
anything grew.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from bagssl_fast.augment import Augment
from bagssl_fast.data import BagLoader, Decoding, Output, Source, Threads, open_source

MEMORY_MARGIN = 8 << 20  # bytes that an allocator may add


@dataclass(frozen=True)
class Use:
    """What the process holds."""

    threads: int
    descriptors: int
    memory: int

    @classmethod
    def now(cls) -> Use:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what is free is not held
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return cls(
            len(os.listdir("/proc/self/task")),
            len(os.listdir("/proc/self/fd")),
            pages * os.sysconf("SC_PAGE_SIZE"),
        )


@dataclass(frozen=True)
class Result:
    """A load and what it held after a tenth of it and at its end."""

    name: str
    rounds: int
    batches: int
    first: Use
    last: Use

    def is_flat(self) -> bool:
        return (
            self.last.threads <= self.first.threads
            and self.last.descriptors <= self.first.descriptors
            and self.last.memory - self.first.memory <= MEMORY_MARGIN
        )

    def row(self) -> str:
        first, last = self.first, self.last
        return (
            f"| {self.name} | {self.rounds:,} | {self.batches:,} "
            f"| {first.threads} → {last.threads} | {first.descriptors} → {last.descriptors} "
            f"| {first.memory / 2**20:.1f} → {last.memory / 2**20:.1f} |"
        )


def write_files(folder: Path, count: int = 48) -> Path:
    """Small JPEGs and PNGs, and one file that cannot be decoded."""
    rng = np.random.default_rng(0)
    for i in range(count):
        pixels = rng.integers(0, 256, (40 + i % 7, 60, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:03d}.{'png' if i % 8 == 7 else 'jpg'}")
    (folder / "bad.jpg").write_bytes(b"\xff\xd8\xff no image")
    return folder


def make(source: Source, threads: int, views: str = "host") -> BagLoader:
    return BagLoader(
        source,
        batch_size=4,
        patches=3,
        augment=Augment(size=16),
        output=Output(views=views),
        decoding=Decoding(on_error="skip"),
        threads=Threads(threads),
    )


def repeat(name: str, rounds: int, work: Callable[[int], int]) -> Result:
    """Runs `work(round)`, which returns its batches, and looks at what is held."""
    batches, first = 0, Use.now()
    for number in range(rounds):
        batches += work(number)
        if number + 1 == max(1, rounds // 10):
            first = Use.now()
    result = Result(name, rounds, batches, first, Use.now())
    print(result.row(), flush=True)
    return result


def drop_midway(folder: Path, rounds: int) -> Result:
    def work(number: int) -> int:
        loader = make(open_source(folder), 2, ("host", "device")[number % 2])
        iterator = iter(loader)
        taken = number % 5
        for _ in range(taken):
            next(iterator)
        return taken

    return repeat("loaders dropped midway", rounds, work)


def many_epochs(folder: Path, rounds: int) -> Result:
    with make(open_source(folder), 2) as loader:
        return repeat("epochs of one loader", rounds, lambda number: sum(1 for _ in loader))


def consume(folder: Path, rounds: int, threads: int, kind: str) -> Result:
    """One loader of many threads, and what its consumer is like."""
    rng = np.random.default_rng(0)
    with make(open_source(folder), threads) as loader:

        def work(number: int) -> int:
            taken = 0
            for batch in loader:
                taken += len(batch.index) > 0
                if kind == "slow":
                    time.sleep(0.002)
                elif kind == "bursty" and rng.random() < 0.1:
                    time.sleep(0.05)
                elif kind == "vanishing" and rng.random() < 0.2:
                    break
            return taken

        return repeat(f"{threads} threads, {kind} consumer", rounds, work)


def run(loaders: int, epochs: int, bursts: int, threads: int) -> list[Result]:
    with tempfile.TemporaryDirectory() as name:
        folder = write_files(Path(name))
        many_epochs(folder, 10)  # what is loaded once is loaded before anything is counted
        results = [drop_midway(folder, loaders), many_epochs(folder, epochs)]
        for kind in ("slow", "bursty", "vanishing"):
            results.append(consume(folder, bursts, threads, kind))
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--loaders", type=int, default=1000)
    parser.add_argument("--epochs", type=int, default=1000)
    parser.add_argument("--bursts", type=int, default=300, help="epochs of each kind of consumer")
    parser.add_argument("--threads", type=int, default=8)
    options = parser.parse_args()
    print(
        "| load | rounds | batches | threads | descriptors | memory, MiB |\n"
        "|---|---|---|---|---|---|"
    )
    grown = [
        result.name
        for result in run(options.loaders, options.epochs, options.bursts, options.threads)
        if not result.is_flat()
    ]
    if grown:
        print(f"grew: {', '.join(grown)}", file=sys.stderr)
    return 1 if grown else 0


if __name__ == "__main__":
    raise SystemExit(main())
