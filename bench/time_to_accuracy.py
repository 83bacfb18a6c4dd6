"""Seconds of training until a kNN and a linear probe reach an accuracy, CIFAR-10, PatchNet, TCR.

    python bench/time_to_accuracy.py [--short | --quick] [--systems ...] [--seeds 3] [--epochs 1]

The bags are those of `configs/cifar10_dense.yaml`: a dense bag has two views of 24 pixels with four
patches of 16 pixels each; the baselines draw eight patches of the same sizes, each with its own
augmentation. Every system trains the same encoder (PatchNet of width 64) from the same weights with
the same optimizer (the recipe's AdamW, its cosine schedule over the whole training), on its own
data path: ours dense and patch by patch, the baselines patch by patch. Before it trains, its loss
and gradient are compared with the float64 reference, as in `throughput.py`.

All train the same number of steps, and what counts is the seconds of these steps. Compilation
counts too: the clock of a compiled system begins with the seconds of its first forward and
backward, with nothing of it in torch's cache; they are printed and have a row of their own. At
intervals the clock is stopped, and a frozen copy of the encoder embeds bags of 25 patches for the
two probes, in the same way for every system; the embedding is the hypercolumn of
`configs/cifar10_cpu.yaml` (the means of all maps: it has no weights of its own). Workers that run
during that pause gain a few batches at most. The time to a target is interpolated between the two
evaluations around it: `inf` if no evaluation reaches it, 0 if the initialization does. A training
ends when every target is reached.

The curve is measured on training images that are held out from training and probes alike: recipes
may be chosen by it. The test images are scored once, by the weights at a training's end, and have
rows of their own.

Seeds change the initialization, the order of the images and their augmentation; they run one after
another, so use a quiet machine. Results are written after each training. `--short` is one seed of
ours, torch_kornia and torch_kornia_compile: 15 to 20 minutes on two cores.
"""

from __future__ import annotations

import argparse
import math
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in throughput.py

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.optim import lr_scheduler

import throughput
from bagssl_fast import machine
from bagssl_fast.config import OptimConfig
from bagssl_fast.evaluation.features import Plan, dense_bags, fold_batch_norm
from bagssl_fast.evaluation.probes import knn_accuracy, linear_probe
from bagssl_fast.models.bag_model import BagModel
from bagssl_fast.models.encoders import build_encoder
from baselines.step import Setup, System
from harness.cases import TRAINING, Case, Images, prepare_images
from harness.clock import Laps, clock
from harness.common import Report, against_the_best, arguments, paint
from harness.ours import our_model
from harness.parity import check

PROBES = ("kNN", "linear")
TARGETS = {"kNN": (0.50, 0.55), "linear": (0.60,)}  # the initialization has a linear 55%
FULL = {
    "systems": [
        "bagssl_fast_dense",
        "bagssl_fast",
        "bagssl_fast_compile",
        "torch_kornia",
        "torch_kornia_compile",
    ],
    "seeds": 3,
    "images": 50_000,
    "bank": 50_000,
    "evaluations": 8,
}
SHORT = FULL | {
    "systems": ["bagssl_fast", "torch_kornia", "torch_kornia_compile"],
    "seeds": 1,
}
QUICK = FULL | {"seeds": 1, "images": 640, "bank": 200, "evaluations": 2}
HELD_OUT = 2_000  # training images of the curve; of a few images, at most a fifth
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


class Training(NamedTuple):
    """What a training has shown.

    Args:
        compilation: Its seconds, which are in those of the curve.
        curve: On held-out training images.
        test: kNN and linear probe of the test images at the end.
    """

    compilation: float
    curve: list[Point]
    test: tuple[float, float]


class Probes(NamedTuple):
    """The images of the probes: those that they learn, of the curve, of the end."""

    bank: Images
    held_out: Images
    test: Images


Trainings = dict[str, list[Training]]  # by system, one per seed


def labels(images: Images, names: Sequence[str]) -> Tensor:
    """int64 [N]; `names` are the classes in order."""
    return torch.tensor([names.index(name) for name in images.classes])


def spread(size: int, count: int) -> NDArray[np.int64]:
    """`count` of `size` indices, evenly spread: images lie in the order of their classes."""
    return np.arange(count) * size // count


