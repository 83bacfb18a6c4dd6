"""Whole training steps on this machine, at equal numerics: how much faster are they than today's?

    python bench/throughput.py [--quick] [--data FOLDER] [--precision bf16] [--cases ...]
        [--systems ...] [--plot PNG]

Every system runs the same steps: data, encode, loss, backward, optimizer. All get the same images
(CIFAR-10 as arrays, ImageNet as JPEG files), P, patch size, encoder, projector, weights, loss and
optimizer; before a system is timed, its loss and gradient on given patches and weights are compared
with the float64 reference, and a system that does not agree is refused. Systems (`baselines/` and
`harness/ours.py`):

  emp_ssl            the authors' code: torchvision on PIL images in DataLoader workers, a loss that
                     loops over the patches (2304.03977)
  vicreg             the same with VICReg's authors' loss (2105.04906)
  torch              plain PyTorch: uint8 from the workers, channels-last, batched losses
  torch_kornia       the same with kornia's batched transforms
  torch_compile, torch_kornia_compile
                     the same with model and loss under torch.compile (not with --quick)
  lightly            lightly's transforms and losses
  bagssl_fast        ours, every patch with an augmentation of its own, as all of the above
  bagssl_fast_dense  ours, P patches on a grid of one augmented view, encoded in one pass: the
                     patches of a bag share one augmentation, which makes a step less work. No
                     other system does this, nor does `bagssl_fast`.
  bagssl_fast_compile
                     ours under torch.compile
  bagssl_fast_dense_compile, _device (patches cut on the GPU): by default on CUDA only

"Best plain PyTorch" is the fastest of those named torch, eager or compiled, in the case at hand.
Compilation is printed and is no part of a step (code that is in torch's cache is not compiled
again). On a CPU, where it takes minutes in all, `torch_compile` runs in `cifar-tcr` and where
`torch_kornia_compile` cannot. Without --data the images are made of scikit-image's photographs.

A turn is one pass over a few batches that begins and ends with an empty pipeline, so that the
workers of one system neither disturb another's turn nor work ahead for the next. Turns of all
systems are interleaved; figures are the median (p20, p80) over the rounds, ratios are computed
round by round. OMP_WAIT_POLICY is PASSIVE for all: threads that spin while they wait would take
cores from the workers; and all keep freed memory for the next step, as `bagssl train` does and a
script could (`bagssl_fast.machine`). `memory` is the peak of a step above that of model, optimizer
and library, without the workers.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch loads its OpenMP

import torch

from bagssl_fast import machine
from baselines.step import Setup, System, cpu_seconds_of_workers
from harness.cases import EVALUATION, TRAINING, Case, Images, prepare_images
from harness.clock import PHASES, Laps, clock
from harness.common import (
    Report,
    Timing,
    against_the_best,
    arguments,
    best_plain,
    cpu_seconds,
    interleave,
    is_ours,
    number,
    paint,
    quantiles,
)
from harness.memory import peak_here
from harness.ours import initial_weights
from harness.parity import check, gemm_peak, model_flops
from harness.photographs import data_folder

# name -> where it is, how its package is installed
SYSTEMS = {
    "emp_ssl": ("baselines.emp_ssl:EMPSSL", "pip install torchvision"),
    "vicreg": ("baselines.vicreg:VICReg", "pip install torchvision"),
    "torch": ("baselines.plain_torch:PlainTorch", "pip install torchvision"),
    "torch_compile": ("baselines.plain_torch:CompiledTorch", "pip install torchvision"),
    "torch_kornia": ("baselines.kornia_torch:KorniaTorch", "pip install kornia"),
    "torch_kornia_compile": ("baselines.kornia_torch:CompiledKorniaTorch", "pip install kornia"),
    "lightly": ("baselines.lightly_ssl:Lightly", "pip install lightly"),
    "bagssl_fast": ("harness.ours:Ours", ""),
    "bagssl_fast_dense": ("harness.ours:OursDense", ""),
    "bagssl_fast_compile": ("harness.ours:OursCompiled", ""),
    "bagssl_fast_dense_compile": ("harness.ours:OursDenseCompiled", ""),
    "bagssl_fast_device": ("harness.ours:OursOnDevice", ""),
}
QUICK_SYSTEMS = ("emp_ssl", "torch", "torch_kornia", "bagssl_fast", "bagssl_fast_dense")
QUICK_CASES = ("cifar-tcr", "eval-256")
ON_GPU_ONLY = ("bagssl_fast_dense_compile", "bagssl_fast_device")
# The minimum speedup of ours on 2 CPU threads, data included; "best" is the best plain PyTorch.
FLOORS = {
    "cifar-tcr": {"emp_ssl": 6.0, "best": 2.5},
    "cifar-resnet18": {"emp_ssl": 1.3},
    "eval-256": {"torch": 5.0},
    "cifar-tcr-bf16": {"best": 1.7},
    "cifar-resnet18-bf16": {"best": 1.15},
}
COLORS = {
    "data wait": "red",
    "encode": "cyan",
    "loss": "yellow",
    "backward": "",
    "optimizer": "dim",
}


def import_system(where: str) -> type[System]:
    """The class that "module:class" names."""
    module, cls = where.split(":")
    return getattr(importlib.import_module(module), cls)


class Timed:
    """A system's turns: the seconds of each phase in each."""

    def __init__(self, system: System) -> None:
        self.system = system
        self.laps = Laps(clock(system.setup.device))
        self.turns: list[dict[str, float]] = []
        self.cpu: list[float] = []

    def __call__(self) -> Timing:
        cpu = cpu_seconds() + cpu_seconds_of_workers()
        self.system.turn(self.laps)
        seconds = self.laps.seconds()
        cpu = cpu_seconds() + cpu_seconds_of_workers() - cpu
        self.turns.append({phase: s / self.system.setup.steps for phase, s in seconds.items()})
        self.cpu.append(cpu / self.system.setup.steps)
        return Timing(sum(seconds.values()), cpu)

    def forget(self) -> None:
        self.turns, self.cpu = [], []

    @property
    def steps(self) -> list[float]:
        """Seconds of a step, turn by turn."""
        return [sum(turn.values()) for turn in self.turns]


