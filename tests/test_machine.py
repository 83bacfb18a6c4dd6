"""machine: what a process of ours takes from the system."""

import os
import subprocess
import sys

import pytest

from bagssl_fast import machine

FAULTS = """
import ctypes, resource, sys
from bagssl_fast import machine
import torch
if sys.argv[1] == "kept":
    machine.keep_freed_memory()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def step():
    before = faults()
    first, second = torch.ones(12 << 20), torch.ones(12 << 20)  # 48 MiB each
    return faults() - before
print(min(step() for _ in range(20)))  # glibc before 2.38 settles after a few
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc only")
def test_a_step_finds_the_memory_that_the_one_before_freed():
    """Guards the 10 to 20% of a CPU step that the first touch of fresh pages costs."""

    def faults(kind: str) -> int:
        command = [sys.executable, "-c", FAULTS, kind]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    if faults("given back") < 1000:
        pytest.skip("this allocator keeps freed memory by itself")
    assert faults("kept") < 1000


@pytest.mark.parametrize(
    ("environment", "level"),
    [({"WORLD_SIZE": "2"}, "ERROR"), ({}, None), ({"WORLD_SIZE": "1"}, None)],
)
def test_processes_are_spared_torchs_stack_frames(monkeypatch, environment, level):
    """When rank 0 was killed the others showed three pages of them before the one line."""
    for name in ("WORLD_SIZE", "TORCH_CPP_LOG_LEVEL"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    monkeypatch.setattr(machine, "keep_freed_memory", lambda: None)
    with monkeypatch.context() as patch:
        patch.delitem(sys.modules, "torch")
        machine.tune_process()
    assert os.environ.pop("TORCH_CPP_LOG_LEVEL", None) == level
