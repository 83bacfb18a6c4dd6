"""What the loader baselines share: a job, a provider that does it, and the process that runs it.

A provider is named by a string, "module:function", so that it can be opened in this process or
in a worker of another Python (optional peers often need an environment of their own). The
function takes a `Job` and returns a callable; each call of that is one pass over the files and
yields batches, float32 tensors whose last dimensions are [3, h, w] in whatever memory format.
"""

from __future__ import annotations

import importlib
import math
import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

BENCH = Path(__file__).resolve().parent.parent
if str(BENCH) not in sys.path:  # a worker's search path starts in this folder
    sys.path.insert(0, str(BENCH))

from harness.common import Timing, cpu_seconds  # noqa: E402


@dataclass(frozen=True)
class Job:
    """The same work for every provider: files, augmentation, number of patches."""

    folder: str  # the JPEG files, class folders in it
    tar: str  # the same files in a tar
    augment: Any  # the fields of bagssl_fast's Augment, as attributes
    patches: int
    batch_size: int
    threads: int = 1
    inline: bool = False  # DataLoader: no worker process, to count CPU time in one place

    def files(self) -> list[str]:
        return sorted(str(path) for path in Path(self.folder).glob("*/*"))


@dataclass(frozen=True)
class Stats:
    """The result of one pass, to compare providers: means over patches, and their errors."""

    patches: int
    shape: tuple[int, ...]
    dtype: str
    mean: float
    mean_error: float
    std: float
    std_error: float


class Runner:
    """A provider opened in this process."""

    def __init__(self, provider: str | Callable, job: Job) -> None:
        if isinstance(provider, str):
            module, function = provider.split(":")
            provider = getattr(importlib.import_module(module), function)
        opened = provider(job)
        self.batches: Callable[[], Iterator[Any]] = opened
        # A pipeline that works ahead between rounds returns those batches first.
        self.drain: Callable[[], None] = getattr(opened, "drain", lambda: None)
        self.patches = len(job.files()) * job.patches

    def run(self) -> Timing:
        """Seconds per patch of one pass."""
        self.drain()
        cpu, wall = cpu_seconds(), time.perf_counter()
        for _ in self.batches():
            pass
        wall, cpu = time.perf_counter() - wall, cpu_seconds() - cpu
        return Timing(wall / self.patches, cpu / self.patches)

    def check(self) -> Stats:
        """The shape of the patches and the statistics of their pixels over one pass."""
        import torch

        means, stds = [], []
        self.drain()
        for batch in self.batches():
            pixels = batch.reshape(-1, math.prod(batch.shape[-3:])).float()
            means.append(pixels.mean(1))
            stds.append(pixels.std(1))
        mean, std = torch.cat(means), torch.cat(stds)
        root = len(mean) ** 0.5
        return Stats(
            patches=len(mean),
            shape=tuple(batch.shape[-3:]),
            dtype=str(batch.dtype),
            mean=float(mean.mean()),
            mean_error=float(mean.std()) / root,
            std=float(std.mean()),
            std_error=float(std.std()) / root,
        )

    def close(self) -> None:
        self.batches = self.drain = lambda: iter(())


class RemoteRunner:
    """A provider opened in a worker process of another Python; the same methods as `Runner`."""

    def __init__(self, python: str, provider: str, job: Job) -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(
            [python, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log
        )
        # The other Python may not have our package: plain attributes instead of our record.
        self._ask((provider, replace(job, augment=SimpleNamespace(**vars(job.augment)))))

    def _ask(self, message: Any) -> Any:
        assert self._process.stdin and self._process.stdout
        pickle.dump(message, self._process.stdin)
        self._process.stdin.flush()
        try:
            answer = pickle.load(self._process.stdout)
        except EOFError:
            self._log.seek(0)
            log = self._log.read().decode(errors="replace")
            raise RuntimeError(f"the worker process of a peer ended:\n{log[-4000:]}") from None
        if isinstance(answer, ImportError):
            raise answer
        return answer

    def run(self) -> Timing:
        return Timing(*self._ask("run"))

    def check(self) -> Stats:
        return Stats(**self._ask("check"))

    def close(self) -> None:
        if self._process.stdin:
            self._process.stdin.close()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
        self._log.close()


def serve() -> None:
    """The worker: opens the requested provider, then runs or checks it until its input ends."""
    inbox = sys.stdin.buffer
    # Output of libraries goes to stderr: stdout carries the answers.
    outbox = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    runner: Runner | None = None
    while True:
        try:
            message = pickle.load(inbox)
        except EOFError:
            os._exit(0)  # immediately: some libraries' threads never end
        try:
            if runner is None:
                runner = Runner(*message)
                answer: Any = True
            else:
                answer = tuple(runner.run()) if message == "run" else vars(runner.check())
        except ImportError as error:
            answer = ImportError(str(error))
        pickle.dump(answer, outbox)
        outbox.flush()


if __name__ == "__main__":
    from baselines import loader  # pickled classes refer to this module by its import path

    loader.serve()