class Bench:
    """The options, the images made so far and the report."""

    def __init__(self, options: Any, work: Path, systems: dict[str, Any] | None = None) -> None:
        self.options, self.work = options, work
        self.data = data_folder(options.data, work)
        self.systems = SYSTEMS if systems is None else systems
        self.report = Report("throughput", options.threads)
        self.refused: list[str] = []
        self.corpora: dict[tuple[str, int], Images] = {}
        self.peak = gemm_peak(options.device)
        self.report.add("machine", "torch", "GEMM peak", [self.peak / 1e9], "GFLOP/s")
        print(paint(f"matrix products reach {number(self.peak / 1e9)} GFLOP/s here", "dim"))
        self.split: dict[
            str, dict[str, dict[str, float]]
        ] = {}  # case -> system -> phase -> seconds

    def images(self, corpus: str, count: int) -> Images:
        if (corpus, count) not in self.corpora:
            images = prepare_images(corpus, self.data, count, self.work)
            self.corpora[corpus, count] = images
        return self.corpora[corpus, count]

    def names(self, case: Case) -> list[str]:
        """The systems of a case: those asked for, or a default selection."""
        o = self.options
        if o.systems:
            return o.systems
        if o.quick:
            return [
                name if name != "emp_ssl" or case.loss == "emp_ssl" else "vicreg"
                for name in QUICK_SYSTEMS
            ]
        names = [n for n in self.systems if o.device == "cuda" or n not in ON_GPU_ONLY]
        kornia = case.corpus == "cifar" and importlib.util.find_spec("kornia") is not None
        if o.device == "cpu" and kornia and not case.name.startswith("cifar-tcr"):
            names.remove("torch_compile")  # a minute of compilation; kornia's is the faster one
        return names

    def open(self, name: str, setup: Setup) -> System | None:
        """Opens a system and checks its parity; None if it is missing, unsupported or refused."""
        where, install = self.systems[name]
        try:
            system_class = import_system(where) if isinstance(where, str) else where
            if not system_class.supports(setup.case):
                return None
            system = system_class(setup)
        except ImportError as error:
            print(paint(f"  {name} is not installed ({error}): {install}", "yellow"))
            return None
        case = setup.case.name
        try:
            parity = check(system)
        except RuntimeError as error:  # a library's failure must not stop the other systems
            print(paint(f"  {name} FAILS here: {str(error).splitlines()[0]}", "red"))
            system.close()
            return None
        self.report.add(case, name, "parity of the loss", [parity.loss], "relative")
        self.report.add(case, name, "parity of the gradient", [parity.gradient], "relative")
        text = f"  {name:26}{parity}" + (f"; {note}" if (note := system.note) else "")
        if system.compiled:
            text += f"; compiled in {parity.seconds:.0f} s, which no step includes"
        print(paint(text, "green" if parity.green else "red"))
        if not parity.green:
            print(paint(f"  {name} is REFUSED: it does not do the same work", "red"))
            self.refused.append(f"{case}: {name}, {parity}")
            system.close()
            return None
        return system

    def train(self, case: Case) -> None:
        """Times the training steps of a case."""
        o = self.options
        torch.compiler.reset()  # else a function's tenth network would run as it is
        case = case.smaller(o.batch or (32 if o.quick else case.batch))
        if o.precision == "bf16" and o.device == "cpu":  # rows beside those of fp32
            case = replace(case, name=f"{case.name}-bf16", title=f"{case.title}, bf16")
        print(f"\n{paint(case.title, 'bold')}: {case.name}, batch {case.batch}")
        steps = o.steps or (20 if o.device == "cuda" else 2)
        images = self.images(case.corpus, steps * case.batch)
        weights = initial_weights(case)
        setup = Setup(
            case, images, weights, steps, o.device, o.threads, o.synthetic, precision=o.precision
        )
        opened = {name: self.open(name, setup) for name in self.names(case)}
        timed = {name: Timed(system) for name, system in opened.items() if system}
        if not timed:
            return
        memory = {name: peak_here(turn) for name, turn in timed.items()}  # and a warm-up
        if o.device == "cuda":
            for turn in timed.values():
                turn()
        once = sum(sum(turn.steps[-1:]) * steps for turn in timed.values())
        rounds = max(2, min(o.rounds, round(o.seconds / max(once, 1e-9))))
        for turn in timed.values():
            turn.forget()
        interleave(timed, rounds, warmup=0)
        for name, turn in timed.items():
            self.record(case, name, turn, memory[name])
            turn.system.close()
        self.show(case, timed, memory)

    def record(self, case: Case, name: str, turn: Timed, memory: float) -> None:
        add, steps = self.report.add, turn.steps
        add(case.name, name, "images per second", [case.batch / s for s in steps], "images/s")
        patches = case.batch * case.patches
        add(case.name, name, "patches per second", [patches / s for s in steps], "patches/s")
        add(case.name, name, "step", [s * 1e3 for s in steps], "ms")
        for phase in PHASES:
            add(case.name, name, phase, [t[phase] * 1e3 for t in turn.turns], "ms")
        add(case.name, name, "CPU time", [s * 1e3 / case.batch for s in turn.cpu], "ms/image")
        add(case.name, name, "memory", [memory], "MiB")
        flops = model_flops(turn.system)
        add(case.name, name, "model FLOP/s", [flops / s / 1e9 for s in steps], "GFLOP/s")
        share = [100 * flops / s / self.peak for s in steps]
        add(case.name, name, "model FLOP/s of the peak", share, "%")

    def floors(self, case: str, steps: dict[str, float]) -> dict[str, float]:
        """The floors of a case, "best" resolved to the best plain PyTorch."""
        if self.options.synthetic or self.options.device != "cpu":
            return {}
        floors = dict(FLOORS.get(case, {}))
        best, name = floors.pop("best", 0.0), best_plain(steps)
        if best and name:
            floors[name] = max(best, floors.get(name, 0.0))
        return {name: floor for name, floor in floors.items() if name in steps}

    def show(self, case: Case, timed: dict[str, Timed], memory: dict[str, float]) -> None:
        """The table of a case: rates and ratios, then the time of each phase."""
        medians = {name: quantiles(turn.steps)[0] for name, turn in timed.items()}
        mine = [name for name in medians if is_ours(name)]
        ours = min(mine, key=lambda name: medians[name]) if mine else "bagssl_fast"
        floors = self.floors(case.name, medians)
        title = f"{case.title}: images/s, {len(next(iter(timed.values())).turns)} rounds"
        self.report.table(
            case.name,
            "images per second",
            ours=ours,
            floors=floors,
            larger_is_better=True,
            title=title,
        )
        against_the_best(medians)
        self.split[case.name] = {
            name: {phase: quantiles([t[phase] for t in turn.turns])[0] for phase in PHASES}
            for name, turn in timed.items()
        }
        head = "".join(f"{phase:>11}" for phase in (*PHASES, "= step"))
        print(paint(f"  {'ms':26}{head}{'patches/s':>11}{'of peak':>9}{'MiB':>7}{'CPU':>9}", "dim"))
        for name, phases in self.split[case.name].items():
            cells = "".join(f"{s * 1e3:11.1f}" for s in (*phases.values(), medians[name]))
            rate = case.batch * case.patches / medians[name]
            share = self.value(case.name, name, "model FLOP/s of the peak")
            cpu = self.value(case.name, name, "CPU time") * case.batch
            line = f"  {name:26}{cells}{rate:11,.0f}{share:8.0f}%{memory[name]:7.0f}{cpu:9.0f}"
            print(paint(line, "cyan" if is_ours(name) else ""))
        bars(self.split[case.name])

    def value(self, case: str, provider: str, metric: str) -> float:
        key = (case, provider, metric)
        return next(r.value for r in self.report.rows if (r.case, r.provider, r.metric) == key)

    def evaluate(self, name: str) -> None:
        """Times the encoding of evaluation bags: dense, and patch by patch."""
        from harness.evaluation import bag_encoders

        o, count = self.options, EVALUATION[name]
        images = 16 if o.quick else 64
        print(f"\n{paint(f'evaluation: {count} patches of each image', 'bold')}, {images} images")
        pixels = self.images("cifar", images).array
        assert pixels is not None
        case = TRAINING["cifar-tcr"]
        weights = initial_weights(case)
        calls, errors = bag_encoders(case, pixels, count, o.device, weights, not o.quick)
        for provider, error in errors.items():
            self.report.parity(name, provider, error, 2e-2 if o.device == "cuda" else 1e-4)
        timings = interleave(calls, max(3, o.rounds), device=o.device)
        medians = {}
        for provider, times in timings.items():
            rates = [images / t.wall for t in times]
            self.report.add(name, provider, "images per second", rates, "images/s")
            medians[provider] = quantiles([t.wall for t in times])[0]
        self.report.table(
            name,
            "images per second",
            ours="bagssl_fast_dense",
            floors=self.floors(name, medians),
            larger_is_better=True,
            title=f"{count} patches of 16x16 per image, PatchNet: images/s",
        )
        against_the_best(medians)


