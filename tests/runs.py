"""Tiny runs of the trainer, for the tests of whole runs."""

import json
import os
import signal

import numpy as np
import pytest
import torch
import yaml

from bagssl_fast import train
from bagssl_fast.training import checkpoint
from bagssl_fast.training.meter import Meter

STEPS_PER_EPOCH, EPOCHS = 4, 3
DENSE = {
    "epochs": EPOCHS,
    "batch_size": 8,
    "log_every": 2,
    "checkpoint_every": 1.0,
    "threads": 1,
    "device": "cpu",
    "bag": {"patches": 2, "dense": True, "stride": 4},
    "augment": {"size": 12, "scale": [0.5, 1.0]},
    "encoder": {"name": "patchnet", "patch_size": 8, "width": 4},
    "head": {"hidden": 16, "out": 8, "num_layers": 2},
    "loss": {"name": "vicreg"},
    "optim": {"name": "adamw", "lr": 1e-2, "warmup_epochs": 0.5},
    "ema": 0.9,
}
# Each patch on its own, two augmentations, EMP-SSL's head, loss and optimizer.
PATCHES = {
    **DENSE,
    "bag": {"patches": 4},
    "augment": {"size": 8, "scale": [0.3, 0.3]},
    "augment_odd": {"size": 8, "scale": [0.3, 0.3], "solarize_prob": 0.5},
    "head": {"name": "emp", "hidden": 16, "out": 8},
    "loss": {"name": "emp_ssl", "options": {"patch_sim": 20.0}},
    "optim": {"name": "sgd_lars", "lr": 0.1},
    "ema": 0.0,
}


@pytest.fixture
def tiny_images(tmp_path):
    return write_tiny_images(tmp_path / "images.npz")


def write_tiny_images(path):
    """33 noisy images of 3 classes: an epoch drops the last one."""
    rng = np.random.default_rng(0)
    labels = np.arange(33) % 3
    base = rng.integers(0, 255, (3, 16, 16, 3))
    pixels = np.clip(base[labels] + rng.integers(-40, 40, (33, 16, 16, 3)), 0, 255)
    np.savez(path, images=pixels.astype(np.uint8), labels=labels)
    return path


@pytest.fixture
def start(tiny_images, tmp_path):
    """Runs the program in this process: start(recipe, run, flags...) -> (status, run directory)."""

    def run(recipe, name, *flags):
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(recipe))
        common = [
            "--config",
            str(path),
            "--data",
            str(tiny_images),
            "--run_dir",
            str(tmp_path / name),
        ]
        return train.main([*common, *flags]), tmp_path / name

    return run


def final(run_dir):
    return checkpoint.load(checkpoint.latest(run_dir))


def records(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def interrupt_after(monkeypatch, steps, number=signal.SIGUSR1):
    """Sends this process a signal while it works on a step of the run."""
    add = Meter.add

    def add_and_interrupt(self, *args):
        add(self, *args)
        if self.run.step + 1 == steps:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(Meter, "add", add_and_interrupt)


def assert_bitwise_equal(a, b, where=""):
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_bitwise_equal(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_bitwise_equal(x, y, f"{where}/{i}")
    elif isinstance(a, torch.Tensor):
        assert a.equal(b), where
    else:
        assert a == b, where
