"""What the op benches share: named cases, providers, parity, time, memory, share of the machine.

A bench file defines its cases and one function, `build(provider, case_id) -> call`, whose call does
one forward and backward (or what the case says) and returns the value and the gradients. For each
case this file checks parity first (a mismatch ends the bench), then times all providers in
interleaved rounds, measures each one's peak memory in a process of its own, and prints which share
of the machine's measured GEMM or memory speed ours reaches. Cases that ours loses are printed too.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bagssl_fast import machine
from harness.common import OURS, Report, arguments, interleave
from harness.memory import peak_memory

REFERENCE, COMPILED = "reference", "torch.compile(reference)"
Call = Callable[[], Sequence[Tensor]]
Build = Callable[[str, str], Call]


@dataclass(frozen=True)
class OpCase:
    """One shape of an op.

    Args:
        id: its name, e.g. "B256 D2048 P2".
        providers: what it is compared with; parity is checked against the first.
        floors: the speedup that ours should reach, by provider.
        memory_floors: the same for peak memory.
        flops: of ours, for its share of the GEMM peak; 0 = not shown.
        bytes: that any implementation must move, for the share of bandwidth; 0 = not shown.
        rounds: maximum of rounds, for cases whose peers take minutes.
        quick: whether `--quick` and pytest-benchmark run it.
        tolerance: largest relative L2 distance of a result to the peer's.
        parity: builds the calls for the parity check, if other than those that are timed.
        memory: whether peak memory is compared.
    """

    id: str
    providers: tuple[str, ...]
    floors: dict[str, float] = field(default_factory=dict)
    memory_floors: dict[str, float] = field(default_factory=dict)
    flops: float = 0.0
    bytes: float = 0.0
    rounds: int = 7
    quick: bool = True
    tolerance: float = 1e-5
    parity: Build | None = None
    memory: bool = True


def gradients(loss: Tensor, *wrt: Tensor) -> list[Tensor]:
    """The value and its gradients."""
    return [loss.detach(), *torch.autograd.grad(loss, wrt)]


def main(
    bench: str,
    doc: str | None,
    cases: Sequence[OpCase],
    build: Build,
    argv: Sequence[str] | None = None,
) -> None:
    """Runs a bench from the command line."""
    parser = arguments(doc)
    parser.add_argument("--case", help="only cases whose name contains this")
    parser.add_argument("--no-memory", action="store_true", help="skip the memory measurements")
    parser.add_argument("--no-compile", action="store_true", help="skip torch.compile")
    options = parser.parse_args(argv)
    chosen = [case for case in cases if options.case is None or options.case in case.id]
    if not chosen:
        names = "; ".join(case.id for case in cases)
        parser.error(f"--case {options.case}: no case's name contains this; the cases are {names}")
    torch.set_num_threads(options.threads)
    machine.keep_freed_memory()  # for all providers, as our training does
    report = Report(bench, threads=options.threads)
    speeds = machine_speeds(report)
    for case in chosen:
        if options.quick and not case.quick:
            continue
        skipped = COMPILED if options.quick or options.no_compile else ""
        providers = [name for name in (OURS, *case.providers) if name != skipped]
        calls = {name: build(name, case.id) for name in providers}
        check_parity(
            report, case, {n: case.parity(n, case.id) for n in calls} if case.parity else calls
        )
        rounds = min(options.rounds, case.rounds, 3 if options.quick else 99)
        times = interleave(calls, rounds, min_seconds=0.05 if options.quick else 0.3)
        for name, timing in times.items():
            report.add(case.id, name, "time", [t.wall * 1e3 for t in timing], "ms")
            report.add(case.id, name, "cpu time", [t.cpu * 1e3 for t in timing], "ms")
        report.table(case.id, "time", floors=case.floors, title=f"{case.id}: wall-clock time")
        report.table(case.id, "cpu time", title=f"{case.id}: CPU time of all threads")
        print_shares(report, case, min(t.wall for t in times[OURS]), speeds)
        results = sum(x.numel() * x.element_size() for x in calls[OURS]()) / 2**20
        del calls
        if case.memory and not options.no_memory:
            for name in providers:
                if name != COMPILED:
                    peak = peak_memory(build_in_child, build, name, case.id, options.threads)
                    report.add(case.id, name, "memory", [max(peak - results, 0.01)], "MiB")
            title = f"{case.id}: peak memory besides inputs and results ({results:.0f} MiB)"
            report.table(case.id, "memory", floors=case.memory_floors, title=title)
    report.save(options.json, options.csv)


def build_in_child(build: Build, provider: str, case_id: str, threads: int) -> Callable[[], Any]:
    torch.set_num_threads(threads)
    call = build(provider, case_id)
    call()  # one-time setup of libraries does not count
    return call


def check_parity(report: Report, case: OpCase, calls: dict[str, Call]) -> None:
    """Every provider's value and gradients against the first peer's."""
    peer = case.providers[0]
    truth = [x.detach().double() for x in calls[peer]()]
    for name, call in calls.items():
        if name == peer:
            continue
        pairs = zip(call(), truth, strict=True)
        errors = [float((x.double() - t).norm() / t.norm().clamp_min(1e-12)) for x, t in pairs]
        report.parity(case.id, name, max(errors), case.tolerance)
        print(f"{case.id}: {name} is within {max(errors):.1e} of {peer}")


def machine_speeds(report: Report) -> tuple[float, float]:
    """FLOP/s of a square float32 GEMM, bytes/s of a copy, at the threads of the bench."""
    a, b = torch.randn(2, 1536, 1536)
    gemm = 2 * 1536**3 / _best(lambda: a @ b)
    source = torch.randn(1 << 24)
    target = torch.empty_like(source)
    copy = 2 * 4 * (1 << 24) / _best(lambda: target.copy_(source))
    report.add("machine", "torch", "GEMM peak", [gemm / 1e9], "GFLOP/s")
    report.add("machine", "torch", "copy", [copy / 1e9], "GB/s")
    print(f"this machine: GEMM {gemm / 1e9:.1f} GFLOP/s, copy {copy / 1e9:.1f} GB/s")
    return gemm, copy


def print_shares(report: Report, case: OpCase, seconds: float, speeds: tuple[float, float]) -> None:
    for amount, speed, unit in (
        (case.flops, speeds[0], "of the GEMM peak"),
        (case.bytes, speeds[1], "of the copy bandwidth"),
    ):
        if amount:
            share = 100 * amount / seconds / speed
            report.add(case.id, OURS, unit, [share], "%")
            print(f"  {OURS} reaches {share:.0f}% {unit} ({amount / seconds / 1e9:.1f} G/s)")


def _best(call: Callable[[], Any], rounds: int = 5) -> float:
    """The shortest of a few rounds: the machine's speed, without its other load."""
    times = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times[1:])
