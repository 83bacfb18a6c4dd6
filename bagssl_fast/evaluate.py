"""Evaluate a run: `python -m bagssl_fast.evaluate RUN [--patches 1,4,16,64,256] ...`.

For each number of patches the embeddings of a grid of unaugmented patches are averaged, and a
weighted kNN and a linear probe read the class from the bag: for the trained network and for the
same network at its random initialisation, for embedding h and projection z. Beside them stands the
central crop: the whole central square, shrunk to the size of one patch.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import islice
from pathlib import Path
from typing import Any

if __name__ == "__main__" and "torch" not in sys.modules:
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in train.py

import safetensors.torch
import torch
from torch import Tensor

from bagssl_fast import checkpoint, cli, env, ranks
from bagssl_fast.config import Config, EvalConfig, check_eval, patch_size
from bagssl_fast.data import BagLoader, Source, open_source
from bagssl_fast.features import (
    CENTER,
    Features,
    Plan,
    calibrate,
    extract,
    is_dense,
    view_size,
)
from bagssl_fast.metrics import collapse, say
from bagssl_fast.model import BagModel, build_model
from bagssl_fast.probes import knn_accuracy, linear_probe
from bagssl_fast.report import draw, table

CALIBRATION_BATCHES = 20
RANK_ROWS = 2048


@dataclass(frozen=True)
class Data:
    """The images of an evaluation; `indices` is None for all of a source."""

    train: Source
    train_indices: Tensor | None
    test: Source
    test_indices: Tensor | None
    note: str

    @property
    def labelled(self) -> bool:
        return self.train.labels is not None and self.test.labels is not None


def evaluate(run_dir: str | os.PathLike[str], config: Config | None = None) -> dict[str, Any]:
    """Evaluates a run and writes eval.json and eval.png into its directory.

    Args:
        run_dir: A run directory that `train` made.
        config: Its configuration, to override; by default the one it holds.

    Returns:
        What eval.json holds.

    Raises:
        ValueError, OSError: If the directory holds no model or the data cannot be found.
    """
    started = time.monotonic()
    run_dir = Path(run_dir)
    config = config or load_config(run_dir)
    device = ranks.pick_device(config.device)
    torch.set_num_threads(config.threads or env.cores())
    trained, step = load_model(run_dir, config)
    data = open_data(config)
    say(f"evaluate {run_dir} (step {step}) on {device}: {data.note}")

    networks = {"trained": trained.to(device)}
    if config.eval.random:
        networks["random"] = random_network(config, data.train, device)
    plan = make_plan(config, trained, device)
    rows: list[dict[str, Any]] = []
    for name, model in networks.items():
        limit = config.eval.random_patches if name == "random" else max(plan.counts)
        counts = tuple(n for n in plan.counts if n <= limit)
        rows += measure(name, model, config, data, replace(plan, counts=counts))
    result = {
        "run": str(run_dir),
        "step": step,
        "train_images": count(data.train, data.train_indices),
        "test_images": count(data.test, data.test_indices),
        "classes": data.train.classes,
        "settings": asdict(config.eval),
        "notes": notes(config, data, plan),
        "seconds": round(time.monotonic() - started, 1),
        "results": rows,
    }
    text = json.dumps(result, indent=1) + "\n"
    checkpoint.write_atomic(run_dir / "eval.json", text.encode())
    say(table(result))
    say(draw(result, run_dir / "eval.png"))
    say(f"written  {run_dir / 'eval.json'} after {result['seconds']} s")
    return result


def load_config(run_dir: Path) -> Config:
    """The configuration of a run.

    Raises:
        ValueError: If the directory is no run.
    """
    path = run_dir / "config.yaml"
    if not path.is_file():
        raise ValueError(
            f"{run_dir} is no run directory (it has no config.yaml): give the directory that "
            "`python -m bagssl_fast.train` named in its first line"
        )
    return cli.load(path)


def load_model(run_dir: Path, config: Config | None = None) -> tuple[BagModel, int]:
    """The trained model of a run, in eval mode on the CPU, and the step it was saved at.

    Raises:
        ValueError: If the run holds no model.
    """
    weights = run_dir / "model.safetensors"
    if not weights.is_file():
        raise ValueError(
            f"{run_dir} holds no model.safetensors: its training has not come to a checkpoint; "
            f"go on with python -m bagssl_fast.train --config {run_dir / 'config.yaml'} "
            f"--run_dir {run_dir} --resume auto"
        )
    model = build_model(config or load_config(run_dir), pretrained=False)
    model.load_state_dict(safetensors.torch.load_file(weights))
    step = json.loads((run_dir / "config.json").read_text(encoding="utf-8"))["step"]
    return model.eval(), int(step)


def random_network(config: Config, source: Source, device: torch.device) -> BagModel:
    """The network as training found it, its batch-norm statistics taken from training bags."""
    model = build_model(config, pretrained=False).to(device)
    odd = config.augment_odd
    with BagLoader(
        source,
        batch_size=min(config.batch_size, len(source)),
        patches=config.bag.patches,
        augment=config.augment if odd is None else (config.augment, odd),
        seed=config.seed,
        on_error=config.loader.on_error,
    ) as loader:

        def bags() -> Iterator[Tensor]:
            for batch in islice(loader, CALIBRATION_BATCHES):
                yield batch.patches.to(device)

        calibrate(model, bags())
    return model


def make_plan(config: Config, model: BagModel, device: torch.device) -> Plan:
    """What the configuration asks to extract, as far as an image has so many patches."""
    bf16 = device.type == "cuda" and config.precision in ("auto", "bf16")
    counts = sorted(set(config.eval.patches))
    if is_dense(model):
        places = (view_size(config) - patch_size(config) + 1) ** 2
        counts = [count for count in counts if count <= places]
    return Plan(
        counts=(CENTER, *counts),
        projection_up_to=config.eval.projection_patches,
        batch_size=config.eval.batch_size or (32 if device.type == "cpu" else 256),
        device=device,
        precision=torch.bfloat16 if bf16 else torch.float32,
        num_threads=config.loader.num_threads,
        on_error=config.loader.on_error,
    )


def measure(
    name: str, model: BagModel, config: Config, data: Data, plan: Plan
) -> list[dict[str, Any]]:
    """One row of results per layer and number of patches."""
    started = time.monotonic()
    train, train_labels = extract(model, config, data.train, plan, data.train_indices)
    test: Features = {}
    test_labels = None
    if data.labelled:
        test, test_labels = extract(model, config, data.test, plan, data.test_indices)
    say(f"features {name}: {time.monotonic() - started:.1f} s")
    rows = []
    for (layer, patches), x in train.items():
        row: dict[str, Any] = {"network": name, "layer": layer, "patches": patches or "center"}
        row |= collapse(x, sample=RANK_ROWS)
        if train_labels is not None and test_labels is not None:
            arguments = (x, train_labels, test[layer, patches], test_labels)
            row["knn"] = knn_accuracy(
                *arguments, k=config.eval.knn_k, temperature=config.eval.knn_t
            )
            probe = linear_probe(*arguments, method=config.eval.probe, seed=config.seed)
            row |= {"linear": probe.accuracy, "linear_held_out": probe.held_out}
            row["penalty"] = probe.penalty
        rows.append(row)
    say(f"probes   {name}: {time.monotonic() - started:.1f} s with the features")
    return rows


# --- data -----------------------------------------------------------------------------------------


def open_data(config: Config) -> Data:
    """Finds the images: `test_data`, else the set that the name points to, else a held-out part."""
    on_error = config.loader.on_error
    train = open_source(config.data, on_error=on_error)
    limit, test_limit = config.eval.max_train_images, config.eval.max_test_images
    found = config.test_data or find_test_data(config.data)
    generator = torch.Generator().manual_seed(config.seed)
    if found is not None:
        test = open_source(found, on_error=on_error)
        if train.labels is not None and test.labels is not None and train.classes != test.classes:
            raise ValueError(
                f"{found} has other classes than {config.data}: {test.classes} and "
                f"{train.classes}; name the right one with --test-data"
            )
        how = "" if config.test_data else " (found by its name)"
        picked = subset(len(train), limit, generator), subset(len(test), test_limit, generator)
        note = f"trained on {config.data}, tested on {found}{how}"
        return Data(train, picked[0], test, picked[1], note)
    order = torch.randperm(len(train), generator=generator)
    cut = max(1, round(len(train) * config.eval.test_fraction))
    held, kept = order[:cut], order[cut:]
    if len(kept) == 0:
        raise ValueError(f"{config.data}: {len(train)} images are too few to split; --test-data")
    note = (
        f"no test set beside {config.data}: {len(held)} of its images are held out from the probes "
        "(the encoder has seen them, without labels); name a test set with --test-data"
    )
    held = held[: test_limit or None].sort().values
    return Data(train, kept[: limit or None].sort().values, train, held, note)


def find_test_data(data: str) -> str | None:
    """The test set that a training set's name points to, if it is there.

    `x-train.tar` -> `x-test.tar` (also val), a folder `train` -> `test` or `val` beside it, and the
    other split of the sets that have their own (demo, CIFAR, MNIST).
    """
    if data.endswith(":train"):
        return data.removesuffix("train") + "test"
    if data == "demo":
        return "demo:test"
    path = Path(data)
    for word in ("test", "val"):
        name = path.name.replace("train", word)
        if name != path.name and path.with_name(name).exists():
            return str(path.with_name(name))
    if path.is_dir():
        try:
            open_source(f"{data}:test")
        except (ValueError, OSError):
            return None
        return f"{data}:test"
    return None


def subset(size: int, limit: int, generator: torch.Generator) -> Tensor | None:
    """At most `limit` indices drawn from `size`, in order; None for all of them."""
    if limit <= 0 or limit >= size:
        return None
    return torch.randperm(size, generator=generator)[:limit].sort().values


def count(source: Source, indices: Tensor | None) -> int:
    """Number of images."""
    return len(source) if indices is None else len(indices)


def notes(config: Config, data: Data, plan: Plan) -> list[str]:
    """What a reader of the numbers has to know."""
    lines = [data.note]
    if config.eval.random:
        lines.append(
            f"random: the network of seed {config.seed} at initialisation, its batch-norm "
            f"statistics averaged over {CALIBRATION_BATCHES} batches of training bags; measured up "
            f"to {config.eval.random_patches} patches (--random-patches)"
        )
    lines.append(
        f"linear: {config.eval.probe} on standardised features, penalty chosen on held-out "
        f"training images; kNN: k {config.eval.knn_k}, T {config.eval.knn_t}, cosine"
    )
    missing = sorted(set(config.eval.patches) - set(plan.counts))
    if missing:
        lines.append(
            f"left out: bags of {', '.join(map(str, missing))} patches, for which a view of "
            f"{view_size(config)} pixels has not the room (a patch has {patch_size(config)})"
        )
    if not data.labelled:
        lines.append(
            "no labels: kNN and linear probe need them (one folder per class, see README); the "
            "spread and the effective rank of the features are reported all the same"
        )
    return lines


# --- command line ---------------------------------------------------------------------------------


def make_parser() -> argparse.ArgumentParser:
    """The parser of the evaluation's command line; what is left out comes from the run."""
    parser = argparse.ArgumentParser("python -m bagssl_fast.evaluate", description=__doc__)
    parser.add_argument("run", type=Path, help="run directory")
    parser.add_argument("--data", help="training images of the probes (default: the run's)")
    parser.add_argument("--test-data", "--test_data", help="test images")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--threads", type=int, help="CPU threads, 0 = all cores")
    group = parser.add_argument_group("what is measured (defaults: the run's `eval` section)")
    group.add_argument("--patches", help="numbers of patches, e.g. 1,4,16,64,256")
    group.add_argument("--projection-patches", type=int, help="largest bag for the projection")
    group.add_argument("--no-random", action="store_true", help="leave the random network out")
    group.add_argument("--random-patches", type=int, help="largest bag of the random network")
    group.add_argument("--max-train-images", type=int, help="0 = all")
    group.add_argument("--max-test-images", type=int, help="0 = all")
    group.add_argument("--batch-size", type=int, help="images per forward pass")
    group.add_argument("--probe", choices=("ridge", "logistic"))
    group.add_argument("--knn-k", type=int)
    return parser


def override(config: Config, options: argparse.Namespace) -> Config:
    """The run's configuration with the flags over it."""
    given = {key: value for key, value in vars(options).items() if value is not None}
    top = {key: given[key] for key in ("data", "test_data", "device", "threads") if key in given}
    names = {field.name for field in fields(EvalConfig)} - {"patches"}
    inner: dict[str, Any] = {key: given[key] for key in names if key in given}
    if "patches" in given:
        try:
            inner["patches"] = tuple(int(n) for n in given["patches"].strip("[]").split(","))
        except ValueError:
            raise ValueError(
                f"--patches {given['patches']}: numbers with commas are wanted, such as 1,4,16"
            ) from None
    if given["no_random"]:
        inner["random"] = False
    return replace(config, **top, eval=replace(config.eval, **inner))


def main(argv: Sequence[str] | None = None) -> int:
    """The program. Returns 0, or 2 for wrong usage."""
    options = make_parser().parse_args(argv)
    try:
        config = override(load_config(options.run), options)
        check_eval(config.eval)
        evaluate(options.run, config)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
