"""`bench/gpu_report.py` from end to end on a CPU: every stage, the file, the exit status."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
import gpu_report
from harness import gpu_steps

ROOT = Path(__file__).resolve().parent.parent
# A machine with a GPU may have neither decoder nor Pillow.
WITHOUT = """
import runpy, sys
for name in ("simplejpeg", "PIL"):
    sys.modules[name] = None
sys.argv = ["gpu_report.py", *sys.argv[1:]]
sys.path.insert(0, "bench")
runpy.run_path("bench/gpu_report.py", run_name="__main__")
"""


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict]:
    path = tmp_path_factory.mktemp("gpu") / "report.json"
    command = [sys.executable, "-c", WITHOUT, "--dry-run", "--json", str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout, json.loads(path.read_text())


def test_every_op_is_compared_and_every_pass_timed(dry_run):
    said, report = dry_run
    ops = {"vicreg", "tcr", "bag_pool", "linear_bn_relu", "patch_embed"}
    assert {row["op"] for row in report["parity"]} == ops == {row["op"] for row in report["ops"]}
    assert {row["op"] for row in report["kernels"]} == ops | {"lars", "patch_views"}
    for stage in ("parity", "ops", "kernels"):
        assert not [row for row in report[stage] if "failed" in row]
        assert f"\n{stage}\n" in said
    assert all(row["ms"] > 0 for row in report["kernels"]) and report["left_out"] == []
    assert "all is right" in said


def test_whole_steps_and_two_processes(dry_run):
    report = dry_run[1]
    assert {row["variant"] for row in report["steps"]} == set(gpu_steps.VARIANTS)
    assert all(row["finite"] and row["ms"] > 0 for row in report["steps"])
    (exchange,) = report["ranks"]
    assert exchange["passed"] and exchange["all_reduce_gb_per_s"] > 0
    assert len(gpu_steps.step_cases(toy=False)) == len(gpu_steps.RECIPES) * len(gpu_steps.VARIANTS)


def test_a_failed_parity_is_the_exit_status_and_an_error_is_not_the_end(tmp_path):
    report = gpu_report.Report(tmp_path / "r.json", minutes=1)

    def compare(case: str) -> list[dict]:
        if case == "broken":
            raise RuntimeError("out of resources\nmore")
        return [{"case": case, "error": 0.5, "passed": case == "right"}]

    report.stage("parity", ["right", "broken", "wrong"], compare)
    assert [line.split()[0] for line in report.wrong()] == ["broken", "wrong"]
    written = json.loads((tmp_path / "r.json").read_text())
    assert written["parity"][1] == {"case": "broken", "failed": "RuntimeError: out of resources"}


def test_a_stage_keeps_to_its_share_of_the_time(tmp_path):
    report = gpu_report.Report(tmp_path / "r.json", minutes=0)
    report.stage("ops", ["first"], lambda case: [{"case": case}])
    assert report.data["ops"] == [] and report.data["left_out"] == ["ops first: no time was left"]


def test_without_a_gpu_it_says_what_would_run(tmp_path):
    command = [sys.executable, "bench/gpu_report.py", "--json", str(tmp_path / "r.json")]
    environment = {"CUDA_VISIBLE_DEVICES": "", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "--dry-run shows on a CPU" in done.stderr
