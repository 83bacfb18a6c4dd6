"""Kernels compile for GPUs that are not here at sizes whose arguments become constants (1).

Triton turns an argument of 1 into a Python int inside the kernel, which the interpreter does not.
"""

from collections.abc import Callable

import pytest
import torch

pytest.importorskip("triton")


@pytest.fixture
def compile_case() -> Callable:
    from harness import kernel_cases, kernel_probe

    def run(case: str, *sizes: int, target: str = "sm_80") -> list[dict]:
        made = getattr(kernel_cases, case)(*sizes)
        return kernel_probe.compile_case(made, target, torch.float16)

    return run


@pytest.mark.parametrize(
    ("case", "sizes"),
    [
        ("bag_pool_case", (1, 1, 1)),
        ("vicreg_case", (2, 2, 1)),
        ("tcr_case", (1, 1, 1)),
        ("tcr_case", (1, 2, 1)),
        ("block_case", (2, 1)),
        ("block_case", (1, 3)),
        ("embed_case", (1, 1, 1, 1, 1)),
        ("view_case", (1, False, 8, 1)),
    ],
    ids=str,
)
def test_sizes_of_one(compile_case, case, sizes):
    assert compile_case(case, *sizes)


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_bag_pool_keeps_rows_of_8192_in_registers(compile_case, target):
    """As `kernels/bag_pool.py` says of its widest rows."""
    rows = compile_case("bag_pool_case", 4, 2, 8192, target=target)
    assert len(rows) == 2 and all(row["spills"] == 0 for row in rows)
