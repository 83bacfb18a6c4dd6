"""fuzz/: every target for some seconds, and that a finding of any kind is told."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

FUZZ = Path(__file__).parent.parent / "fuzz"
TARGETS = ["tar_index", "index_cache", "jpeg", "arrays", "pickled", "views", "run_files"]

STUB = """
import os, time
from typing import NamedTuple
def raises(data): raise KeyError("a finding")
def crashes(data): os.abort()
def hangs(data): time.sleep(60)
class Target(NamedTuple):
    seeds: object
    run: object
    repair: object = None
TARGETS = {f.__name__: Target(lambda: [b"seed"], f) for f in (raises, crashes, hangs)}
"""


def run(folder: Path, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(folder / "run.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=300)


@pytest.mark.parametrize("target", TARGETS)
def test_target_for_some_seconds(target, tmp_path):
    done = run(FUZZ, target, "--seconds", "3", "--json", "counts.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (counts,) = json.loads((tmp_path / "counts.json").read_text())
    assert counts["executions"] > 0 and counts["findings"] == []


def test_every_target_is_listed_here():
    text = (FUZZ / "targets.py").read_text()
    found = re.findall(r'^    "(\w+)": Target', text[text.index("TARGETS = {") :], re.M)
    assert found == TARGETS


def test_finding_of_each_kind_is_told_and_repeats(tmp_path):
    folder = tmp_path / "fuzz"
    folder.mkdir()
    shutil.copy(FUZZ / "mutate.py", folder)
    text = (FUZZ / "run.py").read_text()
    (folder / "run.py").write_text(text.replace("HANG_SECONDS = 30", "HANG_SECONDS = 2"))
    (folder / "targets.py").write_text(STUB)
    done = run(folder, "--executions", "1", "--json", "counts.json", cwd=tmp_path)
    assert done.returncode == 1
    counts = json.loads((tmp_path / "counts.json").read_text())
    whats = {c["target"]: [f["what"] for f in c["findings"]] for c in counts}
    assert "KeyError: 'a finding'" in whats["raises"][0]
    assert "exit -6" in whats["crashes"][0]
    assert whats["hangs"] == ["no end within 2 s"]
    assert len(list((tmp_path / "fuzz-findings").iterdir())) == 3
    assert "KeyError" in run(folder, "raises", "--only", "0", cwd=tmp_path).stderr


def test_inputs_depend_on_seed_and_number_alone():
    code = "import run; print([run.input_of('pickled', 3, n) for n in (0, 7)])"
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, cwd=FUZZ, check=True
        ).stdout
        for _ in range(2)
    }
    assert len(outputs) == 1


def test_unknown_target_names_those_that_exist(tmp_path):
    done = run(FUZZ, "tar", cwd=tmp_path)
    assert done.returncode == 2
    assert "no target 'tar'; the targets are tar_index" in done.stderr
