"""The op benches: one runs from the command line, its rows have the schema, parity ends a run."""

import json
from pathlib import Path

import pytest
import torch

import bench_patch_views
from harness import ops as op_bench

CASE = "P4 B8, 500x375 -> 64"


def run(build: op_bench.Build, *flags: str) -> None:
    argv = ["--quick", "--case", CASE, "--rounds", "2", "--threads", "1", "--no-memory", *flags]
    op_bench.main("bench_patch_views", None, bench_patch_views.CASES, build, argv)


@pytest.fixture(autouse=True)
def threads() -> None:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_quick_run_compares_with_torchvision(tmp_path: Path) -> None:
    run(bench_patch_views.build, "--json", str(tmp_path / "rows.json"))
    rows = json.loads((tmp_path / "rows.json").read_text())
    value = {(row["case"], row["provider"], row["metric"]): row["value"] for row in rows}
    assert {case for case, _, _ in value} == {"machine", CASE}
    ratio = value[CASE, "bagssl_fast", "time, ratio to torchvision v2"]
    times = [value[CASE, name, "time"] for name in ("torchvision v2", "bagssl_fast")]
    assert ratio == pytest.approx(times[0] / times[1], rel=0.5)
    assert value[CASE, "bagssl_fast", "parity"] < 2e-3
    assert value[CASE, "reference", "parity"] < 2e-3


def test_a_provider_with_other_pixels_is_not_timed(tmp_path: Path) -> None:
    def brighter(provider: str, case_id: str) -> op_bench.Call:
        call = bench_patch_views.build(provider, case_id)
        return (lambda: [call()[0] + 0.01]) if provider == "bagssl_fast" else call

    with pytest.raises(SystemExit, match="bagssl_fast is off by"):
        run(brighter)


def test_a_case_that_is_not_there_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        argv = ["--case", "P5"]
        op_bench.main("b", None, bench_patch_views.CASES, bench_patch_views.build, argv)
    assert f"the cases are P20 B100, 32x32 -> 32; {CASE}" in capsys.readouterr().err
