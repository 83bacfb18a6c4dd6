"""Evaluates a run: bags of several sizes, kNN and linear probe, trained and random network."""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bagssl_fast import cli
from bagssl_fast.config import Config, patch_size
from bagssl_fast.distributed import ranks
from bagssl_fast.evaluation.datasets import Data, count, find_test_data, open_data
from bagssl_fast.evaluation.features import (
    CALIBRATION_BATCHES,
    Features,
    Plan,
    bag_mean,
    extract,
    make_plan,
    random_network,
    view_size,
)
from bagssl_fast.evaluation.probes import knn_accuracy, knn_space, linear_probe
from bagssl_fast.evaluation.quality import collapse
from bagssl_fast.evaluation.report import draw, table
from bagssl_fast.files import write_atomic
from bagssl_fast.machine import cores
from bagssl_fast.models import saved
from bagssl_fast.models.bag_model import BagModel
from bagssl_fast.terminal import say

RANK_ROWS = 2048
SPACES = {
    "rooted": "whose square roots are whitened by the covariance of the training images'",
    "whitened": "whitened by the covariance of the training images'",
    "standardized": "of which each feature has the mean 0 and the variance 1 in training images",
    "centered": "minus the mean of the training images'",
}


@dataclass(frozen=True)
class Evaluation:
    """An evaluation about to be made.

    Args:
        run: The run directory.
        out: Where evaluations/, eval.json and eval.png go.
        own: Whether eval.json and eval.png become this one: of the run's own images, or in a
            directory named for it.
        config: The run's configuration, with what overrides it.
        model: The trained model.
        step: Its training step.
        data: The images.
        device: Where the model runs.
    """

    run: Path
    out: Path
    own: bool
    config: Config
    model: BagModel
    step: int
    data: Data
    device: torch.device


def prepare(
    run_dir: str | os.PathLike[str],
    config: Config | None = None,
    out: str | os.PathLike[str] | None = None,
) -> Evaluation:
    """Opens all that an evaluation needs; arguments as of `evaluate`.

    Raises:
        ValueError, OSError: For what the user can fix; nothing has been written by then.
    """
    run_dir = Path(run_dir)
    has_config = config is None or (run_dir / "config.yaml").is_file()
    trained = saved.load_config(run_dir) if has_config else None
    config = config or trained
    assert config is not None
    device = ranks.pick_device(config.device)
    torch.set_num_threads(config.threads or cores())
    loaded = saved.load(run_dir, config)
    data = open_data(config, trained.data if trained else None)
    own = (
        out is not None
        or not (run_dir / "config.yaml").is_file()  # an exported model knows no images
        or (trained is not None and images(trained) == images(config))
    )
    model, out = loaded.model.to(device), Path(out or run_dir)
    return Evaluation(run_dir, out, own, config, model, loaded.step, data, device)


def images(config: Config) -> tuple[str, str | None]:
    """The images of an evaluation by name."""
    return config.data, config.test_data or find_test_data(config.data)


def evaluate(
    run_dir: str | os.PathLike[str],
    config: Config | None = None,
    out: str | os.PathLike[str] | None = None,
) -> dict[str, Any]:
    """Evaluates a run and writes evaluations/<time>.json and .png.

    On the run's own images, or into `out`, eval.json and eval.png become copies of them.

    Args:
        run_dir: A run directory that `train` made.
        config: Its configuration, to override; by default the one it holds.
        out: Where the files go; by default the run directory.

    Returns:
        What the .json holds.

    Raises:
        ValueError, OSError: If the directory holds no model or the data cannot be found.
    """
    return carry_out(prepare(run_dir, config, out))


def carry_out(this: Evaluation) -> dict[str, Any]:
    """As `evaluate`, from what `prepare` gave."""
    started = time.monotonic()
    config, data = this.config, this.data
    say(f"evaluate {this.run} (step {this.step}) on {this.device}: {data.note}")
    networks = {"trained": this.model}
    if config.eval.random:
        networks["random"] = random_network(config, data.train, this.device)
    plan = make_plan(config, this.model, this.device)
    rows: list[dict[str, Any]] = []
    for name, model in networks.items():
        limit = config.eval.random_patches if name == "random" else max(plan.counts)
        counts = tuple(n for n in plan.counts if n <= limit)
        rows += measure(name, model, config, data, replace(plan, counts=counts))
    result = {
        "run": str(this.run),
        "step": this.step,
        "train_images": count(data.train, data.train_indices),
        "test_images": count(data.test, data.test_indices),
        "classes": data.train.classes,
        "settings": asdict(config.eval) | cli.eval_identity(config),
        "notes": notes(config, data, plan),
        "seconds": round(time.monotonic() - started, 1),
        "results": rows,
    }
    say(table(result))
    write(this, result)
    return result


