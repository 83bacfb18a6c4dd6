"""`scripts/soak.py` in short: killed runs end as those that were never killed, or it says so."""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from runs import DENSE

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "soak.py"


def test_five_kills(tmp_path):
    out = tmp_path / "soak.json"
    command = [sys.executable, str(SCRIPT), "--kills", "5", "--seed", "11", "--json", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(out.read_text())
    assert result == json.loads(done.stdout.splitlines()[-1])
    assert result["kills"] == sum(result["fell"].values()) == 5 and result["equal"]
    assert result["seed"] == 11 and "--seed 11" in done.stdout


@pytest.mark.parametrize("change", ["metrics.jsonl", "model.safetensors", "eval.json", ".x.1.tmp"])
def test_a_difference_is_found(start, tmp_path, change):
    spec = importlib.util.spec_from_file_location("soak", SCRIPT)
    soak = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(soak)
    recipe = DENSE | {"eval": {"enabled": True, "patches": [1], "random": False}}
    status, run_dir = start(recipe, "run", "--max_steps", "2")
    other = Path(shutil.copytree(run_dir, tmp_path / "other"))
    assert status == 0 and soak.differences(run_dir, other) == []
    path = other / change
    if path.suffix == ".json":
        result = json.loads(path.read_text())
        result["results"][0]["std"] += 1e-9
        path.write_text(json.dumps(result))
    elif path.suffix == ".safetensors":
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    else:
        path.write_text("")
    found = soak.differences(run_dir, other)
    assert len(found) == 1 and change in found[0]


def test_the_committed_result_is_equal():
    result = json.loads((SCRIPT.parent.parent / "bench" / "results" / "soak.json").read_text())
    assert result["kills"] >= 50 and result["equal"] and not result["different"]
    assert {"step", "write", "rename", "evaluation"} <= result["fell"].keys()
