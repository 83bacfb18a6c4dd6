"""Other people's training before and after the swap: the same losses, seconds and memory.

Each host trains twice, from the same weights on the same CIFAR-10 patches, with interleaved steps:
unmodified, and with our losses (`apply_to_*`) or with its own backbone fused (`fuse`). The loss
curves must agree; a third training, of the unmodified host on patches that differ by one rounding,
shows how far two may drift apart. Time is that of whole steps: forward, loss, backward, optimizer,
without data. A host that is not installed is named and skipped; docs/swap-in.md describes how to
get it. With a checkout of lightly, its own tests of the three losses run on our classes.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bagssl_fast.augment import Augment
from bagssl_fast.data import Threads
from bagssl_fast.integrations.data import MultiCropLoader
from harness.common import OURS, Report, Timing, arguments, timed
from harness.memory import peak_memory
from harness.swap_hosts import HOSTS, Host, Missing, Step, checkout, revision

AS_IT_IS = "the host as it is"
CONTROL = "the host, one rounding off"
# Of the loss, at any step; twice the control's drift if that is more.
CURVE_TOLERANCE = 1e-2
LIGHTLY_TESTS = ("vicreg_loss", "barlow_twins_loss", "vicregl_loss", "emp_ssl_loss")


def crops(source: str, host: Host, batches: int) -> list[list[Tensor]]:
    """A few batches of P crops [B, 3, h, w]."""
    augment = Augment(size=host.pixels)
    loader = MultiCropLoader(source, host.batch, host.patches, augment, threads=Threads(1))
    made: list[list[Tensor]] = []
    while len(made) < batches:
        for crops, _ in loader:
            made.append([crop.contiguous().clone() for crop in crops])
            if len(made) == batches:
                break
    loader.close()
    return made


def train(
    host: Host, batches: list[list[Tensor]], steps: int
) -> tuple[dict[str, list[Timing]], dict[str, list[float]]]:
    """Seconds and losses of every step of the three trainings, whose steps are interleaved."""
    module = host.load()
    providers: dict[str, Callable[[Any], Any]] = {
        AS_IT_IS: lambda _: nullcontext(),
        OURS: host.apply,
        CONTROL: lambda _: nullcontext(),
    }
    nudged = [[torch.nextafter(crop, crop + 1) for crop in batch] for batch in batches]
    runs = {}
    for name in providers:
        torch.manual_seed(0)
        with providers[name](module):
            runs[name] = host.build(module)
    times: dict[str, list[Timing]] = {name: [] for name in providers}
    losses: dict[str, list[float]] = {name: [] for name in providers}
    for step in range(steps):
        for name in list(providers)[:: 1 if step % 2 else -1]:
            with providers[name](module):
                batch = (nudged if name == CONTROL else batches)[step % len(batches)]
                times[name].append(timed(partial(one_step, runs[name], batch, losses[name])))
    return times, losses


def one_step(step: Step, batch: list[Tensor], losses: list[float]) -> None:
    losses.append(float(step(batch)))


def memory_call(name: str, provider: str, batch: Sequence[Tensor], threads: int) -> Callable:
    """One training step after a first one, for a fresh process."""
    torch.set_num_threads(threads)
    host = HOSTS[name]
    module = host.load()
    context = host.apply(module) if provider == OURS else nullcontext()
    context.__enter__()
    step = host.build(module)
    step(batch)
    return lambda: step(batch)


def bench(report: Report, name: str, options: Any) -> None:
    host = HOSTS[name]
    case = f"{name} {revision(host)}"
    host.load()
    batches = crops(options.source, host, 4 if options.quick else 25)
    steps = min(options.steps, 6) if options.quick else options.steps
    times, losses = train(host, batches, steps)
    error, drift = (
        max(abs(a - b) / abs(b) for a, b in zip(losses[name], losses[AS_IT_IS], strict=True))
        for name in (OURS, CONTROL)
    )
    report.add(case, CONTROL, "curve", [drift], "of the loss, at most")
    report.parity(case, OURS, error, max(CURVE_TOLERANCE, 2 * drift))
    for provider in (OURS, AS_IT_IS):
        warm = times[provider][2:]
        report.add(case, provider, "step", [t.wall * 1e3 for t in warm], "ms")
        report.add(case, provider, "cpu time", [t.cpu * 1e3 for t in warm], "ms")
        report.add(case, provider, "training", [sum(t.wall for t in times[provider])], "s")
        report.add(case, provider, "first loss", [losses[provider][0]], "loss")
        report.add(case, provider, "last loss", [losses[provider][-1]], "loss")
    first, last = losses[AS_IT_IS][0], losses[AS_IT_IS][-1]
    print(f"\n{case}: {host.shape}; {steps} steps, loss {first:.4g} to {last:.4g},")
    print(f"  the two curves are within {error:.1e} of each other at every step;")
    print(f"  {CONTROL}, within {drift:.1e}")
    report.table(case, "step", title=f"{case}: a whole step, wall-clock time")
    report.table(case, "cpu time", title=f"{case}: a whole step, CPU time")
    if not options.no_memory:
        for provider in (OURS, AS_IT_IS):
            peak = peak_memory(memory_call, name, provider, batches[0], options.threads)
            report.add(case, provider, "memory", [max(peak, 0.01)], "MiB")
        report.table(case, "memory", title=f"{case}: peak memory of a step")


def lightly_tests(report: Report) -> None:
    """lightly's own tests of its losses, run on our classes."""
    folder = checkout("lightly")
    if importlib.util.find_spec("pytest_mock") is None:
        raise Missing("lightly's tests need pytest-mock: pip install pytest-mock")
    here = str(Path(__file__).resolve().parent)
    files = [f"tests/loss/test_{name}.py" for name in LIGHTLY_TESTS]
    flags = "-q -p harness.swap_plugin -p no:cacheprovider -W ignore"
    command = [sys.executable, "-m", "pytest", *flags.split(), *files]
    path = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    counts = {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|skipped)", done.stdout)}
    if not counts.get("passed"):
        raise Missing(f"lightly's tests did not run: {done.stdout[-800:]}{done.stderr[-400:]}")
    for word in ("passed", "failed", "skipped"):
        report.add("lightly's own loss tests", OURS, word, [counts.get(word, 0)], "tests")
    failed = re.findall(r"FAILED (\S+)", done.stdout)
    print(f"\nlightly's own loss tests on our classes: {counts}", *failed, sep="\n  ")


