"""The trainer end to end on tiny sets: runs, resumption, signals, divergence, refusals."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import yaml
from runs import (
    DENSE,
    EPOCHS,
    PATCHES,
    STEPS_PER_EPOCH,
    assert_bitwise_equal,
    final,
    interrupt_after,
    records,
)

from bagssl_fast import cli, train
from bagssl_fast.models.bag_model import build_model
from bagssl_fast.training import checkpoint
from bagssl_fast.training import run as run_module
from bagssl_fast.training.run import Run


class TestRun:
    def test_leaves_a_complete_run_directory(self, start, capsys):
        status, run_dir = start(DENSE, "run")
        assert status == 0
        config = cli.load(run_dir / "config.yaml")
        assert config.optim.lr == 1e-2 and config.run_dir == str(run_dir)
        environment = json.loads((run_dir / "env.json").read_text())
        assert environment["packages"]["torch"] == torch.__version__.partition("+")[0]
        assert {"cpu", "cores", "argv", "git"} <= environment.keys()
        total = STEPS_PER_EPOCH * EPOCHS
        assert [r["step"] for r in records(run_dir)] == list(range(2, total + 1, 2))
        named = {"loss", "term/invariance", "term/variance", "term/covariance", "lr", "epoch"}
        meters = {"images_per_s", "patches_per_s", "data_wait", "memory_mb"}
        collapse = {"std_h", "std_z", "rank_h", "rank_z"}
        assert {*named, *meters, *collapse} <= records(run_dir)[0].keys()
        assert final(run_dir)["step"] == total
        kept = sorted(p.name for p in (run_dir / "checkpoints").iterdir())
        assert kept == ["step_000000008.pt", "step_000000012.pt"]
        described = json.loads((run_dir / "config.json").read_text())
        assert described["step"] == total and described["encoder"]["patch_size"] == 8
        said = capsys.readouterr().out
        assert "vicreg over 8 slots" in said and "patch_embed" in said  # the dispatch table
        assert "step 12/12  loss" in said and "patches/s" in said and "rank" in said

    def test_exports_the_average_of_the_weights(self, start):
        _, run_dir = start(DENSE, "run")
        weights = safetensors.torch.load_file(run_dir / "model.safetensors")
        state = final(run_dir)
        name = "backbone.layers.0.weight"
        assert weights[name].equal(state["average"][name])
        assert not weights[name].equal(state["model"][name])

    def test_learns(self, start):
        _, run_dir = start(DENSE, "run", "--epochs", "15")
        losses = [r["loss"] for r in records(run_dir)]
        assert np.mean(losses[-8:]) < 0.96 * np.mean(losses[:2])

    def test_steps_can_be_limited(self, start):
        _, run_dir = start(DENSE, "run", "--max_steps", "4")
        assert final(run_dir)["step"] == 4 and records(run_dir)[-1]["lr"] < 1e-2

    def test_steps_make_as_many_epochs_as_they_need(self, start, capsys):
        """--max_steps counts, not --epochs: 14 steps of 4 per epoch used to end after 12."""
        _, run_dir = start(DENSE, "run", "--max_steps", "14")
        assert final(run_dir)["step"] == 14 and records(run_dir)[-1]["epoch"] == 3.5
        said = capsys.readouterr().out
        assert "0 of 14 done: 3.5 epochs of 4 by --max_steps, not 3 by --epochs" in said

    def test_images_can_be_limited(self, start):
        _, run_dir = start(DENSE, "run", "--max_images", "17")
        assert final(run_dir)["step"] == 2 * EPOCHS  # of 8 images each, the 17th left over

    def test_where_patches_are_cut_changes_nothing(self, start):
        flags = ["--epochs", "1", "--loader.views"]
        (_, host), (_, device) = (start(PATCHES, v, *flags, v) for v in ("host", "device"))
        assert_bitwise_equal(final(host)["model"], final(device)["model"])

    @pytest.mark.gpu
    @pytest.mark.parametrize("recipe", [DENSE, PATCHES], ids=["dense", "patches"])
    @pytest.mark.parametrize("views", ["host", "device"])
    def test_on_a_gpu(self, start, recipe, views):
        status, run_dir = start(recipe, "run", "--device", "cuda", "--loader.views", views)
        assert status == 0 and final(run_dir)["step"] == STEPS_PER_EPOCH * EPOCHS
        assert all(np.isfinite(r["loss"]) for r in records(run_dir))

    @pytest.mark.gpu
    def test_replayed_as_a_graph_on_a_gpu(self, start):
        flags = ["--device", "cuda", "--precision", "fp32", "--cuda_graph"]
        (_, eager), (_, graph) = (start(DENSE, f"run-{v}", *flags, v) for v in ("false", "true"))
        for a, b in zip(records(eager), records(graph), strict=True):
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-2)

    def test_tells_which_images_were_skipped(self, start, tmp_path, capsys):
        from PIL import Image

        folder = tmp_path / "photos"
        folder.mkdir()
        for i in range(16):
            Image.fromarray(np.full((16, 16, 3), 15 * i, np.uint8)).save(folder / f"{i:02}.png")
        (folder / "07.png").write_text("no picture")
        flags = ["--data", str(folder), "--epochs", "1"]
        assert start(DENSE, "stops", *flags)[0] == 1
        said = capsys.readouterr().err
        assert "07.png" in said and "--loader.on_error skip" in said and said.count("\n") == 1
        status, run_dir = start(DENSE, "skips", *flags, "--loader.on_error", "skip")
        assert status == 0
        assert "07.png" in (run_dir / "skipped.txt").read_text()


class TestResume:
    @pytest.mark.parametrize("recipe", [DENSE, PATCHES], ids=["dense", "patches"])
    def test_twice_equals_never_interrupted(self, start, monkeypatch, recipe):
        """Bitwise: weights, statistics, optimizer, average; once in mid-epoch, once at its end."""
        _, whole = start(recipe, "whole")
        for steps in (5, 8):
            with monkeypatch.context() as patch:
                interrupt_after(patch, steps)
                status, parts = start(recipe, "parts", "--resume", "auto")
            assert status == 128 + signal.SIGUSR1 and final(parts)["step"] == steps
        status, parts = start(recipe, "parts", "--resume", "auto")
        assert status == 0
        a, b = final(whole), final(parts)
        assert_bitwise_equal(a, b)
        exported = [(d / "model.safetensors").read_bytes() for d in (whole, parts)]
        assert exported[0] == exported[1]
        assert [r["step"] for r in records(parts)] == [r["step"] for r in records(whole)]
        # A record that an interruption cut in two counts the steps since, so compare the others.
        pairs = list(zip(records(whole), records(parts), strict=True))
        assert all(x["loss"] == y["loss"] for x, y in pairs if x["step"] != 6)
        assert all(x["std_z"] == y["std_z"] for x, y in pairs)

    def test_from_a_named_checkpoint_into_its_run(self, start):
        _, run_dir = start(DENSE, "run")
        whole = final(run_dir)
        first = run_dir / "checkpoints" / "step_000000008.pt"
        checkpoint.latest(run_dir).unlink()
        status, _ = start(DENSE, "run", "--resume", str(first))
        assert status == 0
        assert_bitwise_equal(final(run_dir), whole)

    def test_a_finished_run_stays_as_it_is(self, start):
        _, run_dir = start(DENSE, "run")
        before = final(run_dir)
        assert start(DENSE, "run", "--resume", "auto")[0] == 0
        assert_bitwise_equal(final(run_dir), before)
        assert len(records(run_dir)) == STEPS_PER_EPOCH * EPOCHS // 2

    def test_another_configuration_is_refused(self, start, capsys):
        start(DENSE, "run")
        status, _ = start(DENSE, "run", "--resume", "auto", "--optim.lr", "0.5", "--epochs", "9")
        said = capsys.readouterr().err
        assert status == 2
        assert "epochs: 3 -> 9" in said and "optim.lr: 0.01 -> 0.5" in said

    def test_other_images_are_refused(self, start, tmp_path, capsys):
        start(DENSE, "run")
        np.save(tmp_path / "other.npy", np.zeros((40, 16, 16, 3), np.uint8))
        status, _ = start(DENSE, "run", "--resume", "auto", "--data", str(tmp_path / "other.npy"))
        assert status == 2 and "data.fingerprint" in capsys.readouterr().err

    def test_auto_without_a_directory(self, start, capsys):
        assert train.main(["--resume", "auto", "--data", "demo"]) == 2
        assert "--run_dir" in capsys.readouterr().err


def test_sigterm_saves_and_exits_with_143(tiny_images, tmp_path):
    recipe, run_dir = tmp_path / "long.yaml", tmp_path / "run"
    recipe.write_text(yaml.safe_dump(DENSE | {"epochs": 100000, "log_every": 1}))
    command = [sys.executable, "-m", "bagssl_fast.train", "--config", str(recipe)]
    command += ["--data", str(tiny_images), "--run_dir", str(run_dir)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True) as process:
        for line in process.stdout:
            if line.startswith("step 3/"):
                process.send_signal(signal.SIGTERM)
                break
        said = process.communicate(timeout=60)[1]
        assert process.returncode == 128 + signal.SIGTERM
    assert "stopped by SIGTERM" in said and "--resume auto" in said
    state = final(run_dir)
    assert state["step"] >= 3


class TestDiverged:
    @pytest.fixture
    def broken_at_6(self, monkeypatch):
        """The covariance of step 6 is not a number."""
        prepare = run_module.prepare

        def prepare_broken(*args) -> Run:
            run = prepare(*args)
            loss = run.loss.forward

            def forward(z):
                value, terms = loss(z)
                if run.step + 1 == 6:
                    terms["covariance"] = terms["covariance"] * torch.nan
                    value = value + terms["covariance"]
                return value, terms

            run.loss.forward = forward
            return run

        monkeypatch.setattr(run_module, "prepare", prepare_broken)

    def test_names_the_term_and_keeps_the_last_good_state(self, start, broken_at_6, capsys):
        status, run_dir = start(DENSE, "run")
        said = capsys.readouterr().err
        assert status == 1
        assert "step 6" in said and "covariance = nan" in said and "--optim.lr" in said
        assert "invariance =" not in said
        state = final(run_dir)
        assert state["step"] == 5 and "step_000000005.pt" in said
        assert all(v.isfinite().all() for v in state["model"].values())

    def test_never_saves_weights_that_are_not_finite(self, start, monkeypatch, capsys):
        step = torch.optim.AdamW.step

        def overflow(self, *args):
            step(self, *args)
            for p in self.param_groups[0]["params"]:
                p.data.fill_(torch.inf)

        monkeypatch.setattr(torch.optim.AdamW, "step", overflow)
        status, run_dir = start(DENSE, "run", "--checkpoint_every", "0.25")
        assert status == 1 and checkpoint.latest(run_dir) is None
        assert "a weight after the update" in capsys.readouterr().err


class TestRefusals:
    @pytest.mark.parametrize(
        ("flags", "words"),
        [
            (["--data", "nowhere.tar"], "nowhere.tar"),
            (["--batch_size", "64"], "--batch_size 64 is larger than the data set, 33 images"),
            (["--encoder.name", "resnet1"], "resnet1"),
            (["--encoder.options.widht", "3"], "widht"),
            (["--head.options.depth", "3"], "depth"),
            (["--loss.name", "vicregg"], "vicreg, emp_ssl"),
            (["--loss.options.sim", "3"], "sim"),
            (["--encoder.patch_size", "16"], "larger than the view"),
            (["--bag.patches", "0"], "must be 1 or more"),
            (["--batch_size", "1"], "take 2 or more"),
            (["--augment.scale", "[0.5,1.5]"], "cannot be larger than the image"),
            (["--device", "cuda"], "--device cpu"),
            (["--cuda_graph", "true"], "one GPU"),
            (["--resume", "nowhere"], "no checkpoint there"),
        ],
        ids=lambda value: "=".join(value) if isinstance(value, list) else None,
    )
    def test_says_the_how_to_fix_and_writes_nothing(self, start, capsys, flags, words):
        if "cuda" in flags and torch.cuda.is_available():
            pytest.skip("there is a GPU")
        status, run_dir = start(DENSE, "run", *flags)
        assert status == 2
        assert words in capsys.readouterr().err
        assert not run_dir.exists()

    def test_a_directory_in_use(self, start, capsys):
        start(DENSE, "run", "--max_steps", "2")
        assert start(DENSE, "run", "--max_steps", "2")[0] == 2
        assert "--overwrite true" in capsys.readouterr().err
        assert start(DENSE, "run", "--max_steps", "2", "--overwrite", "true")[0] == 0


def test_the_seed_alone_draws_the_initial_weights(tmp_path):
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(DENSE))
    config = cli.load(tmp_path / "r.yaml")
    first = build_model(config).state_dict()
    torch.randn(7)
    assert_bitwise_equal(dict(first), dict(build_model(config).state_dict()))


def test_environment_report():
    done = subprocess.run(
        [sys.executable, "-m", "bagssl_fast.env"], capture_output=True, text=True, check=True
    )
    report = json.loads(done.stdout)
    assert report["extension"].startswith("_C") and report["cores"] >= 1
    assert Path(report["argv"][0]).name == "env.py"
