"""Compiles kernels for GPUs that are not present, and counts their loads and stores in Python.

`compile_case` launches a case on meta tensors while the driver pretends to be the target's: every
launch is compiled exactly as it would be there, and its binary is disassembled. `count_case` runs a
case in Triton's interpreter (a process with TRITON_INTERPRET=1) and adds up the bytes of all
unmasked loads and stores; of large grids an evenly spread sample of programs runs,
and the count is scaled up.
"""

from __future__ import annotations

import inspect
import re
import subprocess
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget

from harness.kernel_cases import Case

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
SAMPLE = 24  # programs of a grid that are run to count


class Target(NamedTuple):
    """A GPU as far as occupancy is concerned."""

    gpu: GPUTarget
    shared_limit: int  # bytes a block may have
    shared_per_sm: int
    shared_reserved: int  # bytes the system takes per block
    max_warps: int  # per SM (CU)


TARGETS: dict[str, Target] = {
    "sm_80": Target(GPUTarget("cuda", 80, 32), 163 << 10, 164 << 10, 1024, 64),
    "sm_90": Target(GPUTarget("cuda", 90, 32), 227 << 10, 228 << 10, 1024, 64),
    "sm_100": Target(GPUTarget("cuda", 100, 32), 227 << 10, 228 << 10, 1024, 64),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), 64 << 10, 64 << 10, 0, 32),
}


class _Driver:
    """Stands in for a GPU's driver while its code is compiled."""

    def __init__(self, gpu: GPUTarget) -> None:
        self.gpu = gpu

    def get_current_target(self) -> GPUTarget:
        return self.gpu

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def compile_case(case: Case, target: str, dtype: torch.dtype) -> list[dict[str, Any]]:
    """One row per distinct kernel of the case."""
    from bagssl_fast.kernels import _common
    from triton.runtime.jit import JITFunction

    gpu = TARGETS[target].gpu
    compiled: dict[str, Any] = {}
    original = JITFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        self.device_caches.clear()
        kernel = original(self, *args, grid=grid, warmup=True, **kwargs)
        compiled.setdefault(kernel.hash, (self.fn.__name__, grid, kernel))
        return kernel

    triton.runtime.driver.set_active(_Driver(gpu))
    JITFunction.run = run
    _common.IS_HIP = gpu.backend == "hip"
    try:
        case.launch(meta, dtype)
    finally:
        JITFunction.run = original
        _common.IS_HIP = bool(torch.version.hip)
    name = str(dtype).removeprefix("torch.")
    return [
        {"op": case.op, "case": case.label, "kernel": kernel_name, "target": target, "dtype": name,
         "grid": list(grid), **resources(kernel, target)}
        for kernel_name, grid, kernel in compiled.values()
    ]  # fmt: skip