def main() -> None:
    parser = arguments(__doc__)
    data = Path(os.environ.get("BAGSSL_DATA", "."), "cifar10-train.tar")
    parser.add_argument("--host", nargs="+", default=list(HOSTS), metavar="NAME", help="which")
    parser.add_argument("--source", default=str(data) if data.exists() else "demo", help="images")
    parser.add_argument("--steps", type=int, default=200, help="of each training")
    parser.add_argument("--no-memory", action="store_true", help="skip the memory measurements")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    report = Report("bench_swap", threads=options.threads)
    found = (name for host in options.host for name in HOSTS if name.startswith(host))
    needed = list(dict.fromkeys(found))  # in the order asked for
    if not needed:
        raise SystemExit(f"--host {' '.join(options.host)}: the hosts are {', '.join(HOSTS)}")
    for name in needed:
        try:
            bench(report, name, options)
        except Missing as missing:
            print(f"\n{name} is skipped: {missing}")
        report.save(options.json, options.csv)  # keep finished hosts if a later one fails
    if any(name.startswith("lightly") for name in needed):
        try:
            lightly_tests(report)
        except Missing as missing:
            print(f"\nlightly's own loss tests are skipped: {missing}")
    report.save(options.json, options.csv)


if __name__ == "__main__":
    main()
