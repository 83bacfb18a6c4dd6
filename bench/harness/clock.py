"""The time of each phase of a step: laps between marks, on the host's clock or the GPU's.

Each lap ends where the next one begins, so that the laps of a step add up to the step. On a GPU a
mark is an event in the stream: nothing waits for it until the laps are read, and the time in which
the GPU waits for data is part of the lap in which that happens.
"""

from __future__ import annotations

import time
from typing import Any, Protocol

import torch

PHASES = ("data wait", "encode", "loss", "backward", "optimizer")


class Clock(Protocol):
    """Marks moments; the seconds between two of them can be read after `synchronize`."""

    def mark(self) -> Any: ...

    def seconds(self, begin: Any, end: Any) -> float: ...

    def synchronize(self) -> None: ...


class HostClock:
    """The host's clock: work on the CPU has ended when the call returns."""

    def mark(self) -> float:
        return time.perf_counter()

    def seconds(self, begin: float, end: float) -> float:
        return end - begin

    def synchronize(self) -> None:
        pass


class CudaClock:
    """Events in the current stream.

    Args:
        cuda: `torch.cuda`, or a replacement in tests.
    """

    def __init__(self, cuda: Any = torch.cuda) -> None:
        self.cuda = cuda

    def mark(self) -> Any:
        event = self.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, begin: Any, end: Any) -> float:
        return begin.elapsed_time(end) / 1e3

    def synchronize(self) -> None:
        self.cuda.synchronize()


def clock(device: str) -> Clock:
    """The clock for a device."""
    return CudaClock() if torch.device(device).type == "cuda" else HostClock()


class Laps:
    """The laps of some steps: `start()`, then `lap(phase)` at the end of each phase."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self._laps: list[tuple[str, Any, Any]] = []
        self._last: Any = None

    def start(self) -> None:
        self.clock.synchronize()
        self._laps = []
        self._last = self.clock.mark()

    def lap(self, phase: str) -> None:
        now = self.clock.mark()
        self._laps.append((phase, self._last, now))
        self._last = now

    def seconds(self) -> dict[str, float]:
        """Seconds per phase since `start`; they add up to the time from there to the last lap."""
        self.clock.synchronize()
        total = dict.fromkeys(PHASES, 0.0)
        for phase, begin, end in self._laps:
            total[phase] = total.get(phase, 0.0) + self.clock.seconds(begin, end)
        return total
