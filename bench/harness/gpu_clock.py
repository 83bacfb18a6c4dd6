"""Time on a device, and the peaks that times are compared with."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch

FLUSH = 256 << 20  # bytes written before each call, so that no operand is in the cache


def milliseconds(
    call: Callable[[], object], device: torch.device, seconds: float, flush: bool = False
) -> float:
    """Median time of a call: by events on a GPU, warm; by the host's clock elsewhere.

    Args:
        call: What to time.
        device: Where it runs.
        seconds: About how long to repeat it, at least three times.
        flush: Empty the second-level cache before each call.
    """
    if device.type != "cuda":
        begin = time.perf_counter()
        call()
        return (time.perf_counter() - begin) * 1e3
    scratch = torch.empty(FLUSH if flush else 0, dtype=torch.uint8, device=device)
    for _ in range(2):
        call()
    torch.cuda.synchronize(device)
    times, begin = [], time.perf_counter()
    while len(times) < 3 or (time.perf_counter() - begin < seconds and len(times) < 200):
        scratch.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return median(times)


def copy_peak(device: torch.device, megabytes: int) -> float:
    """Bytes read and written per second by a large copy."""
    source = torch.ones(megabytes << 20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    ms = milliseconds(lambda: target.copy_(source), device, 0.5)
    return 2 * source.nbytes / ms * 1e3


def gemm_peak(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """FLOP per second of a large square product."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    ms = milliseconds(lambda: a @ b, device, 0.5)
    return 2.0 * size**3 / ms * 1e3
