"""Kernels in Triton's interpreter, on CPU tensors, in float32 and float16 (its bfloat16 is wrong).

The interpreter is chosen when triton is imported, so these files run in a process of their own,
which `tests/test_kernels.py` starts; elsewhere they are not collected.
"""

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not INTERPRETED:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uninitialized memory is NaN (or 0xAA): what a kernel forgets to write is seen."""

    def poison(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def empty(*args: Any, **kwargs: Any) -> torch.Tensor:
            x = allocate(*args, **kwargs)
            if x.device.type == "meta":
                return x
            return x.fill_(
                torch.nan if x.is_floating_point() else 0xAA if x.dtype == torch.uint8 else -1
            )

        return empty

    monkeypatch.setattr(torch, "empty", poison(torch.empty))
    monkeypatch.setattr(torch.Tensor, "new_empty", poison(torch.Tensor.new_empty))


@pytest.fixture(autouse=True)
def fused_multiply_add(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A GPU's multiply-add rounds once; the interpreter's rounds twice."""
    if not INTERPRETED:
        yield
        return
    import numpy as np
    from triton.runtime import interpreter

    def create_fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        exact = x.data.astype(np.float64) * y.data + z.data
        return interpreter.TensorHandle(exact.astype(z.data.dtype), z.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_fma", create_fma)
    yield