def write(this: Evaluation, result: dict[str, Any]) -> None:
    """Keeps a result and its picture beside earlier ones."""
    text = (json.dumps(result, indent=1) + "\n").encode()
    path = new_name(this.out / "evaluations", ".json")
    write_atomic(path, text)
    picture, said = draw(result)
    if picture:
        write_atomic(path.with_suffix(".png"), picture)
    if this.own:
        (this.out / "eval.png").unlink(missing_ok=True)  # never beside the table of another
        write_atomic(this.out / "eval.json", text)
        if picture:
            write_atomic(this.out / "eval.png", picture)
        path = this.out / "eval.json"
    say(f"curve    {path.with_suffix('.png') if picture else said}")
    say(f"written  {path} after {result['seconds']} s")


def new_name(folder: Path, suffix: str) -> Path:
    """A name that is free and sorts after earlier ones: the time, to the microsecond."""
    while True:
        path = folder / f"{datetime.now():%Y%m%d-%H%M%S-%f}{suffix}"
        if not path.exists():
            return path


def measure(
    name: str, model: BagModel, config: Config, data: Data, plan: Plan
) -> list[dict[str, Any]]:
    """One row of results per layer and number of patches, and one per grid of regions."""
    started = time.monotonic()
    train, train_labels = extract(model, config, data.train, plan, data.train_indices)
    test: Features = {}
    test_labels = None
    if data.labeled:
        test, test_labels = extract(model, config, data.test, plan, data.test_indices)
    say(f"features {name}: {time.monotonic() - started:.1f} s")
    rows = []
    for layer, patches in list(train):
        # Popped: side by side, the regions of one bag may need more memory than all other features.
        x, y = train.pop((layer, patches)), test.pop((layer, patches), None)
        regions = plan.regions(patches)
        row: dict[str, Any] = {"network": name, "layer": layer, "patches": patches or "center"}
        mean = bag_mean(x, regions)
        rows.append(row | {"grid": 1} | collapse(mean, sample=RANK_ROWS))
        if y is None or train_labels is None or test_labels is None:
            continue
        rows[-1] |= accuracies(mean, train_labels, bag_mean(y, regions), test_labels, layer, config)
        if regions > 1:
            read = accuracies(x, train_labels, y, test_labels, layer, config)
            rows.append(row | {"grid": regions} | read)
    say(f"probes   {name}: {time.monotonic() - started:.1f} s with the features")
    return rows


def accuracies(
    train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, layer: str, c: Config
) -> dict[str, Any]:
    """The probes' part of a row."""

    def knn(train: Tensor, test: Tensor) -> float:
        vote = {"k": c.eval.knn_k, "temperature": c.eval.knn_t}
        return knn_accuracy(train, train_labels, test, test_labels, **vote)  # type: ignore[arg-type]

    row: dict[str, Any] = {"knn": knn(train, test)}
    space = c.eval.knn_space
    if space != "plain" and layer == "h":
        row[f"knn_{space}"] = knn(*knn_space(train, test, space))
    data = train, train_labels, test, test_labels
    probe = linear_probe(*data, method=c.eval.probe, seed=c.seed)
    row |= {"linear": probe.accuracy, "linear_held_out": probe.held_out}
    return row | {"penalty": probe.penalty}


def notes(config: Config, data: Data, plan: Plan) -> list[str]:
    """What a reader of the numbers has to know."""
    lines = [data.note]
    if config.eval.random:
        lines.append(
            f"random: the network of seed {config.seed} at initialization, its batch-norm "
            f"statistics averaged over {CALIBRATION_BATCHES} batches of training bags; measured up "
            f"to {config.eval.random_patches} patches (--random_patches)"
        )
    lines.append(
        f"linear: {config.eval.probe} on standardized features, penalty chosen on held-out "
        f"training images; kNN: k {config.eval.knn_k}, T {config.eval.knn_t}, cosine"
    )
    if data.labeled and config.eval.knn_space != "plain":
        lines.append(
            f"{config.eval.knn_space}: the same kNN on embeddings {SPACES[config.eval.knn_space]}"
        )
    if data.labeled and config.eval.grid > 1:
        lines.append(
            f"{config.eval.grid}x{config.eval.grid}: the mean of each of so many regions of the "
            "bag, side by side; all other rows read the bag's mean"
        )
    missing = sorted(set(config.eval.patches) - set(plan.counts))
    if missing:
        lines.append(
            f"left out: bags of {', '.join(map(str, missing))} patches, for which a view of "
            f"{view_size(config)} pixels is too small (a patch has {patch_size(config)})"
        )
    if not data.labeled:
        lines.append(
            "no labels: kNN and linear probe need them (one folder per class, see README); the "
            "spread and the effective rank of the features are reported all the same"
        )
    return lines
