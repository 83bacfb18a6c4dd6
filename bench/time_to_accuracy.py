"""Seconds of training until a kNN and a linear probe reach an accuracy, CIFAR-10, PatchNet, TCR.

    python bench/time_to_accuracy.py [--quick] [--systems ...] [--seeds 3] [--epochs 1]

The bags are those of `configs/cifar10_dense.yaml`: a dense bag has two views of 24 pixels with four
patches of 16 pixels each; the baselines draw eight patches of the same sizes, each with its own
augmentation. Every system trains the same encoder (PatchNet of width 64) from the same weights with
the same optimizer (the recipe's AdamW, its cosine schedule over the whole training), on its own
data path: ours dense and patch by patch, the baselines patch by patch. At intervals the clock is
stopped, and a frozen copy of the encoder embeds bags of 25 patches of the training images and of
some test images for the two probes, in the same way for every system; the embedding is the
hypercolumn of `configs/cifar10_cpu.yaml` (the means of all maps: it has no weights of its own).
Workers that run during that pause gain a few batches at most. The time to a target is interpolated
between the two evaluations around it: `inf` if no evaluation reaches it, 0 if the initialization
does. A training ends when every target is reached. Seeds change the initialization, the order of
the images and their augmentation; they run one after another, so use a quiet machine.
"""

from __future__ import annotations

import argparse
import math
import os
import tempfile
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in throughput.py

import numpy as np
import torch
from torch import Tensor
from torch.optim import lr_scheduler

import throughput
from bagssl_fast.config import OptimConfig
from bagssl_fast.evaluation.features import Plan, dense_bags, fold_batch_norm
from bagssl_fast.evaluation.probes import knn_accuracy, linear_probe
from bagssl_fast.models.bag_model import BagModel
from bagssl_fast.models.encoders import build_encoder
from baselines.step import Setup, System
from harness.cases import TRAINING, Case, Images, prepare_images
from harness.clock import Laps, clock
from harness.common import Report, arguments, paint
from harness.ours import our_model

TARGETS = (0.50, 0.55, 0.60)
EVAL_PATCHES = 25  # of each image
OPTIM = OptimConfig(name="adamw", lr=3e-3, betas=(0.9, 0.99), weight_decay=1e-2)
WARMUP = 0.06  # share of the steps, as in the recipe
CASE = replace(
    TRAINING["cifar-tcr"],
    optim=OPTIM,
    batch=128,
    head={"name": "projector", "hidden": 256, "out": 256, "num_layers": 2},
    patches=8,
    area=(16 / 24) ** 2,
    view=24,
    stride=8,
    views=2,
    view_scale=(0.25, 1.0),
)


Point = tuple[float, float, float]  # seconds of training, kNN, linear
Curves = dict[str, list[list[Point]]]  # by system, one per seed


def labels(images: Images) -> Tensor:
    names = sorted(set(images.classes))
    return torch.tensor([names.index(name) for name in images.classes])


@torch.inference_mode()
def bags(system: System, images: Images) -> Tensor:
    """Embeddings of the images by the system's current encoder, 25 patches each."""
    case = system.case
    trained: Any = system.model
    theirs = (trained.backbone if isinstance(trained, BagModel) else trained.encoder).state_dict()
    backbone: Any = build_encoder(
        case.encoder, case.patch, case.width, options={"hypercolumn": True}
    )
    backbone.load_state_dict(dict(zip(backbone.state_dict(), theirs.values(), strict=True)))
    model: Any = BagModel(backbone, our_model(case).head, True, case.stride)
    model = fold_batch_norm(model).to(system.setup.device, memory_format=torch.channels_last)
    assert images.array is not None
    plan = Plan((EVAL_PATCHES,), -1, len(images), torch.device(system.setup.device))
    features = []
    for part in np.array_split(images.array, max(1, len(images) // 250)):
        pixels = torch.from_numpy(part).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)
        grids = dense_bags(model, pixels.to(plan.device), [EVAL_PATCHES], plan, [EVAL_PATCHES])
        features.append(grids[EVAL_PATCHES][0])
    return torch.cat(features).float().cpu()


def lr_factor(steps: int, step: int) -> float:
    """Linear warmup, then a cosine to zero."""
    warmup = max(1, WARMUP * steps)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / (steps - warmup))


