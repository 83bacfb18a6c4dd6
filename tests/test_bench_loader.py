"""The loader bench runs from the command line, and its rows have the schema of all benches."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
COLUMNS = ["bench", "case", "provider", "metric", "value", "unit", "p20", "p80", "machine"]


@pytest.fixture(scope="module")
def rows(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    pytest.importorskip("torchvision")
    out = tmp_path_factory.mktemp("bench")
    command = [sys.executable, str(ROOT / "bench" / "bench_loader.py"), "--quick"]
    command += ["--cases", "a,c,d", "--providers", "torchvision PIL", "--images", "6"]
    command += ["--rounds", "2", "--threads", "1", "--data", str(data_dir)]
    command += ["--json", str(out / "rows.json"), "--csv", str(out / "rows.csv")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ours/this" in done.stdout and "\033[" not in done.stdout
    assert (out / "rows.csv").read_text().splitlines()[0] == ",".join(COLUMNS)
    return json.loads((out / "rows.json").read_text())


def test_rows_have_the_schema(rows: list[dict]) -> None:
    assert all(list(row) == COLUMNS for row in rows)
    assert {row["bench"] for row in rows} == {"bench_loader"}
    assert len({row["machine"] for row in rows}) == 1
    assert all(row["p20"] <= row["value"] <= row["p80"] for row in rows)
    keys = [(row["case"], row["provider"], row["metric"]) for row in rows]
    assert len(keys) == len(set(keys)), "a row's key must be its own"


def test_cases_compare(rows: list[dict]) -> None:
    value = {(row["case"], row["provider"], row["metric"]): row["value"] for row in rows}
    metric = "patches per core"
    ours, theirs = (value["a", name, metric] for name in ("bagssl_fast", "torchvision PIL"))
    assert ours > theirs > 0
    assert value["a", "bagssl_fast", f"{metric}, floor to torchvision PIL"] == 40
    ratio = value["a", "bagssl_fast", f"{metric}, ratio to torchvision PIL"]
    assert ratio == pytest.approx(ours / theirs, rel=0.5)
    assert value["c", "bagssl_fast", "parity"] == 0
    assert {case[0] for case, _, _ in value} == {"a", "c", "d"}
