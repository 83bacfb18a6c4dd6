"""Runs in trouble: killed, stopped, out of disk, damaged, extended; nothing is lost or wrong."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import yaml
from PIL import Image
from runs import (
    DENSE,
    PATCHES,
    assert_bitwise_equal,
    final,
    interrupt_after,
    records,
)

from bagssl_fast.data import open_source
from bagssl_fast.distributed.ranks import StopSignals
from bagssl_fast.models import saved
from bagssl_fast.training import checkpoint
from bagssl_fast.training.directory import claim_run_dir
from bagssl_fast.training.meter import Meter


def at_step(monkeypatch, steps, act):
    """Calls `act()` while the trainer works on a step of the run."""
    add = Meter.add

    def add_and_act(self, *args):
        add(self, *args)
        if self.run.step + 1 == steps:
            act()

    monkeypatch.setattr(Meter, "add", add_and_act)


class TestDamage:
    def test_the_checkpoint_before_is_used_aloud(self, start, capsys):
        _, run_dir = start(DENSE, "run")
        whole = final(run_dir)
        newest = checkpoint.latest(run_dir)
        content = bytearray(newest.read_bytes())
        content[len(content) // 2] ^= 1
        newest.write_bytes(content)
        capsys.readouterr()
        assert start(DENSE, "run", "--resume", "auto")[0] == 0
        said = capsys.readouterr().out
        assert (
            f"{newest} is damaged" in said and "resumed from" in said and "step_000000008" in said
        )
        assert_bitwise_equal(final(run_dir), whole)
        assert newest.with_name(newest.name + ".damaged").read_bytes() == content

    def test_one_checkpoint_alone_is_refused(self, start, capsys):
        assert start(DENSE, "run", "--keep_checkpoints", "1")[0] == 2
        assert "--keep_checkpoints 1: must be 2 or more" in capsys.readouterr().err


class TestExport:
    @pytest.mark.parametrize("every", ["1.0", "0"])
    @pytest.mark.parametrize("written", [[], ["model.safetensors"]], ids=["neither", "model only"])
    def test_killed_between_checkpoint_and_export(self, start, monkeypatch, every, written):
        """ "finished, step 40 of 40", with the model of step 35, or none, evaluated."""
        _, whole = start(DENSE, "whole")
        export = saved.export

        def killed(run_dir, weights, description):
            if description["step"] == 12:
                if written:
                    export(run_dir / "aside", weights, description)
                    (run_dir / "aside" / written[0]).replace(run_dir / written[0])
                raise KeyboardInterrupt
            export(run_dir, weights, description)

        with monkeypatch.context() as patch:
            patch.setattr(saved, "export", killed)
            assert start(DENSE, "run", "--checkpoint_every", every)[0] == 130
        status, run_dir = start(DENSE, "run", "--checkpoint_every", every, "--resume", "auto")
        assert status == 0
        for name in ("model.safetensors", "config.json"):
            assert (run_dir / name).read_bytes() == (whole / name).read_bytes()

    def test_one_that_is_newer_stays(self, start):
        _, run_dir = start(DENSE, "run")
        before = (run_dir / "model.safetensors").stat().st_mtime_ns
        assert start(DENSE, "run", "--resume", "auto")[0] == 0
        assert (run_dir / "model.safetensors").stat().st_mtime_ns == before
        (run_dir / "config.json").write_text("{")
        assert saved.exported_step(run_dir) == -1
        assert start(DENSE, "run", "--resume", "auto")[0] == 0
        assert saved.exported_step(run_dir) == 12


class TestDisk:
    def test_a_save_that_fails_is_told_and_tried_again(self, start, monkeypatch, capsys):
        write = checkpoint.save

        def full(run_dir, step, *args):
            if step == 8:
                raise OSError(errno.ENOSPC, "No space left on device", str(run_dir / "x.pt"))
            return write(run_dir, step, *args)

        monkeypatch.setattr(checkpoint, "save", full)
        status, run_dir = start(DENSE, "run")
        said = capsys.readouterr().out
        assert status == 0 and final(run_dir)["step"] == 12
        assert "the checkpoint of step 8 cannot be written: [Errno 28] No space left" in said
        assert str(run_dir / "x.pt") in said and "step_000000004.pt" in said
        assert "tries again at step 12" in said

    def test_the_last_one_fails(self, start, monkeypatch, capsys):
        start(DENSE, "run", "--max_steps", "4")
        monkeypatch.setattr(checkpoint, "FOLDER", "config.yaml")  # a file, no folder
        status, _ = start(DENSE, "run", "--overwrite", "true", "--max_steps", "4")
        said = capsys.readouterr().err
        assert status == 1 and "the last checkpoint cannot be written" in said
        assert "config.yaml" in said and "last good checkpoint: none" in said

    def test_a_deleted_run_directory_comes_back_complete(
        self, start, tmp_path, monkeypatch, capsys
    ):
        at_step(monkeypatch, 6, lambda: shutil.rmtree(tmp_path / "run"))
        status, run_dir = start(DENSE, "run")
        assert status == 0 and final(run_dir)["step"] == 12
        assert "was deleted or moved: it is made again" in capsys.readouterr().out
        for name in ("config.yaml", "env.json", "config.json", "model.safetensors"):
            assert (run_dir / name).is_file()
        # The record of step 6 had no folder to be written to.
        assert [r["step"] for r in records(run_dir)] == [6, 8, 10, 12]
        assert start(DENSE, "run", "--resume", "auto")[0] == 0

    def test_a_directory_in_use(self, start, tmp_path, capsys):
        held = claim_run_dir(tmp_path / "run", "never", False)
        for flags in ([], ["--resume", "auto"]):
            assert start(DENSE, "run", *flags)[0] == 2
            assert f"in use by process {os.getpid()} on " in capsys.readouterr().err
        held.close()
        assert start(DENSE, "run", "--max_steps", "2")[0] == 0
        assert not (tmp_path / "run" / ".lock").exists()


class TestSignals:
    @pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGQUIT"])
    def test_each_saves_and_says_how_to_resume(self, start, monkeypatch, capsys, name):
        number = signal.Signals[name]
        before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
        interrupt_after(monkeypatch, 5, number)
        status, run_dir = start(DENSE, "run")
        signal.signal(signal.SIGHUP, before)
        assert status == 128 + number and final(run_dir)["step"] == 5
        said = capsys.readouterr().err
        assert f"stopped by {name}" in said and f"--run_dir {run_dir} --resume auto" in said

    def test_in_the_last_step_the_run_is_finished(self, start, monkeypatch):
        interrupt_after(monkeypatch, 12)
        assert start(DENSE, "run")[0] == 0

    @pytest.mark.parametrize("stalls", [True, False])
    def test_one_of_several_leaves_a_wait_only_if_it_lasts(self, monkeypatch, stalls):
        """The others wait for it in a step that it must finish if it can."""
        monkeypatch.setattr(StopSignals, "PATIENCE", 0.2)
        with StopSignals(alone=False) as stop:
            try:
                with stop.waiting(lambda number: InterruptedError(number)):
                    signal.raise_signal(signal.SIGTERM)
                    time.sleep(2 if stalls else 0)
                left = False
            except InterruptedError as error:
                left = error.args == (signal.SIGTERM,)
            time.sleep(0 if stalls else 0.4)
        assert left == stalls and stop.received == signal.SIGTERM

    def test_heard_while_the_data_stalls(self, tmp_path):
        """And the process ends although the thread that reads never returns."""
        code, run_dir = stalled(tmp_path, signal.SIGTERM)
        assert code == 128 + signal.SIGTERM and final(run_dir)["step"] >= 1

    def test_a_second_interrupt_stops_at_once(self, tmp_path):
        code, run_dir = stalled(tmp_path, signal.SIGINT, slow_save=True)
        assert code == -signal.SIGINT and checkpoint.latest(run_dir) is None


STALLED = """
import sys, time
import numpy as np
from bagssl_fast import train
from bagssl_fast.data import Source
from bagssl_fast.training import loop, run
pictures = np.random.default_rng(0).integers(0, 255, (33, 16, 16, 3)).astype(np.uint8)
count = 0
def read(i):
    global count
    count += 1
    if count > 60:
        print("stalled", flush=True)
        time.sleep(1000)
    return pictures[i]