def part(images: Images, picked: NDArray[np.int64], path: Path) -> Images:
    """Some of the images, as an array of their own at `path`."""
    assert images.array is not None
    array = images.array[picked]
    np.save(path, array)
    return Images(str(path), array, (), tuple(images.classes[i] for i in picked))


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
    return 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / max(1, steps - warmup))


def run(system: System, probes: Probes, evaluations: int, first: Point | None) -> Training:
    """Trains to the end or the highest targets.

    Args:
        system: What trains.
        probes: Their images.
        evaluations: How many after the first one, evenly spread.
        first: The evaluation before the first step, if another system has already done it.

    Raises:
        SystemExit: If the system does not do the same work as the others.
    """
    parity = check(system)
    print(f"    {parity}", flush=True)
    if not parity.green:
        raise SystemExit(f"{system.name} does not do the same work: {parity}")
    compilation = parity.seconds if system.compiled else 0.0
    if compilation:
        print(f"    compiled in {compilation:.1f} s, which count", flush=True)
    laps, curve, seconds = Laps(clock(system.setup.device)), [first] if first else [], compilation
    schedule = lr_scheduler.LambdaLR(system.optimizer, partial(lr_factor, system.setup.steps))

    names = sorted({*probes.bank.classes, *probes.held_out.classes, *probes.test.classes})

    def score(bank: Tensor, images: Images) -> tuple[float, float]:
        rows = bank, labels(probes.bank, names), bags(system, images), labels(images, names)
        return knn_accuracy(*rows), linear_probe(*rows).accuracy

    def evaluate(step: int) -> bool:
        nonlocal bank
        bank = bags(system, probes.bank)
        knn, linear = score(bank, probes.held_out)
        curve.append((seconds if step else 0.0, knn, linear))
        print(f"    step {step}, {seconds:.1f} s: kNN {knn:.1%}, linear {linear:.1%}", flush=True)
        return all(
            max(point[i] for point in curve) >= max(TARGETS[probe])
            for i, probe in enumerate(PROBES, start=1)
        )

    bank = torch.empty(0)  # of the last evaluation
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
    test = score(bank, probes.test)  # the last step was due, or reached the targets
    print(f"    test images: kNN {test[0]:.1%}, linear {test[1]:.1%}", flush=True)
    return Training(compilation, curve, test)


def seconds_to(target: float, curve: list[Point], probe: int) -> float:
    """When a curve reaches an accuracy, linear between evaluations; inf if it does not."""
    for before, after in pairwise([curve[0], *curve]):
        if after[probe] >= target:
            gained = after[probe] - before[probe]
            share = (target - before[probe]) / gained if gained > 0 else 1.0
            return before[0] + share * (after[0] - before[0])
    return math.inf


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = arguments(__doc__, data=True)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--precision",
        choices=("fp32", "bf16"),
        help="of all systems, under torch.autocast (default: bf16 on CUDA)",
    )
    parser.add_argument("--short", action="store_true", help="one seed of three systems")
    parser.add_argument(
        "--systems",
        nargs="+",
        choices=[*throughput.SYSTEMS],
        metavar="SYSTEM",
        help=f"as in throughput.py (default: {', '.join(FULL['systems'])})",
    )
    parser.add_argument("--seeds", type=int, help="trainings of each system (default: 3)")
    parser.add_argument(
        "--images", type=int, help="training images, those held out included (default: all)"
    )
    parser.add_argument("--bank", type=int, help="training images of the probes (default: all)")
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--evaluations", type=int, help="during a training (default: 8)")
    parser.add_argument("--plot", type=Path, metavar="PNG")
    o = parser.parse_args(argv)
    if o.data is None:
        parser.error(
            "accuracies need CIFAR-10: from the folder of its Python version, make "
            "cifar10-train.tar with `bagssl pack FOLDER:train cifar10-train.tar` and "
            "cifar10-test.tar with `bagssl pack FOLDER:test cifar10-test.tar`, and name the "
            "folder of the two by --data or BAGSSL_DATA"
        )
    o.precision = o.precision or ("bf16" if o.device == "cuda" else "fp32")
    chosen: dict[str, Any] = QUICK if o.quick else SHORT if o.short else FULL
    for name, value in chosen.items():
        if getattr(o, name) is None:
            setattr(o, name, value)
    return o


