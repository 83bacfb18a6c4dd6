# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""What every kernel file needs from its surroundings: guards, facts about the device, checks.

To copy a kernel file elsewhere, copy this file and `_tuning.py` with it; both import torch and
triton only.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import torch
import triton

from ._tuning import Tile

# Read when triton is imported: with TRITON_INTERPRET=1 kernels run in Python on CPU tensors.
INTERPRET: bool = bool(triton.knobs.runtime.interpret)

IS_HIP: bool = bool(torch.version.hip)

FLOATS = (torch.float32, torch.bfloat16, torch.float16)

_INTERPRETER_SMS = 2  # enough to make the split paths run, few enough to stay quick


def device_guard(x: torch.Tensor) -> AbstractContextManager[Any]:
    """Makes x's GPU the current one: Triton launches on the current device, not on the tensor's."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


@lru_cache
def sm_count(device: torch.device) -> int:
    """Streaming multiprocessors of the device; a fixed number where there is no device."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return _INTERPRETER_SMS if device.type == "cpu" else 132


def dot_precision(dtype: torch.dtype) -> str:
    """How `tl.dot` treats float32 operands: exact to rounding, on tensor cores where they can.

    NVIDIA: three TF32 products give float32's accuracy at a third of TF32's rate. AMD's matrix
    cores multiply float32 as it is. 16-bit operands ignore the setting.
    """
    if dtype != torch.float32:
        return "tf32"
    return "ieee" if IS_HIP else "tf32x3"


def warp_lanes() -> int:
    """Threads of a warp; AMD's waves have 64."""
    return 64 if IS_HIP else 32


def launch_options(num_warps: int, num_stages: int = 3) -> dict[str, int]:
    """Options of a launch.

    On NVIDIA with an explicit register limit, all that so many threads can have: without it the
    compiler for sm_100 spills a few registers to fit more blocks on a processor.
    """
    options = {"num_warps": num_warps, "num_stages": num_stages}
    if not IS_HIP:
        options["maxnreg"] = min(65536 // (32 * num_warps), 255)
    return options


def product_options(tile: Tile) -> dict[str, int]:
    """Options of a product's launch; three stages take more than AMD's 64 KiB of shared memory."""
    return launch_options(tile.num_warps, min(tile.num_stages, 2) if IS_HIP else tile.num_stages)


def refuse(op: str, came: str, supported: str) -> ValueError:
    """The one form of error for bad input: the op, what it got, what is supported, the fix."""
    return ValueError(
        f"{op}: got {came}; the Triton kernel supports {supported}. "
        'Use impl="reference" for anything else.'
    )


def check_tensors(op: str, dtypes: Sequence[torch.dtype] = FLOATS, **tensors: torch.Tensor) -> None:
    """Checks dtype and device of named tensors, which must share one device."""
    first_name, first = next(iter(tensors.items()))
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            raise refuse(op, f"{name} of type {type(tensor).__name__}", "tensors")
        if tensor.dtype not in dtypes:
            names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            raise refuse(op, f"{name} of dtype {tensor.dtype}", names)
        if tensor.device != first.device:
            raise refuse(
                op,
                f"{first_name} on {first.device} and {name} on {tensor.device}",
                "tensors on one device",
            )
        if INTERPRET and tensor.dtype == torch.bfloat16:
            raise refuse(
                op,
                f"{name} of dtype bfloat16 under TRITON_INTERPRET=1, whose bfloat16 is wrong",
                "float32 and float16 there",
            )
    if first.device.type != "cuda" and not (INTERPRET and first.device.type == "cpu"):
        raise refuse(op, f"{first_name} on {first.device}", "CUDA and ROCm tensors")


def check_rank(op: str, rank: int, shape: str, **tensors: torch.Tensor) -> None:
    """Checks the number of dimensions of named tensors."""
    for name, tensor in tensors.items():
        if tensor.dim() != rank:
            raise refuse(op, f"{name} of shape {list(tensor.shape)}", f"{name} {shape}")
