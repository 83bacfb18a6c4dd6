"""Train a model or reuse a finished one; what a study can ask for (`Context`).

A model's folder is named by a hash of all that decides its weights: the trainer's identity of its
configuration and the fingerprint of its images. An interrupted training resumes from its
checkpoint; a finished one is reused by every study and by later analyses.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from bagssl_fast import cli, machine
from bagssl_fast.config import Config, patch_size, resolve
from bagssl_fast.data import open_source
from bagssl_fast.distributed import ranks
from bagssl_fast.evaluation.datasets import Data, open_data
from bagssl_fast.evaluation.features import random_network
from bagssl_fast.exits import Stopped
from bagssl_fast.files import write_atomic
from bagssl_fast.models import saved
from bagssl_fast.models.bag_model import BagModel
from bagssl_fast.terminal import say
from bagssl_fast.training import checkpoint
from bagssl_fast.training.guard import Diverged
from bagssl_fast.training.loop import train
from bagssl_fast.training.run import prepare

DONE = "done.json"
# Options of losses whose defaults do not work here, and losses of normalized projections. With
# w = 1 the spectral loss of unit vectors collapses to two directions; w = 10 spreads them.
LOSS_OPTIONS: dict[str, dict[str, Any]] = {"spectral": {"w": 10.0}}
NORMALIZED = {"emp_ssl", "spectral"}
TARGET_MOMENTUM = {"byol": 0.99}


@dataclass
class Context:
    """What a study may use: the data, the output directory, and models.

    Args:
        base: The recipe that every model is derived from; its `data`, `device` and `threads` apply.
        out: The output directory.
        seeds: Seeds of the trainings, at least one.
        quick: Whether to take a quick look instead of a measurement.
        costs: Seconds that the models and scores used by the present study took, by their paths in
            the output directory, whenever they were made.
        spent: Seconds that making some of them has taken by now.
    """

    base: Config
    out: Path
    seeds: tuple[int, ...] = (0,)
    quick: bool = False
    costs: dict[str, float] = field(default_factory=dict, repr=False)
    spent: float = 0.0
    _data: Data | None = field(default=None, repr=False)
    _fingerprint: str = field(default="", repr=False)

    def config(
        self,
        *,
        seed: int = 0,
        side: float | None = None,
        loss: str | None = None,
        **changes: Any,
    ) -> Config:
        """The recipe with another crop, loss or seed; patches are always cut one by one.

        Args:
            seed: Of the weights and of the bags.
            side: Side of the square fixed-scale patch as a fraction of the image's; 0 for
                multi-scale crops (0.08 to 1 of the area, the usual ratios); None leaves the recipe.
            loss: Name of the loss; None leaves the recipe's.
            changes: Further fields of `Config`, such as `epochs=1` or `bag=BagConfig(...)`.
        """
        config = replace(self.base, seed=seed, **changes)
        config = replace(
            config,
            bag=replace(config.bag, dense=False),
            augment=replace(config.augment, size=patch_size(config)),
        )
        if side is not None:
            scale, ratio = ((0.08, 1.0), (0.75, 4 / 3)) if side == 0 else ((side**2,) * 2, (1, 1))
            augment = replace(config.augment, scale=scale, ratio=(float(ratio[0]), float(ratio[1])))
            bag = replace(config.bag, image_size=0)
            config = replace(config, augment=augment, augment_odd=None, bag=bag)
        if loss is not None and loss != config.loss.name:
            options = LOSS_OPTIONS.get(loss, {})
            head = config.head.options | {"normalize": loss in NORMALIZED}
            config = replace(
                config,
                loss=replace(config.loss, name=loss, options=dict(options)),
                head=replace(config.head, options=head, momentum=TARGET_MOMENTUM.get(loss, 0.0)),
            )
        return resolve(config)

    def settings(self) -> dict[str, Any]:
        """Everything besides the code that a study's result depends on."""
        return {
            "recipe": cli.identity(self.base),
            "eval": json.loads(json.dumps(asdict(self.base.eval))),
            "images": self.fingerprint,
            "seeds": list(self.seeds),
            "quick": self.quick,
        }

    @property
    def fingerprint(self) -> str:
        """Of the training images."""
        if not self._fingerprint:
            self._fingerprint = str(open_source(self.base.data).fingerprint)
        return self._fingerprint

    @property
    def device(self) -> torch.device:
        """Where models run."""
        return ranks.pick_device(self.base.device)

    @property
    def images(self) -> Data:
        """Labeled images for the measurements: a training subset and a test set."""
        if self._data is None:
            self._data = open_data(self.base, self.base.data)
        return self._data

    def run_dir(self, config: Config) -> Path:
        """The folder of a model."""
        identity = cli.identity(config) | {"data": self.fingerprint}
        text = json.dumps(identity, sort_keys=True, default=str)
        key = hashlib.sha256(text.encode()).hexdigest()[:12]
        return self.out / "models" / f"{config.loss.name}-{key}"

    def train(self, config: Config, label: str = "") -> Path:
        """Trains a model, resumes its training, or finds it finished.

        Args:
            config: From `Context.config`.
            label: Its name on the terminal.

        Returns:
            Its run directory, which holds model.safetensors.

        Raises:
            Stopped: If a signal came; calling again resumes.
            Diverged: If the loss is not finite.
        """
        folder = self.run_dir(config)
        if (folder / DONE).is_file():
            self.used(folder, json.loads((folder / DONE).read_text(encoding="utf-8"))["seconds"])
            return folder
        config = replace(config, run_dir=str(folder), resume="auto")
        say(f"  training {label or folder.name}")
        started = time.monotonic()
        folder.mkdir(parents=True, exist_ok=True)
        log = open(folder / "train.log", "a", encoding="utf-8")  # noqa: SIM115
        with log, contextlib.redirect_stdout(log):
            run = prepare(config, ranks.Ranks(device=self.device))
            try:
                train(run)
            except Diverged as error:
                raise Diverged(f"{label or folder.name}: {error}") from error
            except Stopped as stop:
                text = f"stopped in the training of {label or folder.name}"
                raise Stopped(stop.number, f"{text}; the same command resumes it") from None
            finally:
                run.close()
        seconds = self.made(folder, started)
        text = json.dumps({"seconds": seconds, "steps": run.step}) + "\n"
        write_atomic(folder / DONE, text.encode())
        for path in (folder / checkpoint.FOLDER).glob("*.pt"):
            path.unlink()  # the exported weights are all that is read from now on
        say(f"  trained {label or folder.name}: {run.step} steps, {seconds} s")
        return folder

    def made(self, path: Path, started: float) -> float:
        """Records what a model or its scores have cost since `started`; returns the seconds."""
        seconds = round(time.monotonic() - started, 1)
        self.spent += seconds
        self.used(path, seconds)
        return seconds

    def used(self, path: Path, seconds: float) -> None:
        """Records what a finished model, or its scores, had cost."""
        self.costs[str(path.relative_to(self.out))] = seconds

    def model(self, config: Config, label: str = "") -> BagModel:
        """The trained model of a configuration, in eval mode, on the device."""
        return saved.load(self.train(config, label), config).model.to(self.device)

    def random_model(self, config: Config) -> BagModel:
        """The same network at its random initialization, its batch-norm statistics calibrated."""
        with contextlib.redirect_stdout(sys.stderr):
            return random_network(config, self.images.train, self.device)


def prepare_threads(config: Config) -> None:
    """Sets torch's number of threads as configured."""
    torch.set_num_threads(config.threads or machine.cores())
