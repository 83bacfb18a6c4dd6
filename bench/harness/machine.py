"""The machine line of every bench row: hardware and versions."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path

from bagssl_fast.machine import cpu_flags, instruction_set

ROOT = Path(__file__).resolve().parents[2]


def cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def version(package: str) -> str | None:
    """The installed version of a package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def machine_line(threads: int | None = None) -> str:
    """CPU with its instruction set, GPU, threads, versions, git revision (`+dirty`: changed)."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].split(":", 1)[1].strip() if names else cpu
    parts = [f"{cpu} ({cores()} cores)", instruction_set(cpu_flags())]
    if level := os.environ.get("BAGSSL_SIMD"):
        parts.append(f"ours held to {level}")
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        parts.append(torch.cuda.get_device_name())
    if threads is not None:
        parts.append(f"{threads} thread{'s' if threads != 1 else ''}")
    parts.append(f"python {platform.python_version()}")
    parts += [f"{name} {version(name)}" for name in ("torch", "triton") if version(name)]

    def git(*words: str) -> str | None:
        command = ["git", "-C", str(ROOT), *words]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else None

    try:
        revision = git("rev-parse", "--short=10", "HEAD")
        dirty = bool(git("status", "--porcelain", "--untracked-files=no"))
    except OSError:  # no git here
        revision, dirty = None, False
    parts.append(f"git {revision or 'unknown'}{'+dirty' if dirty else ''}")
    return ", ".join(parts)