def bars(split: dict[str, dict[str, float]], width: int = 60) -> None:
    """A bar per system, as long as its step, in the colors of its phases."""
    longest = max(sum(phases.values()) for phases in split.values())
    for name, phases in split.items():
        bar, done, drawn = "", 0.0, 0
        for phase, seconds in phases.items():
            done += seconds
            upto = round(width * done / longest)
            bar += paint(phase[0] * (upto - drawn), COLORS[phase])
            drawn = upto
        print(f"  {name:26}{bar}")
    letters = ", ".join(f"{phase[0]} {phase}" for phase in PHASES)
    print(paint(f"  {'':26}{letters}", "dim"))


def parse(argv: Sequence[str] | None = None, systems: Iterable[str] = SYSTEMS) -> Any:
    parser = arguments(__doc__, rounds=5, data=True)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    every = [*TRAINING, *EVALUATION]
    parser.add_argument(
        "--precision",
        choices=("fp32", "bf16"),
        help="of all systems, under torch.autocast; bf16 by default on CUDA. bf16 on a CPU leaves "
        "evaluation out",
    )
    parser.add_argument("--cases", nargs="+", choices=every, metavar="CASE", help=", ".join(every))
    parser.add_argument(
        "--systems", nargs="+", choices=[*systems], metavar="SYSTEM", help=", ".join(systems)
    )
    parser.add_argument("--synthetic", action="store_true", help="no data path: the upper bound")
    parser.add_argument("--batch", type=int, default=0, help="images per step, at most the case's")
    parser.add_argument("--steps", type=int, default=0, help="steps of a turn")
    parser.add_argument("--seconds", type=float, default=0, help="approximate time per case")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw the time of each phase")
    parser.add_argument("--scale", action="store_true", help="cost against P, B, D and image size")
    options = parser.parse_args(argv)
    options.precision = options.precision or ("bf16" if options.device == "cuda" else "fp32")
    options.cases = options.cases or (QUICK_CASES if options.quick else every)
    if options.precision == "bf16" and options.device == "cpu":
        options.cases = [name for name in options.cases if name in TRAINING]
    options.seconds = options.seconds or (12 if options.quick else 45)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: no CUDA device is available")
    return options


def main(argv: Sequence[str] | None = None, systems: dict[str, Any] | None = None) -> int:
    """Runs the bench; returns 1 if a system is refused."""
    options = parse(argv, systems or SYSTEMS)
    torch.set_num_threads(options.threads)
    machine.keep_freed_memory()
    with tempfile.TemporaryDirectory(prefix="throughput_") as work:
        bench = Bench(options, Path(work), systems)
        if options.scale:
            importlib.import_module("harness.scale").run(bench)
        else:
            for name in options.cases:
                if name in TRAINING:
                    bench.train(TRAINING[name])
                else:
                    bench.evaluate(name)
                bench.report.write(options.json, options.csv)  # what an interruption keeps
        bench.report.save(options.json, options.csv)
    if options.plot and bench.split:
        importlib.import_module("harness.plots").draw_steps(
            bench.split, bench.report.machine, options.plot
        )
    for line in bench.refused:
        print(paint(f"refused: {line}", "red"))
    return 1 if bench.refused else 0


if __name__ == "__main__":
    sys.exit(main())
