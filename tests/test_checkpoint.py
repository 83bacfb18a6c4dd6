"""Files of a run directory survive kills, refuse damage, and are found again."""

import os
import pickle
import resource
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

from bagssl_fast.files import write_atomic
from bagssl_fast.models import saved
from bagssl_fast.training import checkpoint, directory


def state(step):
    return {"identity": {"a": 1}, "step": step, "model": {"w": torch.arange(3.0)}}


def test_round_trip_and_the_newest_are_kept(tmp_path):
    for step in (5, 90, 100, 1000):
        checkpoint.save(tmp_path, step, state(step), keep=2)
    names = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert names == ["step_000000100.pt", "step_000001000.pt"]
    loaded = checkpoint.load(checkpoint.latest(tmp_path))
    assert loaded["step"] == 1000 and loaded["model"]["w"].equal(torch.arange(3.0))


def test_a_killed_write_leaves_the_old_file(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, 1, state(1), keep=1)

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(tmp_path, 2, state(2), keep=1)
    with pytest.raises(KeyboardInterrupt):
        write_atomic(tmp_path / "config.json", b"half")
    assert checkpoint.load(checkpoint.latest(tmp_path))["step"] == 1
    assert not (tmp_path / "config.json").exists()


def test_damage_is_told(tmp_path):
    path = checkpoint.save(tmp_path, 3, state(3), keep=1)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ValueError, match="cannot be read as a checkpoint"):
        checkpoint.load(path)
    torch.save({"something": 1}, path)
    with pytest.raises(ValueError, match="not a checkpoint of"):
        checkpoint.load(path)


@pytest.fixture
def two(tmp_path):
    """A run directory with the checkpoints of steps 1 and 2."""
    for step in (1, 2):
        checkpoint.save(tmp_path, step, state(step), keep=2)
    return tmp_path


