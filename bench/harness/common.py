"""What every bench shares: the row schema, interleaved rounds, timing, tables.

A bench names its cases and providers; this file does the rest:

    options = arguments(__doc__).parse_args()
    report = Report("bench_vicreg", threads=options.threads)
    times = interleave({"bagssl_fast": ours, "lightly": theirs}, rounds=options.rounds)
    for provider, timing in times.items():
        report.add("B256 D2048", provider, "time", [t.wall * 1e3 for t in timing], "ms")
    report.table("B256 D2048", "time", floors={"lightly": 5.0})
    report.save(options.json, options.csv)

Rows of all benches have one schema (`Row`). A ratio is the median over rounds of ours against
theirs *in the same round*, so that a machine that slows down for a while slows both.
"""

from __future__ import annotations

import argparse
import csv
import gc
import io
import json
import math
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

from bagssl_fast.files import write_atomic
from harness.machine import cores, machine_line

OURS = "bagssl_fast"
PLAIN = "torch"  # names of plain PyTorch's systems begin with it: eager, compiled, kornia's


@dataclass(frozen=True)
class Row:
    """One figure: `value` is the median over rounds, `p20` and `p80` are their quantiles."""

    bench: str
    case: str
    provider: str
    metric: str
    value: float
    unit: str
    p20: float
    p80: float
    machine: str


class Timing(NamedTuple):
    """Seconds of one call: `wall`, and `cpu` over all threads and ended child processes."""

    wall: float
    cpu: float


def arguments(
    description: str | None, rounds: int = 7, data: bool = False
) -> argparse.ArgumentParser:
    """A parser with the options that all benches have, `--data` if asked; add your own to it."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer rounds and smaller cases")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the rows as JSON")
    parser.add_argument("--csv", type=Path, metavar="PATH", help="write the rows as CSV")
    parser.add_argument("--rounds", type=int, default=rounds, help="interleaved rounds per case")
    parser.add_argument("--threads", type=int, default=cores(), help="threads of every provider")
    if data:
        parser.add_argument(
            "--data",
            type=folder,
            default=os.environ.get("BAGSSL_DATA"),
            help="folder of the tars (default: BAGSSL_DATA)",
        )
    return parser


def folder(name: str) -> Path:
    """The value of `--data`."""
    if not Path(name).is_dir():
        raise argparse.ArgumentTypeError(
            f"{name} is not a folder: expected the folder of the tars, by --data or BAGSSL_DATA"
        )
    return Path(name)


def timed(call: Callable[[], Any], calls: int = 1, device: str = "cpu") -> Timing:
    """Seconds per call over `calls` calls; on a GPU `wall` is taken between two CUDA events.

    A call may return its own `Timing`, e.g. from a worker process, which is used instead.
    """
    if device == "cuda":
        import torch

        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        cpu = cpu_seconds()
        start.record()
        for _ in range(calls):
            call()
        end.record()
        torch.cuda.synchronize()
        return Timing(start.elapsed_time(end) / 1e3 / calls, (cpu_seconds() - cpu) / calls)
    cpu, wall = cpu_seconds(), time.perf_counter()
    reported = []
    for _ in range(calls):
        result = call()
        if isinstance(result, Timing):
            reported.append(result)
    wall, cpu = time.perf_counter() - wall, cpu_seconds() - cpu
    if reported:
        wall, cpu = (sum(seconds) for seconds in zip(*reported, strict=True))
    return Timing(wall / calls, cpu / calls)


def cpu_seconds() -> float:
    """User and system seconds of this process, all its threads and its ended children."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def interleave(
    providers: Mapping[str, Callable[[], Any]],
    rounds: int,
    *,
    warmup: int = 1,
    min_seconds: float = 0.0,
    device: str = "cpu",
) -> dict[str, list[Timing]]:
    """Times all providers in turn, `rounds` times over, each round starting with another one.

    Short calls, by the last warm-up, are repeated so that a measurement takes about `min_seconds`.
    """
    calls = {}
    for name, call in providers.items():
        start = time.perf_counter()
        for _ in range(warmup):
            start = time.perf_counter()
            timed(call, device=device)
        once = time.perf_counter() - start
        calls[name] = max(1, round(min_seconds / once)) if warmup else 1
    names = list(providers)
    times: dict[str, list[Timing]] = {name: [] for name in names}
    gc.collect()
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            times[name].append(timed(providers[name], calls[name], device))
    return times


