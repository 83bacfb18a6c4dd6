"""`throughput.py --scale`: how time and memory of a step grow, and where the curves cross.

  P       dense grids of one 32x32 image, 4 to 289 patches of 16x16; the others take as many crops
  B       images per step, 25 patches each
  image   side of the image, 25 patches of 16x16 on a grid: a dense pass reads all of the image
  D       width of the projection, VICReg's loss alone (forward and backward) on [2, 128, D]

No data path (`--synthetic`). A system's curve ends when a step takes too long.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from bagssl_fast.losses import VICReg
from baselines.losses import vicreg as authors_vicreg
from baselines.plain_torch import PlainTorch
from baselines.plain_torch import vicreg as plain_vicreg
from baselines.step import Setup, System
from harness.cases import TRAINING, Case
from harness.clock import Laps, clock
from harness.common import interleave, paint, quantiles
from harness.memory import peak_here
from harness.ours import Ours, OursDense, initial_weights

SYSTEMS: tuple[type[System], ...] = (PlainTorch, Ours, OursDense)
GRIDS = {4: 16, 9: 8, 25: 4, 81: 2, 289: 1}  # P -> stride on 32x32
SIDES = {32: 4, 48: 8, 80: 16, 144: 32}  # side of an image -> stride of 5x5 patches
BATCHES = (4, 8, 16, 32, 64)
WIDTHS = (256, 1024, 4096, 16384)
Calls = dict[str, Callable[[], Any]]


def run(bench: Any) -> None:
    """Measures all axes; draws them where `--plot` says."""
    base = replace(TRAINING["cifar-tcr"], batch=4 if bench.options.quick else 16)
    quick = slice(0, 3) if bench.options.quick else slice(None)
    points = {
        "P": [(p, replace(base, patches=p, stride=s)) for p, s in GRIDS.items()][quick],
        "B": [(b, replace(base, batch=b)) for b in BATCHES][quick],
        "image": [(side, replace(base, view=side, stride=s)) for side, s in SIDES.items()][quick],
    }
    panels: dict[tuple[str, str], Any] = {}
    for axis, cases in points.items():
        steps = [(x, lambda case=case: training_steps(bench, case)) for x, case in cases]
        panels |= measure(bench, axis, steps)
    losses = [(d, lambda d=d: vicreg_losses(d, bench.options.device)) for d in WIDTHS[quick]]
    panels |= measure(bench, "D", losses)
    if bench.options.plot:
        from harness.plots import draw_curves

        draw_curves(panels, bench.report.machine, bench.options.plot)


def training_steps(bench: Any, case: Case) -> Calls:
    """One training step of each system, without data path."""
    o = bench.options
    images = bench.images("cifar", 8)
    weights = initial_weights(case)
    setup = Setup(
        case, images, weights, 1, o.device, o.threads, synthetic=True, precision=o.precision
    )

    def call(system: System) -> Callable[[], Any]:
        laps = Laps(clock(o.device))
        return lambda: system.turn(laps)

    return {cls.name: call(cls(setup)) for cls in SYSTEMS}


def vicreg_losses(dim: int, device: str) -> Calls:
    """Forward and backward of VICReg's loss: ours, batched plain torch, the authors' D x D."""
    z = torch.randn(2, 128, dim, device=device, requires_grad=True)
    ours = VICReg()

    def call(loss: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(loss(z), z)

    return {
        "vicreg": call(authors_vicreg),
        "torch": call(plain_vicreg),
        Ours.name: call(lambda z: ours(z)[0]),
    }


def measure(
    bench: Any, axis: str, points: Sequence[tuple[int, Callable[[], Calls]]]
) -> dict[tuple[str, str], Any]:
    """Time and memory of all systems along an axis."""
    o, add = bench.options, bench.report.add
    limit = 4.0 if o.quick else 8.0  # seconds of one call at which a curve ends
    times: dict[str, list[tuple[float, float]]] = {}
    memory: dict[str, list[tuple[float, float]]] = {}
    print(f"\n{paint(f'cost against {axis}', 'bold')}: ms (MiB)")
    ended: set[str] = set()
    for x, build in points:
        calls = {name: call for name, call in build().items() if name not in ended}
        if not calls:
            break
        peaks = {name: peak_here(call) for name, call in calls.items()}
        found = interleave(calls, 2 if o.quick else 3, device=o.device, warmup=0)
        cells = []
        for name, timings in found.items():
            walls = [t.wall * 1e3 for t in timings]
            value = quantiles(walls)[0]
            add(f"scale {axis}={x}", name, "step", walls, "ms")
            add(f"scale {axis}={x}", name, "memory", [peaks[name]], "MiB")
            times.setdefault(name, []).append((x, value))
            memory.setdefault(name, []).append((x, max(peaks[name], 0.1)))
            cells.append(f"{name} {value:,.1f} ({peaks[name]:,.0f})")
            if value > 1e3 * limit / 4:  # the next point has about four times the work
                ended.add(name)
        print(f"  {axis} = {x:<7}" + "   ".join(cells))
    for line in crossings(axis, times):
        print(paint(f"  {line}", "cyan"))
    return {(f"time against {axis}", "ms"): times, (f"memory against {axis}", "MiB"): memory}


def crossings(axis: str, curves: dict[str, list[tuple[float, float]]]) -> list[str]:
    """Sentences on where ours crosses each other curve, interpolated in logarithms."""
    lines = []
    mine = OursDense.name if OursDense.name in curves else Ours.name
    ours = dict(curves[mine])
    for name, points in curves.items():
        if name == mine:
            continue
        both = [(x, math.log(y / ours[x])) for x, y in points if x in ours]
        met = [
            2 ** (math.log2(x) + math.log2(x2 / x) * a / (a - b))
            for (x, a), (x2, b) in itertools.pairwise(both)
            if a * b < 0
        ]
        if met:
            where = ", ".join(f"{x:.0f}" for x in met)
            lines.append(f"{mine} and {name} cross at {axis} = {where}")
        elif both:
            low, high = min(r for _, r in both), max(r for _, r in both)
            faster = "faster" if low >= 0 else "slower" if high <= 0 else "even"
            ends = f"{math.exp(both[0][1]):.2f}x at {both[0][0]}, {math.exp(both[-1][1]):.2f}x"
            lines.append(f"{mine} is {faster} than {name} everywhere: {ends} at {both[-1][0]}")
    return lines