def trainings(o: argparse.Namespace, folder: Path) -> Iterator[Trainings]:
    """Trains every system from every seed; yields what there is after each training."""
    case: Case = replace(CASE, batch=min(64, CASE.batch) if o.quick else CASE.batch)
    found = prepare_images("cifar", o.data, o.images, folder)
    test = prepare_images("cifar-test", o.data, 100 if o.quick else 10_000, folder)
    held = spread(len(found), max(1, min(HELD_OUT, len(found) // 5)))
    images = part(found, np.setdiff1d(np.arange(len(found)), held), folder / "train.npy")
    picked = spread(len(images), min(o.bank, len(images)))
    probes = Probes(
        part(images, picked, folder / "bank.npy"), part(found, held, folder / "held.npy"), test
    )
    steps = max(1, int(o.epochs * len(images) / case.batch))
    done: Trainings = {name: [] for name in o.systems}
    for seed in range(o.seeds):
        weights = [p.detach() for p in our_model(case, seed=seed).parameters()]
        first = None
        setup = Setup(
            case, images, weights, steps, o.device, o.threads, seed=seed, precision=o.precision
        )
        for name in o.systems:
            # Every compilation is a first one.
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / f"compiled-{name}-{seed}")
            torch.compiler.reset()
            torch.manual_seed(seed)
            print(f"  {paint(name, 'bold')}, seed {seed}, {steps} steps")
            system = throughput.import_system(throughput.SYSTEMS[name][0])(setup)
            try:
                done[name].append(run(system, probes, o.evaluations, first))
            finally:
                system.close()
            first = done[name][-1].curve[0]
            yield done


def record(report: Report, done: Trainings, precision: str = "fp32") -> None:
    """Rows: seconds of compilation and to each target, accuracies; a sample per seed."""
    report.rows.clear()
    for name, runs in done.items():
        if not runs:
            continue
        case = "cifar-tcr, 8 patches" + (", bf16" if precision == "bf16" else "")
        add = partial(report.add, case, name)
        add("compilation", [run.compilation for run in runs], "s")
        for i, probe in enumerate(PROBES, start=1):
            for target in TARGETS[probe]:
                seconds = [seconds_to(target, run.curve, i) for run in runs]
                add(f"seconds to {target:.0%} {probe}", seconds, "s")
            best = [max(point[i] for point in run.curve) for run in runs]
            add(f"best {probe}", best, "fraction")
            add(f"test {probe}", [run.test[i - 1] for run in runs], "fraction")


def show(report: Report) -> None:
    """Prints the rows, and how ours compares with the best plain PyTorch to each target."""
    by_metric: dict[str, dict[str, float]] = {}
    for row in report.rows:
        by_metric.setdefault(row.metric, {})[row.provider] = row.value
        print(f"  {row.provider:24}{row.metric:24}{row.value:10.3g} {row.unit}")
    for metric, values in by_metric.items():
        if metric.startswith("seconds to"):
            what = metric.removeprefix("seconds")
            against_the_best(values, what)
            without = {name: s - by_metric["compilation"][name] for name, s in values.items()}
            against_the_best(without, f"{what}, compilation not counted")


def draw(done: Trainings, machine: str, path: Path) -> None:
    from harness.plots import draw_runs

    panels = {
        title: {
            name: [[(point[0], 100 * point[i]) for point in run.curve] for run in runs]
            for name, runs in done.items()
        }
        for i, title in ((1, "kNN"), (2, "linear probe"))
    }
    draw_runs(panels, machine, path)


def main(argv: Sequence[str] | None = None) -> None:
    o = parse(argv)
    torch.set_num_threads(o.threads)
    machine.keep_freed_memory()
    report = Report("time_to_accuracy", o.threads)
    with tempfile.TemporaryDirectory(prefix="time_to_accuracy_") as work:
        for done in trainings(o, Path(work)):
            record(report, done, o.precision)
            report.write(o.json, o.csv)
            if o.plot:
                draw(done, report.machine, o.plot)
    show(report)


if __name__ == "__main__":
    main()