def quantiles(values: Sequence[float]) -> tuple[float, float, float]:
    """The median, p20 and p80 of a few measurements."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return statistics.median(values), fifths[0], fifths[3]


@dataclass
class Report:
    """Collects rows, prints tables with ratios and floors, and writes JSON and CSV."""

    bench: str
    threads: int | None = None
    rows: list[Row] = field(default_factory=list)
    missed: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.machine = machine_line(self.threads)
        self._samples: dict[tuple[str, str, str], tuple[Sequence[float], str]] = {}
        print(f"{paint(self.bench, 'bold')}  {self.machine}")
        if hasattr(os, "getloadavg") and (load := os.getloadavg()[0]) > 0.5:
            note = f"the load average is {load:.1f}: wall-clock times are noisy, CPU times less so"
            print(paint(note, "yellow"))

    def add(
        self, case: str, provider: str, metric: str, samples: Sequence[float], unit: str
    ) -> None:
        """Adds one row from one measurement per round (the same rounds for all providers)."""
        self._samples[case, provider, metric] = (list(samples), unit)
        value, p20, p80 = quantiles(samples)
        row = Row(self.bench, case, provider, metric, value, unit, p20, p80, self.machine)
        self.rows.append(row)

    def table(
        self,
        case: str,
        metric: str,
        *,
        ours: str = OURS,
        floors: Mapping[str, float] | None = None,
        larger_is_better: bool = False,
        title: str = "",
    ) -> None:
        """Prints one metric of a case, our ratio to every provider, and floors reached or missed.

        The ratio is above 1 if ours is better, and is added to the rows (`METRIC, ratio to
        NAME`, and `METRIC, floor to NAME` if there is one).
        """
        floors = floors or {}
        found = {
            provider: entry
            for (c, provider, m), entry in self._samples.items()
            if (c, m) == (case, metric)
        }
        mine, unit = found.get(ours, ([], next(iter(found.values()))[1]))
        print(f"\n{paint(title or case, 'bold')}")
        print(paint(f"  {'':30}{unit:>14}{'p20':>12}{'p80':>12}{'ours/this':>11}  floor", "dim"))
        for provider, (samples, _) in found.items():
            cells = "".join(
                f"{number(value):>{width}}"
                for value, width in zip(quantiles(samples), (14, 12, 12), strict=True)
            )
            line, color = f"  {provider:30}{cells}", "cyan" if provider == ours else ""
            if mine and provider != ours:
                pairs = zip(mine, samples, strict=False)
                ratios = [a / b if larger_is_better else b / a for a, b in pairs]
                ratio = quantiles(ratios)[0]
                self.add(case, ours, f"{metric}, ratio to {provider}", ratios, "x")
                line += f"{ratio:>10.2f}x"
                floor = floors.get(provider)
                color = "red" if ratio < (floor or 1.0) else "green" if floor else ""
                if floor:
                    self.add(case, ours, f"{metric}, floor to {provider}", [floor], "x")
                    line += f"  {floor:g}x {'reached' if ratio >= floor else 'MISSED'}"
                    if ratio < floor:
                        self.missed.append(f"{case}: {ratio:.2f}x {provider}, floor {floor:g}x")
            print(paint(line, color))

    def parity(self, case: str, provider: str, error: float, tolerance: float) -> None:
        """Adds the distance of a provider's result from the truth; one too large ends the bench."""
        self.add(case, provider, "parity", [error], f"error, at most {tolerance:g}")
        if not error <= tolerance:
            raise SystemExit(f"{case}: {provider} is off by {error:g}, more than {tolerance:g}")

    def save(self, json_path: Path | None = None, csv_path: Path | None = None) -> None:
        """Repeats the missed floors and writes the rows to the given paths."""
        if self.missed:
            print(paint("\nfloors missed:\n  " + "\n  ".join(self.missed), "red"))
        self.write(json_path, csv_path)

    def write(self, json_path: Path | None = None, csv_path: Path | None = None) -> None:
        """Writes the rows so far: an interruption of the bench leaves them."""
        for path in (json_path, csv_path):
            if path:
                path.parent.mkdir(parents=True, exist_ok=True)
        if json_path:
            # JSON has no infinity: a target that was not reached is null.
            rows = [
                {k: None if v == math.inf else v for k, v in asdict(row).items()}
                for row in self.rows
            ]
            write_atomic(json_path, (json.dumps(rows, indent=1, allow_nan=False) + "\n").encode())
        if csv_path:
            text = io.StringIO(newline="")
            writer = csv.DictWriter(text, [f.name for f in fields(Row)])
            writer.writeheader()
            writer.writerows(asdict(row) for row in self.rows)
            write_atomic(csv_path, text.getvalue().encode())


def is_ours(name: str) -> bool:
    return name.startswith(OURS)


def best_plain(values: Mapping[str, float], larger_is_better: bool = False) -> str | None:
    """The best of plain PyTorch's systems, eager or compiled; None if none was measured."""
    plain = {name: value for name, value in values.items() if name.split("_")[0] == PLAIN}
    if not plain:
        return None
    return (max if larger_is_better else min)(plain, key=lambda name: plain[name])


def against_the_best(seconds: Mapping[str, float], what: str = "") -> None:
    """Says how each of ours compares with the best plain PyTorch; inf is what did not get there."""
    best = best_plain(seconds)
    if best is None or math.isinf(seconds[best]):
        return
    for name in filter(is_ours, seconds):
        ratio = seconds[best] / max(seconds[name], 1e-9)
        text = f"  {name} is {ratio:.2f} times as fast as the best plain PyTorch, {best}{what}"
        print(paint(text, "cyan" if ratio >= 1 else "red"))


def number(value: float) -> str:
    """A readable number: thousands separated, four digits below."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def paint(text: str, style: str) -> str:
    """Colors a line on a terminal, unless NO_COLOR is set."""
    codes = {"bold": 1, "dim": 2, "red": 31, "green": 32, "yellow": 33, "cyan": 36}
    if style not in codes or not sys.stdout.isatty() or "NO_COLOR" in os.environ:
        return text
    return f"\033[{codes[style]}m{text}\033[0m"