def damage(path, how):
    content = bytearray(path.read_bytes())
    if how == "empty":
        content.clear()
    elif how == "torn":
        del content[len(content) // 2 :]
    elif how == "zeros":
        content[-4096:] = bytes(4096)
    else:
        content[how] ^= 0x10
    path.write_bytes(content)


class TestDamage:
    @pytest.mark.parametrize("how", ["empty", "torn", "zeros", 100, -1])
    def test_the_one_before_is_used_and_the_damaged_one_named(self, two, how):
        """Of single flipped bits, 4 of 6 used to train a different model without a word."""
        newest = checkpoint.latest(two)
        damage(newest, how)
        found = checkpoint.load_newest(newest, older=True)
        assert found.state["step"] == 1 and str(newest) in found.damaged[newest]
        with pytest.raises(ValueError, match="cannot be read as a checkpoint"):
            checkpoint.load(newest)

    def test_every_flipped_bit_is_found(self, two):
        path = checkpoint.latest(two)
        content = path.read_bytes()
        for place in range(0, len(content), 41):
            flipped = bytearray(content)
            flipped[place] ^= 1 << (place % 8)
            path.write_bytes(flipped)
            with pytest.raises(ValueError, match="cannot be read"):
                checkpoint.load(path)

    def test_none_is_whole(self, two):
        for path in (two / "checkpoints").iterdir():
            damage(path, "torn")
        with pytest.raises(ValueError, match=r"no checkpoint .* is whole .*--overwrite true"):
            checkpoint.load_newest(checkpoint.latest(two), older=True)

    def test_a_damaged_one_no_longer_counts(self, two):
        """Else the next save would keep it, and drop a whole one for it."""
        newest = checkpoint.latest(two)
        aside = checkpoint.set_aside([newest])
        assert checkpoint.latest(two).name == "step_000000001.pt" and aside[newest].is_file()

    def test_going_back_loses_none(self, two):
        """A run that goes on from an older checkpoint keeps the one it just wrote."""
        checkpoint.save(two, 5, state(5), keep=2)
        checkpoint.save(two, 3, state(3), keep=2)
        assert sorted(p.stem for p in (two / "checkpoints").iterdir()) == [
            "step_000000002",
            "step_000000003",
            "step_000000005",
        ]


def test_on_the_disk_before_the_name_and_the_one_before_goes_last(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, 1, state(1), keep=1)
    done = []
    for module, name in ((os, "fsync"), (os, "replace"), (Path, "unlink")):
        real = getattr(module, name)

        def record(*args, real=real, name=name, **kwargs):
            done.append(name)
            return real(*args, **kwargs)

        monkeypatch.setattr(module, name, record)
    checkpoint.save(tmp_path, 2, state(2), keep=1)
    assert done == ["fsync", "replace", "fsync", "unlink"]


def test_a_full_disk_is_named_and_leaves_nothing(tmp_path):
    """torch's own words are "[enforce fail] unexpected pos", without a path."""
    checkpoint.save(tmp_path, 1, state(1), keep=2)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        big = state(2) | {"model": {"w": torch.randn(100_000)}}
        with pytest.raises(OSError, match=r"File too large.*checkpoints/step_000000002\.pt"):
            checkpoint.save(tmp_path, 2, big, keep=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step_000000001.pt"]
    assert checkpoint.load(checkpoint.latest(tmp_path))["step"] == 1


class Evil:
    def __reduce__(self):
        return (print, ("executed",))


def test_nothing_in_a_checkpoint_is_executed(tmp_path, capsys):
    path = tmp_path / "step_1.pt"
    torch.save({"identity": Evil()}, path)
    with pytest.raises(ValueError, match="cannot be read"):
        checkpoint.load(path)
    write_atomic(path, lambda file: torch.save({"identity": Evil()}, file), sealed=True)
    with pytest.raises(ValueError, match="cannot be read"):
        checkpoint.load(path)
    path.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ValueError, match="cannot be read"):
        checkpoint.load(path)
    assert "executed" not in capsys.readouterr().out


def test_find(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    assert checkpoint.find("auto", run) is None
    path = checkpoint.save(run, 7, state(7), keep=1)
    assert checkpoint.find("never", run) is None
    for resume in ("auto", str(run), str(path)):
        assert checkpoint.find(resume, run) == path
    with pytest.raises(ValueError, match="no checkpoint there"):
        checkpoint.find(str(tmp_path / "nowhere"), run)


def test_a_changed_configuration_is_told_key_by_key():
    checkpoint.compare({"lr": 1, "seed": 2}, {"lr": 1, "seed": 2})
    with pytest.raises(ValueError, match=r"lr: 1 -> 3; seed: \(absent\) -> 2"):
        checkpoint.compare({"lr": 1}, {"lr": 3, "seed": 2})


def test_export(tmp_path):
    weights = {"w": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)}
    saved.export(tmp_path, weights, {"step": 3})
    back = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert back["w"].equal(weights["w"])
    assert (tmp_path / "config.json").read_text() == '{\n  "step": 3\n}\n'


HOLD = """
import sys, pathlib
from bagssl_fast.training.directory import claim_run_dir
held = claim_run_dir(pathlib.Path(sys.argv[1]), "auto", False)
print("held", flush=True)
sys.stdin.read()
"""


class TestLock:
    def test_two_processes_never_share_a_directory(self, tmp_path):
        """Two trainers in one directory both "succeeded", 97 of 397 records written twice."""
        command = [sys.executable, "-c", HOLD, str(tmp_path)]
        pipe = subprocess.PIPE
        with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as other:
            assert other.stdout.readline() == "held\n"
            holder = f"in use by process {other.pid} on {socket.gethostname()}"
            for overwrite in (False, True):
                with pytest.raises(ValueError, match=holder):
                    directory.claim_run_dir(tmp_path, "auto", overwrite)
            other.kill()
        directory.claim_run_dir(tmp_path, "auto", False).close()
        assert not any(tmp_path.iterdir())

    def test_within_a_process(self, tmp_path):
        first = directory.claim_run_dir(tmp_path, "never", False)
        with pytest.raises(ValueError, match=f"in use by process {os.getpid()} "):
            directory.claim_run_dir(tmp_path, "never", False)
        first.close()
        second = directory.claim_run_dir(tmp_path, "never", False)
        first.close()  # changes nothing
        assert (tmp_path / ".lock").exists()
        second.close()

    def test_runs_started_in_the_same_second(self, tmp_path):
        """2 of 4 pairs merged their metrics."""
        made = [directory.make_fresh(tmp_path / "runs" / "a-20260101-120000") for _ in range(3)]
        assert [path.name[1:] for path in made] == [
            "-20260101-120000",
            "-20260101-120000-2",
            "-20260101-120000-3",
        ]

    def test_a_deleted_directory_comes_back(self, tmp_path, capsys):
        run_dir = tmp_path / "run"
        claimed = directory.claim_run_dir(run_dir, "never", False)
        claimed.write({"config.yaml": b"a: 1\n"})
        claimed.ensure()
        assert capsys.readouterr().out == ""
        shutil.rmtree(run_dir)
        claimed.ensure()
        assert (run_dir / "config.yaml").read_bytes() == b"a: 1\n"
        assert f"{run_dir} was deleted or moved" in capsys.readouterr().out
        with pytest.raises(ValueError, match="in use by"):
            directory.claim_run_dir(run_dir, "auto", False)
        shutil.rmtree(run_dir)
        other = directory.claim_run_dir(run_dir, "never", False)
        with pytest.raises(ValueError, match="in use by"):
            claimed.ensure()
        other.close()
        claimed.close()


class TestRunDir:
    def test_leftovers_of_killed_processes_are_no_content(self, tmp_path):
        """A hidden file of a run that could not start made its directory refused."""
        for name in (".config.yaml.123.tmp", ".lock"):
            (tmp_path / name).write_text("")
        folder = tmp_path / "checkpoints"
        directory.claim_run_dir(tmp_path, "never", False).close()
        assert not any(tmp_path.iterdir())
        folder.mkdir()
        (folder / ".step_000000004.pt.123.tmp").write_text("")
        (folder / "step_000000002.pt").write_text("")
        directory.claim_run_dir(tmp_path, "auto", False).close()
        assert [p.name for p in folder.iterdir()] == ["step_000000002.pt"]

    def test_fresh_and_empty(self, tmp_path):
        directory.open_run_dir(tmp_path / "a" / "b", "never", False)
        directory.open_run_dir(tmp_path / "a" / "b", "never", False)

    def test_refuses_what_is_not_empty(self, tmp_path):
        (tmp_path / "config.yaml").write_text("")
        with pytest.raises(ValueError, match="--resume auto resumes it, --overwrite true"):
            directory.open_run_dir(tmp_path, "never", False)
        directory.open_run_dir(tmp_path, "auto", False)
        assert (tmp_path / "config.yaml").exists()
        directory.open_run_dir(tmp_path, "never", True)
        assert not any(tmp_path.iterdir())

    def test_never_deletes_what_is_not_a_run(self, tmp_path):
        (tmp_path / "thesis.tex").write_text("")
        with pytest.raises(ValueError, match="not a run directory"):
            directory.open_run_dir(tmp_path, "never", True)
        assert (tmp_path / "thesis.tex").exists()

    @pytest.mark.parametrize("overwrite", [False, True])
    def test_an_empty_directory_behind_a_link_is_kept(self, tmp_path, overwrite):
        """It has nothing to delete, and a link cannot be deleted as a directory."""
        (tmp_path / "disk").mkdir()
        (tmp_path / "run").symlink_to(tmp_path / "disk")
        directory.open_run_dir(tmp_path / "run", "never", overwrite)
        assert (tmp_path / "run").is_symlink() and (tmp_path / "disk").is_dir()

    def test_only_overwrite_deletes(self, tmp_path, monkeypatch):
        """What appears after the check is not lost."""
        monkeypatch.setattr(directory, "check_run_dir", lambda *_: None)
        (tmp_path / "late.txt").write_text("")
        directory.open_run_dir(tmp_path, "never", False)
        assert (tmp_path / "late.txt").exists()

    def test_a_file(self, tmp_path):
        (tmp_path / "f").write_text("")
        with pytest.raises(ValueError, match="is a file"):
            directory.open_run_dir(tmp_path / "f", "never", False)
