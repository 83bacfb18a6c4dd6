"""Device time of every kernel at the recipes' shapes, against measured peaks."""

from __future__ import annotations

import time
from typing import Any

import torch

from harness.kernel_cases import (
    CASES,
    Case,
    bag_pool_case,
    block_case,
    embed_case,
    lars_case,
    tcr_case,
    vicreg_case,
    view_case,
)

TOY = [
    bag_pool_case(2, 2, 8),
    vicreg_case(2, 4, 6),
    tcr_case(2, 4, 6),
    block_case(6, 4),
    lars_case(False, 40, 3),
    embed_case(2, 6, 2, 4, 5),
    view_case(8, False, 16, 1, num_slots=1, batch=2),
]
REPEATS = 5


def kernel_cases(toy: bool) -> list[Case]:
    return TOY if toy else CASES


def device_times(case: Case, dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """Milliseconds by kernel name, over all its launches of one run of the case."""

    def make(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        if dtype.is_floating_point:
            return torch.rand(shape, device=device).to(dtype)
        return torch.zeros(shape, dtype=dtype, device=device)

    if device.type != "cuda":
        case.launch(make, dtype)
        return {}
    from torch.profiler import ProfilerActivity, profile

    for _ in range(2):
        case.launch(make, dtype)
    torch.cuda.synchronize(device)
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(REPEATS):
            case.launch(make, dtype)
        torch.cuda.synchronize(device)
    return {e.key: e.self_device_time_total / 1e3 / REPEATS for e in profiler.key_averages()}


def kernel_rows(
    case: Case, dtype: torch.dtype, device: torch.device, bandwidth: float, flops: float
) -> list[dict[str, Any]]:
    """A row per pass: milliseconds, and the share of the copy's bandwidth or the GEMM's rate.

    The share of an elementwise pass is that of the fewest bytes it could move.
    """
    begin = time.perf_counter()
    times = device_times(case, dtype, device)
    whole = (time.perf_counter() - begin) * 1e3
    rows = []
    for part in case.passes(dtype):
        ms = sum(times.get(name, 0.0) for name in part.kernels) if times else whole
        seconds = max(ms, 1e-9) / 1e3
        shares = part.fewest / seconds / bandwidth, part.flops / seconds / flops
        rows.append(
            {
                "op": case.op,
                "case": case.label,
                "pass": part.name,
                "dtype": str(dtype).removeprefix("torch."),
                "ms": ms,
                "share_of_copy": round(shares[0], 4),
                "share_of_gemm": round(shares[1], 4),
                "bound": "copy" if part.floor is not None else "gemm",
            }
        )
    return rows
