"""The peak memory of one call, measured in a fresh process."""

from __future__ import annotations

import ctypes
import multiprocessing
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def peak_memory(build: Callable[..., Callable[[], Any]], *args: Any) -> float:
    """Peak memory of a call in a fresh process, in MiB above the memory before it.

    Args:
        build: A top-level function of the bench; `build(*args)` sets up and returns the call.
        *args: Must be picklable.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_peak_memory_child, args=(sender, build, args))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        raise RuntimeError(f"peak_memory: {build.__name__}{args} failed, see above") from None
    finally:
        process.join()


def _peak_memory_child(sender: Any, build: Callable[..., Callable[[], Any]], args: tuple) -> None:
    sender.send(peak_here(build(*args)))


def peak_here(call: Callable[[], Any]) -> float:
    """Peak memory of a call in this process, in MiB above the memory before it.

    Memory that earlier calls left in the allocator would hide part of it: glibc frees it first.
    """
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")

    def resident(key: str) -> float:
        if not status.exists():  # not Linux: the peak since the process began, in bytes
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        lines = (line.split() for line in status.read_text().splitlines())
        return next(int(words[1]) / 1024 for words in lines if words[0] == key)

    if sys.platform == "linux":
        getattr(ctypes.CDLL(None), "malloc_trim", lambda _: None)(0)
    if reset.exists():
        reset.write_text("5")  # resets the peak (VmHWM) to the current resident size
    before = resident("VmRSS:")
    call()
    return resident("VmHWM:") - before