run.open_source = lambda *a, **k: Source.from_function(read, 33)
if sys.argv[1] == "slow":
    def save(run):
        print("saving", flush=True)
        time.sleep(1000)
    loop.save = save
raise SystemExit(train.main(sys.argv[2:]))
"""


def stalled(tmp_path, number, slow_save=False):
    """Signals a run whose data stalls; twice if it also saves slowly."""
    recipe, run_dir = tmp_path / "r.yaml", tmp_path / "run"
    recipe.write_text(yaml.safe_dump(DENSE | {"checkpoint_every": 0}))
    command = [sys.executable, "-c", STALLED, "slow" if slow_save else "fast"]
    command += ["--config", str(recipe), "--run_dir", str(run_dir), "--loader.num_threads", "1"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True) as process:
        for line in process.stdout:
            if line == "stalled\n":
                time.sleep(1)  # until the batches before it are used up
                process.send_signal(number)
                if not slow_save:
                    break
            if line == "saving\n":
                process.send_signal(number)
                break
        try:
            said = process.communicate(timeout=60)[1]
        finally:
            process.kill()
    assert ("stopped by" in said) != slow_save, said
    return process.returncode, run_dir


def test_a_broken_image_stops_after_a_save(start, tmp_path, capsys):
    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(33):
        pixels = rng.integers(0, 255, (16, 16, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:02}.png")
    flags = ["--data", str(folder), "--checkpoint_every", "0", "--log_every", "1"]
    (folder / "07.png").write_text("no picture")
    seed = 0
    while True:  # an order in which it does not come first
        status, run_dir = start(DENSE, f"run{seed}", *flags, "--seed", str(seed))
        assert status == 1 and "07.png" in capsys.readouterr().err
        if (run_dir / "metrics.jsonl").stat().st_size:
            break
        seed += 1
    steps = records(run_dir)[-1]["step"]
    assert final(run_dir)["step"] == steps
    pixels = rng.integers(0, 255, (16, 16, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(folder / "07.png")
    resume = ["--seed", str(seed), "--resume", "auto", "--loader.on_error", "skip"]
    status, _ = start(DENSE, f"run{seed}", *flags, *resume)
    assert status == 2 and "data.fingerprint" in capsys.readouterr().err  # another set of images
    (folder / "07.png").write_text("no picture")
    assert start(DENSE, f"run{seed}", *flags, *resume)[0] == 2
    assert "loader.on_error: raise -> skip" in capsys.readouterr().err


class TestExtension:
    def test_a_longer_run_says_what_becomes_of_the_schedule(self, start, capsys):
        _, run_dir = start(DENSE, "run")
        status, _ = start(DENSE, "run", "--resume", "auto", "--epochs", "5")
        said = capsys.readouterr().out
        assert status == 0 and final(run_dir)["step"] == 20
        assert "extended from 12 to 20 steps: the cosine schedule" in said
        assert "the learning rate at step 12 changes from 0 to 0.00" in said
        assert [r["step"] for r in records(run_dir)] == list(range(2, 21, 2))

    def test_a_shorter_one_is_refused(self, start, capsys):
        start(DENSE, "run")
        for flags in (["--epochs", "2"], ["--max_steps", "11"]):
            assert start(DENSE, "run", "--resume", "auto", *flags)[0] == 2
            said = capsys.readouterr().err
            assert "epochs: 3 -> 2" in said or "max_steps: 0 -> 11" in said

    def test_of_the_same_length_changes_nothing(self, start, capsys):
        _, run_dir = start(DENSE, "run", "--max_steps", "6")
        flags = ["--max_steps", "6", "--epochs", "9", "--resume", "auto"]
        assert start(DENSE, "run", *flags)[0] == 0
        assert "extended" not in capsys.readouterr().out and final(run_dir)["step"] == 6


class TestFingerprint:
    def test_files_are_looked_into(self, tmp_path):
        """Every picture replaced by a gray one, and `--resume auto` trained on."""
        folder = tmp_path / "a"
        for i in range(5):
            (folder / f"{i % 2}").mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((9, 9, 3), 50 * i, np.uint8)).save(folder / f"{i % 2}/{i}.bmp")
        before = open_source(folder).fingerprint
        shutil.copytree(folder, tmp_path / "b", copy_function=shutil.copyfile)
        assert open_source(tmp_path / "b").fingerprint == before  # wherever it is stored
        path = tmp_path / "b" / "0" / "4.bmp"
        Image.fromarray(np.full((9, 9, 3), 128, np.uint8)).save(path)
        assert open_source(tmp_path / "b").fingerprint != before

    def test_members_of_tars_too(self, tmp_path, monkeypatch):
        import tarfile

        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        marks = []
        for value in (10, 200):
            Image.fromarray(np.full((9, 9, 3), value, np.uint8)).save(tmp_path / "x.bmp")
            with tarfile.open(tmp_path / f"{value}.tar", "w") as tar:
                tar.add(tmp_path / "x.bmp", "x.bmp")
            marks.append(open_source(tmp_path / f"{value}.tar").fingerprint)
        assert marks[0] != marks[1]

    def test_a_pipe_among_the_images_is_not_read(self, tmp_path):
        from bagssl_fast.data.source import probe_files

        os.mkfifo(tmp_path / "x.jpg")
        (tmp_path / "y.jpg").write_bytes(b"y")
        paths = [os.fsencode(tmp_path / name) for name in ("x.jpg", "y.jpg", "gone.jpg")]
        assert probe_files(paths) != probe_files(paths[1:])


RANK = """
import os, sys
from bagssl_fast import train
run_dir = sys.argv[1] + os.environ["RANK"]
raise SystemExit(train.main(["--run_dir", run_dir, *sys.argv[2:]]))
"""


def test_ranks_that_find_different_checkpoints_stop(start, tmp_path):
    """Two nodes without a shared run directory: rank 1 trained from scratch, exit code 0."""
    _, first = start(DENSE, "run0", "--max_steps", "4")
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [str(script), str(tmp_path / "run"), "--resume", "auto", "--max_steps", "4"]
    command += ["--config", str(tmp_path / "run0.yaml"), "--data", str(tmp_path / "images.npz")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    before = final(first)
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode != 0 and "exitcode  : 2" in done.stderr
    assert "the processes found different checkpoints: rank 0" in done.stderr
    assert "must see the same run directory" in done.stderr
    assert_bitwise_equal(final(first), before)
    assert not Path(f"{tmp_path}/run1").exists()


def test_the_exported_average_is_that_of_the_checkpoint(start):
    _, run_dir = start(PATCHES | {"ema": 0.5}, "run", "--max_steps", "3")
    (run_dir / "model.safetensors").unlink()
    assert start(PATCHES | {"ema": 0.5}, "run", "--max_steps", "3", "--resume", "auto")[0] == 0
    weights = safetensors.torch.load_file(run_dir / "model.safetensors")
    assert_bitwise_equal(weights, dict(final(run_dir)["average"]))
