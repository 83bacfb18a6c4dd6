"""fuzz/: every target for some seconds, and that a finding of any kind is told."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

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


def test_every_target_for_some_seconds(tmp_path):
    """In one command: importing torch takes longer than this."""
    done = run(FUZZ, "--seconds", "3", "--json", "counts.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    counts = json.loads((tmp_path / "counts.json").read_text())
    assert [count["target"] for count in counts] == TARGETS
    assert all(count["executions"] > 0 and count["findings"] == [] for count in counts)


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


def test_executions_are_counted_from_the_first(tmp_path):
    """`--first 5 --executions 2` did nothing: the number was taken for that of the last."""
    folder = tmp_path / "fuzz"
    folder.mkdir()
    for name in ("mutate.py", "run.py"):
        shutil.copy(FUZZ / name, folder)
    (folder / "targets.py").write_text(STUB.replace('raise KeyError("a finding")', "pass"))
    command = ("raises", "--first", "5", "--executions", "2", "--json", "counts.json")
    assert run(folder, *command, cwd=tmp_path).returncode == 0
    (counts,) = json.loads((tmp_path / "counts.json").read_text())
    assert counts["executions"] == 2


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
