"""Kill trainings with SIGKILL at random moments, resume them, compare: `python scripts/soak.py`.

Every run is killed again and again until it ends by itself; then its run directory is compared with
that of a run that was never killed: checkpoint, exported model, metrics and evaluation have to be
equal, bit for bit, on a CPU. The kills fall

- in a step: while a step is computed;
- in a write: in the middle of a file, mostly a checkpoint;
- at a rename: just before or after a file gets its name;
- in the evaluation that ends a run;
- at any time, by a clock.

The last line on the terminal is JSON: how many kills, where they fell, equal or not.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import safetensors.torch
import torch

from bagssl_fast import files, machine, train
from bagssl_fast.evaluation import measure
from bagssl_fast.training import checkpoint
from bagssl_fast.training.meter import Meter

# How likely each is: a run that reaches its evaluation has no step and checkpoint left to kill.
MOMENTS = {"step": 3, "write": 5, "rename": 4, "evaluation": 1, "any time": 3}
# What a run would import in its own time, which is most of it: its process is a fork of this one.
LATER = ("bagssl_fast.training.loop", "torch._dynamo", "matplotlib.pyplot")
STEPS = 24
RECIPE = f"""
max_steps: {STEPS}
batch_size: 8
log_every: 1
checkpoint_every: 0.5
threads: 1
device: cpu
ema: 0.9
bag: {{patches: 2, dense: true, stride: 4}}
augment: {{size: 12, scale: [0.5, 1.0]}}
encoder: {{name: patchnet, patch_size: 8, width: 4}}
head: {{hidden: 16, out: 8, num_layers: 2}}
loss: {{name: vicreg}}
optim: {{name: adamw, lr: 1.0e-2, warmup_epochs: 0.5}}
loader: {{num_threads: 2}}
eval: {{enabled: true, patches: [1, 4], random: false}}
"""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, help="of the moments; by default another every time")
    parser.add_argument("--json", type=Path, help="write the last line here, too")
    options = parser.parse_args(argv)
    seed = random.randrange(2**32) if options.seed is None else options.seed
    print(f"seed {seed}: python scripts/soak.py --kills {options.kills} --seed {seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        result = soak(Path(folder), options.kills, seed)
    line = json.dumps(result)
    print(line)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0 if result["equal"] else 1


def soak(folder: Path, kills: int, seed: int) -> dict[str, Any]:
    """Kills so often, and says what came of it."""
    for name in LATER:
        importlib.import_module(name)
    rng = random.Random(seed)
    started = time.monotonic()
    make_images(folder / "images.npz")
    (folder / "recipe.yaml").write_text(RECIPE)
    whole = folder / "whole"
    if in_process(folder, whole, lambda: None) != 0:
        raise SystemExit(f"the run without kills failed: see {whole}.log")
    fell: Counter[str] = Counter()
    runs, different = 0, []
    while sum(fell.values()) < kills or runs == 0:
        run_dir = folder / f"run{runs}"
        while True:
            moment = "none"  # or one that comes after the run's end, sometimes
            if sum(fell.values()) < kills:
                (moment,) = rng.choices(list(MOMENTS), list(MOMENTS.values()))
            plan = Plan(moment, random.Random(rng.random()), folder / "where")
            code = in_process(folder, run_dir, plan.prepare)
            if code == 0:
                break
            if code != -signal.SIGKILL:
                different.append(f"run {runs} failed: exit code {code}")
                print(run_dir.with_suffix(".log").read_text()[-2000:])
                break
            fell[moment] += 1
            where = (folder / "where").read_text()
            print(f"kill {sum(fell.values())} of run {runs}: {moment}, {where}", flush=True)
        runs += 1
        different += differences(whole, run_dir)
        print(f"run {runs - 1} ended: {different or 'equal'}", flush=True)
        shutil.rmtree(run_dir, ignore_errors=True)
        if different:
            break
    return {
        "kills": sum(fell.values()),
        "fell": dict(fell),
        "runs": runs,
        "steps": STEPS,
        "equal": not different,
        "different": different,
        "seed": seed,
        "seconds": round(time.monotonic() - started, 1),
        "git": machine.git_sha(Path(__file__).resolve().parent),
        "cpu": machine.cpu_name(),
    }


class Plan:
    """When a process kills itself.

    Args:
        moment: One of `MOMENTS`, or none.
        rng: Draws the rest.
        log: Where it says so.
    """

    def __init__(self, moment: str, rng: random.Random, log: Path) -> None:
        self.moment, self.rng, self.log = moment, rng, log

    def prepare(self) -> None:
        """Patches the trainer; in the process to kill."""
        self.log.write_text("")
        if self.moment == "step":
            self.after(Meter, "add", self.rng.randint(1, 8))
        elif self.moment == "write":
            self.after(files._Sink, "write", self.rng.randint(1, 400))
        elif self.moment == "rename":
            self.after(os, "replace", self.rng.randint(1, 16), before=self.rng.random() < 0.5)
        elif self.moment == "evaluation":
            name = self.rng.choice(("extract", "collapse", "write", "write_atomic"))
            self.after(measure, name, self.rng.randint(1, 2), before=self.rng.random() < 0.5)
        elif self.moment == "any time":
            self.log.write_text("by the clock")
            seconds = self.rng.uniform(0.0, 1.5)
            threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()

    def after(self, place: Any, name: str, count: int, before: bool = False) -> None:
        """Kills at the call number `count` of a function, before or after it."""
        real: Callable[..., Any] = getattr(place, name)
        left = [count]

        def call(*args: Any, **kwargs: Any) -> Any:
            left[0] -= 1
            if left[0] == 0 and before:
                self.kill(f"before {name} {count} {' '.join(map(path_name, args))}")
            result = real(*args, **kwargs)
            if left[0] == 0:
                if name == "write" and self.moment == "write":
                    args[0].file.flush()  # as far as it got, it is in the file
                self.kill(f"after {name} {count} {' '.join(map(path_name, args))}")
            return result

        setattr(place, name, call)

    def kill(self, where: str) -> NoReturn:
        self.log.write_text(where.strip())
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError


def path_name(value: Any) -> str:
    """The name of a file, for the log."""
    if isinstance(value, files._Sink):
        return Path(value.file.name).name
    return value.name if isinstance(value, Path) else ""


def in_process(folder: Path, run_dir: Path, prepare: Callable[[], None]) -> int:
    """Starts or resumes a run in a process of its own; its exit code, or minus its signal."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 99
    try:
        log = os.open(run_dir.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        prepare()
        arguments = ["--config", str(folder / "recipe.yaml"), "--run_dir", str(run_dir)]
        data = ["--data", str(folder / "images.npz")]
        code = train.main([*arguments, *data, "--resume", "auto"])
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
        os._exit(code)


def differences(whole: Path, run_dir: Path) -> list[str]:
    """What of a run directory is not as that of a run that was never killed."""
    found = []
    states = [checkpoint.load_newest(checkpoint.latest(d), False).state for d in (whole, run_dir)]
    found += [f"checkpoint{key}" for key in unequal(*states)]
    weights = [safetensors.torch.load_file(d / "model.safetensors") for d in (whole, run_dir)]
    found += [f"model.safetensors{key}" for key in unequal(*weights)]
    if (whole / "config.json").read_bytes() != (run_dir / "config.json").read_bytes():
        found.append("config.json")
    metrics = [read_metrics(d) for d in (whole, run_dir)]
    found += [f"metrics.jsonl{key}" for key in unequal(*metrics)]
    tables = [json.loads((d / "eval.json").read_text())["results"] for d in (whole, run_dir)]
    found += [f"eval.json{key}" for key in unequal(*tables)]
    names = [sorted(p.name for p in (d / "checkpoints").iterdir()) for d in (whole, run_dir)]
    found += [f"checkpoints{key}" for key in unequal(*names)]
    found += [f"left behind: {p.name}" for p in run_dir.rglob(".*")]
    return found


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The records without rates and memory."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    free = ("images_per_s", "patches_per_s", "data_wait", "memory_mb")
    return [{k: v for k, v in json.loads(line).items() if k not in free} for line in lines]


def unequal(a: Any, b: Any, where: str = "") -> list[str]:
    """Where two values differ."""
    if isinstance(a, torch.Tensor):
        return [] if isinstance(b, torch.Tensor) and a.equal(b) else [where]
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return [found for key in a for found in unequal(a[key], b[key], f"{where}/{key}")]
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
        pairs = enumerate(zip(a, b, strict=True))
        return [found for i, (x, y) in pairs for found in unequal(x, y, f"{where}/{i}")]
    return [] if type(a) is type(b) and a == b else [where or "/"]


def make_images(path: Path) -> None:
    """33 noisy images of 3 classes."""
    rng = np.random.default_rng(0)
    labels = np.arange(33) % 3
    base = rng.integers(0, 255, (3, 16, 16, 3))
    pixels = np.clip(base[labels] + rng.integers(-40, 40, (33, 16, 16, 3)), 0, 255)
    np.savez(path, images=pixels.astype(np.uint8), labels=labels)


if __name__ == "__main__":
    sys.exit(main())
