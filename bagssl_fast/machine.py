"""The machine and what is installed on it. Every run keeps this as env.json."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

PACKAGES = (
    "torch triton numpy pillow simplejpeg safetensors jsonargparse torchvision timm scikit-image "
    "matplotlib tensorboard"
)


def report() -> dict[str, Any]:
    """Versions, machine and settings that decide what a run does and how fast."""
    import torch

    import bagssl_fast

    return {
        "bagssl_fast": bagssl_fast.__version__,
        "git": git_sha(Path(__file__).resolve().parent),
        **_extension(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES.split()},
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "instruction_set": instruction_set(cpu_flags()),
        "cores": cores(),
        "memory_gb": _memory_gb(),
        "cuda": torch.version.cuda,
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "torch_threads": torch.get_num_threads(),
        "variables": {
            name: os.environ[name]
            for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "CUDA_VISIBLE_DEVICES", "WORLD_SIZE")
            if name in os.environ
        },
        "argv": sys.argv,
    }


def tune_process() -> None:
    """Sets what torch and the C library take from the process; call it before torch is imported.

    Threads of OpenMP that wait for work sleep instead of spinning: the loader needs the cores.
    OpenMP reads that once, when torch loads it. Of a process that left, torch's C++ tells the
    others by pages of stack frames: we say it in one line.
    """
    if "torch" not in sys.modules:
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    keep_freed_memory()


def keep_freed_memory() -> None:
    """Lets the C library keep freed memory for the next step instead of returning it to the system.

    Otherwise a step's large activations are mapped, cleared page by page at the first touch and
    unmapped again: 10 to 20% of a fused PatchNet step on a CPU. In return the process stays as
    large as its largest step. Without glibc's malloc (macOS, musl, jemalloc) it does nothing.
    """
    trim_threshold, mmap_max = -1, -4  # of malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, TypeError, AttributeError):
        return
    mallopt(trim_threshold, -1)  # never
    mallopt(mmap_max, 0)  # no allocation has a mapping of its own


def cores() -> int:
    """CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def git_sha(folder: Path) -> str | None:
    """Commit of the checkout that `folder` lies in, with + for local changes; None outside one."""
    try:
        command = ["git", "-C", str(folder), "describe", "--always", "--abbrev=12", "--dirty=+"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def cpu_name() -> str:
    """The processor's model as the system names it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def cpu_flags() -> frozenset[str]:
    """The processor's features as Linux names them; empty where the system does not tell."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):  # x86-64, arm64
                return frozenset(line.partition(":")[2].split())
    except OSError:
        pass
    return frozenset()


def computes_bf16(flags: frozenset[str]) -> bool:
    """Whether the processor itself multiplies bfloat16; without that, torch emulates it."""
    return not flags.isdisjoint({"avx512_bf16", "amx_bf16", "bf16"})


def instruction_set(flags: frozenset[str]) -> str:
    """The widest vector instructions among a processor's features, such as "AVX-512 with bf16"."""
    names = {"avx512bw": "AVX-512", "avx2": "AVX2", "sse2": "SSE2", "asimd": "NEON"}
    widest = next((name for flag, name in names.items() if flag in flags), "unknown vectors")
    widest += " with bf16" if computes_bf16(flags) else ""
    return f"{widest} and AMX" if "amx_bf16" in flags else widest


def _extension() -> dict[str, str | None]:
    try:
        from bagssl_fast._extension import _C
    except ImportError as error:
        return {"extension": f"not built ({error})", "simd": None}
    return {"extension": Path(str(_C.__file__)).name, "simd": _C.simd_level()}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _memory_gb() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError):
        return None