def resources(kernel: Any, target: str) -> dict[str, Any]:
    """Registers, spills, shared memory, occupancy and matrix instructions of a binary."""
    spec = TARGETS[target]
    shared, warps = kernel.metadata.shared, kernel.metadata.num_warps
    read = _read_cubin if spec.gpu.backend == "cuda" else _read_gcn
    registers, spills, scalar_spills, matrix = read(kernel)
    blocks = spec.shared_per_sm // (shared + spec.shared_reserved or 1)
    if spec.gpu.backend == "cuda":
        per_warp = -(-registers * 32 // 256) * 256
        blocks = min(blocks, 65536 // (per_warp * warps), spec.max_warps // warps, 32)
    else:
        # Four SIMDs of 512 vector registers per lane, at most 8 waves each.
        waves = min(8, 512 // (-(-registers // 8) * 8))
        blocks = min(blocks, 4 * waves // warps)
    return {
        "warps": warps,
        "registers": registers,
        "spills": spills,
        "scalar_spills": scalar_spills,
        "shared": shared,
        "shared_limit": spec.shared_limit,
        "occupancy": round(blocks * warps / spec.max_warps, 3),
        "has_dot": "tt.dot" in kernel.asm["ttir"],
        "matrix_instructions": matrix,
    }


def _read_cubin(kernel: Any) -> tuple[int, int, int, dict[str, int]]:
    """Registers, instructions on local memory, 0, matrix instructions by name."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
        code = _tool("nvdisasm", "-c", file.name)
    registers = int(re.search(r"REG:(\d+)", usage)[1])
    spills = len(re.findall(r"\b(?:STL|LDL)\b", code))
    names = re.findall(r"\b((?:HMMA|IMMA|DMMA|HGMMA|QGMMA|UTC\w*MMA)[\w.]*)", code)
    return registers, spills, 0, _counted(name.split(".")[0] for name in names)


def _read_gcn(kernel: Any) -> tuple[int, int, int, dict[str, int]]:
    """Vector registers, those spilled to memory, scalar ones spilled, matrix instructions by name.

    Scalar registers spill into lanes of vector registers, not into memory.
    """
    code = kernel.asm["amdgcn"]

    def field(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", code)[1])

    names = re.findall(r"\b(v_mfma_\w+)", code)
    spills = field("vgpr_spill_count"), field("sgpr_spill_count")
    return field("vgpr_count"), *spills, _counted(names)


def _counted(names: Any) -> dict[str, int]:
    counts: dict[str, int] = defaultdict(int)
    for name in names:
        counts[name] += 1
    return dict(counts)


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / name, *arguments], capture_output=True, text=True).stdout


# ------------------------------------------------------------------------------------- counting


def data(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Tensors to run on; their values do not affect the addresses."""
    return torch.zeros(shape, dtype=dtype)


class Count(NamedTuple):
    """Bytes that a kernel loads and stores.

    Args:
        memory: Of tensors.
        scratch: Of its `scratch_ptr`, which remains in the cache.
        exact: Whether all programs ran.
    """

    memory: float
    scratch: float
    exact: bool


def count_case(case: Case, dtype: torch.dtype) -> dict[str, Count]:
    """Bytes by kernel name, over all its launches in the case."""
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    load, store, call = (
        builder.create_masked_load,
        builder.create_masked_store,
        interpreter.GridExecutor.__call__,
    )
    running = {"memory": 0, "scratch": 0}
    scratch = [0, 0]  # first and end address
    totals: dict[str, Count] = {}

    def count(ptrs: Any, mask: Any) -> None:
        inside = mask.data & (ptrs.data >= scratch[0]) & (ptrs.data < scratch[1])
        size = max(ptrs.get_element_ty().primitive_bitwidth // 8, 1)
        running["scratch"] += int(np.count_nonzero(inside)) * size
        running["memory"] += int(np.count_nonzero(mask.data & ~inside)) * size

    def counted_load(self: Any, ptrs: Any, mask: Any, *rest: Any) -> Any:
        count(ptrs, mask)
        return load(self, ptrs, mask, *rest)

    def counted_store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        count(ptrs, mask)
        return store(self, ptrs, value, mask, *rest)

    def counted_call(self: Any, *args: Any, **kwargs: Any) -> None:
        running.update(memory=0, scratch=0)
        buffer = kwargs.get("scratch_ptr", torch.empty(0))
        scratch[:] = buffer.data_ptr(), buffer.data_ptr() + buffer.nbytes
        scale = _run_sample(interpreter, self, *args, **kwargs)
        name = self.fn.__name__
        before = totals.get(name, Count(0, 0, True))
        totals[name] = Count(
            before.memory + running["memory"] * scale,
            before.scratch + running["scratch"] * scale,
            before.exact and scale == 1,
        )

    builder.create_masked_load, builder.create_masked_store = counted_load, counted_store
    interpreter.GridExecutor.__call__ = counted_call
    try:
        (case.count or case.launch)(data, dtype)
    finally:
        builder.create_masked_load, builder.create_masked_store = load, store
        interpreter.GridExecutor.__call__ = call
    return totals


def _run_sample(interpreter: Any, executor: Any, *args_dev: Any, **kwargs: Any) -> float:
    """Runs some programs of a grid as the interpreter runs all; programs / programs run."""
    names = inspect.getfullargspec(executor.fn).args
    kwargs = {name: value for name, value in kwargs.items() if name in names}
    args_host, kwargs_host = executor._init_args_hst(args_dev, kwargs)
    scope = interpreter._patch_lang(executor.fn)
    try:
        args = inspect.getcallargs(executor.fn, *args_host, **kwargs_host)
        args = {
            name: value if name in executor.constexprs else interpreter._implicit_cvt(value)
            for name, value in args.items()
        }
        grid = (*executor.grid, 1, 1)[:3]
        total = int(np.prod(grid))
        chosen = range(total)
        if total > 2 * SAMPLE and executor.fn.__name__ != "_large_views_kernel":
            chosen = np.unique(np.linspace(0, total - 1, SAMPLE).astype(int)).tolist()
        interpreter.interpreter_builder.set_grid_dim(*grid)
        for index in chosen:
            x, y, z = np.unravel_index(index, grid)
            interpreter.interpreter_builder.set_grid_idx(int(x), int(y), int(z))
            executor.fn(**args)
    finally:
        scope.restore()
    return total / len(chosen)
