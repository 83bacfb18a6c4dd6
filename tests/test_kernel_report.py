"""`bench/kernel_report.py` holds its floors, and is no worse than the committed report."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
COMMITTED = ROOT / "bench" / "results" / "kernel_report.json"
# Line numbers and neighbors move a compiler's register count a little.
REGISTERS = 16

needs_report = pytest.mark.skipif(
    not COMMITTED.is_file(),
    reason="no report is committed yet: python bench/kernel_report.py --json bench/results/...",
)


def keyed(rows: list[dict], *names: str) -> dict[tuple, dict]:
    return {tuple(row[name] for name in names): row for row in rows}


@needs_report
def test_committed_report_is_complete_and_holds_its_floors():
    report = json.loads(COMMITTED.read_text())
    kernels, traffic = report["kernels"], report["traffic"]
    assert report["missed"] == []
    ops = {"patch_views", "patch_embed", "linear_bn_relu", "vicreg", "tcr", "bag_pool", "lars"}
    for op in ops:
        found = {(row["target"], row["dtype"]) for row in kernels if row["op"] == op}
        assert len(found) == 4 * 3, f"{op}: {sorted(found)}"
        assert {row["dtype"] for row in traffic if row["op"] == op} >= {"float32", "bfloat16"}
    assert all(row["spills"] == 0 for row in kernels)
    assert all(row["matrix_instructions"] for row in kernels if row["has_dot"])
    assert all(row["ratio"] <= row["floor"] for row in traffic if row["floor"])


@needs_report
def test_report_does_not_get_worse(tmp_path):
    triton = pytest.importorskip("triton")
    path = tmp_path / "report.json"
    command = [sys.executable, "bench/kernel_report.py", "--quick", "--json", path]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    report, committed = json.loads(path.read_text()), json.loads(COMMITTED.read_text())

    names = ("op", "case", "pass", "dtype")
    before = keyed(committed["traffic"], *names)
    for key, row in keyed(report["traffic"], *names).items():
        assert row["ratio"] <= before[key]["ratio"] + 0.01, f"{key}: more bytes than committed"

    if committed["triton"] != triton.__version__:
        return  # another compiler: the floors, which it held above, are what can be asked
    names = ("op", "case", "kernel", "target", "dtype")
    before = keyed(committed["kernels"], *names)
    for key, row in keyed(report["kernels"], *names).items():
        was = before[key]
        assert row["registers"] <= was["registers"] + REGISTERS, f"{key}: more registers"
        assert row["shared"] <= was["shared"], f"{key}: more shared memory"
        assert row["has_dot"] == was["has_dot"]
