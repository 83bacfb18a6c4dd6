"""Files of a run directory survive kills, refuse damage, and are found again."""

import os
import pickle

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


class Evil:
    def __reduce__(self):
        return (print, ("executed",))


def test_nothing_in_a_checkpoint_is_executed(tmp_path, capsys):
    path = tmp_path / "step_1.pt"
    torch.save({"identity": Evil()}, path)
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


class TestRunDir:
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