def run(
    system: System, probes: tuple[Images, Images], evaluations: int, first: Point | None
) -> list[Point]:
    """Trains to the end or the highest target.

    Args:
        system: What trains.
        probes: Training images and test images of the probes.
        evaluations: How many after the first one, evenly spread.
        first: The evaluation before the first step, if another system has already done it.
    """
    laps, curve, seconds = Laps(clock(system.setup.device)), [first] if first else [], 0.0
    schedule = lr_scheduler.LambdaLR(system.optimizer, partial(lr_factor, system.setup.steps))

    def evaluate(step: int) -> bool:
        train, test = (bags(system, images) for images in probes)
        y, t = (labels(images) for images in probes)
        knn = knn_accuracy(train, y, test, t)
        linear = linear_probe(train, y, test, t).accuracy
        curve.append((seconds, knn, linear))
        print(f"    step {step}, {seconds:.1f} s: kNN {knn:.1%}, linear {linear:.1%}", flush=True)
        return min(knn, linear) >= max(TARGETS)

    if not first:
        evaluate(0)
    steps = system.setup.steps
    due = {round(steps * (i + 1) / evaluations) for i in range(evaluations)}
    for step, _ in enumerate(system.steps(laps), start=1):
        schedule.step()
        if step not in due:
            continue
        seconds += sum(laps.seconds().values())
        if evaluate(step):
            break
        laps.start()  # the pause does not count
    return curve


def seconds_to(target: float, curve: list[Point], probe: int) -> float:
    """When a curve reaches an accuracy, linear between evaluations; inf if it does not."""
    for before, after in pairwise([curve[0], *curve]):
        if after[probe] >= target:
            gained = after[probe] - before[probe]
            share = (target - before[probe]) / gained if gained > 0 else 1.0
            return before[0] + share * (after[0] - before[0])
    return math.inf


def parse() -> argparse.Namespace:
    parser = arguments(__doc__, data=True)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--systems",
        nargs="+",
        choices=[*throughput.SYSTEMS],
        default=["bagssl_fast_dense", "bagssl_fast", "torch_kornia"],
        metavar="SYSTEM",
        help="as in throughput.py",
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--images", type=int, default=50_000, help="training images")
    parser.add_argument("--bank", type=int, default=50_000, help="training images of the probes")
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--evaluations", type=int, default=4, help="during a training")
    parser.add_argument("--plot", type=Path, metavar="PNG")
    o = parser.parse_args()
    if o.quick:
        o.seeds, o.images, o.evaluations, o.epochs = 1, min(o.images, 640), 2, 1.0
    return o


def trainings(o: argparse.Namespace, folder: Path) -> Curves:
    """Trains every system from every seed."""
    case: Case = replace(CASE, batch=64 if o.quick else CASE.batch)
    bank_images, test_images = (200, 100) if o.quick else (o.bank, 2_000)
    images = prepare_images("cifar", o.data, o.images, folder)
    test = prepare_images("cifar-test", o.data, test_images, folder)
    bank = images
    if bank_images != len(images):
        bank = prepare_images("cifar", o.data, bank_images, folder)
    steps = max(1, int(o.epochs * len(images) / case.batch))
    curves: Curves = {name: [] for name in o.systems}
    for seed in range(o.seeds):
        weights = [p.detach() for p in our_model(case, seed=seed).parameters()]
        first = None
        setup = Setup(case, images, weights, steps, o.device, o.threads, seed=seed)
        for name in o.systems:
            torch.manual_seed(seed)
            print(f"  {paint(name, 'bold')}, seed {seed}, {steps} steps")
            system = throughput.import_system(throughput.SYSTEMS[name][0])(setup)
            curve = run(system, (bank, test), o.evaluations, first)
            first = curve[0]
            system.close()
            curves[name].append(curve)
    return curves


def record(report: Report, curves: Curves) -> None:
    """Rows: the seconds to each target and the best accuracy, one sample per seed."""

    def add(name: str, metric: str, values: list[float], unit: str) -> None:
        report.add("cifar-tcr, 8 patches", name, metric, values, unit)
        print(f"  {name:24}{metric:24}" + "  ".join(f"{v:.3g}" for v in values) + f" {unit}")

    for name, runs in curves.items():
        for i, probe in ((1, "kNN"), (2, "linear")):
            for target in TARGETS:
                seconds = [seconds_to(target, curve, i) for curve in runs]
                add(name, f"seconds to {target:.0%} {probe}", seconds, "s")
            best = [max(point[i] for point in curve) for curve in runs]
            add(name, f"best {probe}", best, "fraction")


def draw(curves: Curves, machine: str, path: Path) -> None:
    from harness.plots import draw_runs

    panels = {
        probe: {
            name: [[(point[0], 100 * point[i]) for point in curve] for curve in runs]
            for name, runs in curves.items()
        }
        for i, probe in ((1, "kNN"), (2, "linear probe"))
    }
    draw_runs(panels, machine, path)


def main() -> None:
    o = parse()
    torch.set_num_threads(o.threads)
    report = Report("time_to_accuracy", o.threads)
    with tempfile.TemporaryDirectory(prefix="time_to_accuracy_") as work:
        curves = trainings(o, Path(work))
    record(report, curves)
    report.save(o.json, o.csv)
    if o.plot:
        draw(curves, report.machine, o.plot)


if __name__ == "__main__":
    main()
