"""Fuzzes the readers: `python fuzz/run.py --seconds 30`, all targets or those named.

Each target runs in a process of its own, so that a crash or a hang is one finding and the others
go on. Execution n of a target depends on --seed and n alone: `--only n` repeats it. With --engine
atheris (installed by `pip install atheris`) libFuzzer chooses the mutations by the coverage of our
Python instead; it keeps what it found in --out. Under AddressSanitizer: see scripts/sanitize.sh.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from random import Random

from mutate import mutated

HERE = Path(__file__).parent
HANG_SECONDS = 30
START_SECONDS = 300  # until the first execution: a busy machine imports slowly


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("targets", nargs="*", help="all by default")
    parser.add_argument("--seconds", type=float, default=5, help="for each target (5)")
    parser.add_argument("--executions", type=int, help="of each target, instead of --seconds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first execution (0)")
    parser.add_argument("--only", type=int, help="repeat this execution of one target")
    parser.add_argument("--engine", choices=("mutate", "atheris"), default="mutate")
    parser.add_argument("--out", type=Path, default=Path("fuzz-findings"), help="for inputs")
    parser.add_argument("--json", type=Path, help="write the counts here")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return child(options)

    from targets import TARGETS

    unknown = [name for name in options.targets if name not in TARGETS]
    if unknown:
        parser.error(f"no target {unknown[0]!r}; the targets are {', '.join(TARGETS)}")
    if options.only is not None:
        (name,) = options.targets
        TARGETS[name].run(input_of(name, options.seed, options.only))
        return 0
    results = [watch(name, options) for name in options.targets or TARGETS]
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    return int(any(result["findings"] for result in results))


def input_of(name: str, seed: int, number: int, seeds: list[bytes] | None = None) -> bytes:
    """What execution `number` of a target reads."""
    from targets import TARGETS

    target = TARGETS[name]
    random = Random(f"{name} {seed} {number}")
    data = mutated(seeds or target.seeds(), random)
    return target.repair(data, random) if target.repair else data


def watch(name: str, options: argparse.Namespace) -> dict:
    """Runs a target's child until its time or number is over, again after each finding."""
    begin, first, findings = time.monotonic(), options.first, []
    with tempfile.NamedTemporaryFile() as file:
        file.write(bytes(16))
        file.flush()
        counter = mmap.mmap(file.fileno(), 16)
        while True:
            left = options.seconds - (time.monotonic() - begin)
            count = options.executions
            if count is not None:
                count -= first - options.first
            if (count is None and left <= 0) or (count is not None and count <= 0):
                break
            reason = run_child(name, options, first, left, count, file.name, counter)
            number = int.from_bytes(counter[:8], "little")
            if not reason:
                first = number
                break
            findings.append({"execution": number, "what": reason})
            options.out.mkdir(parents=True, exist_ok=True)
            if options.engine == "mutate":
                content = input_of(name, options.seed, number)
                (options.out / f"{name}-{options.seed}-{number}").write_bytes(content)
            print(f"{name}: execution {number}: {reason}", file=sys.stderr)
            first = number + 1
            if len(findings) == 20:
                break
    seconds = time.monotonic() - begin
    done = first - options.first
    print(
        f"{name:<12}{done:>10,} executions{seconds:>8.0f} s{len(findings):>4} findings", flush=True
    )
    return {
        "target": name,
        "seed": options.seed,
        "executions": done,
        "seconds": round(seconds),
        "findings": findings,
    }


def run_child(name, options, first, left, count, counter_file, counter) -> str:
    """Why the child ended, or nothing if it did all it should."""
    command = [sys.executable, __file__, "--child", counter_file, name]
    command += ["--seed", str(options.seed), "--first", str(first), "--seconds", str(left)]
    command += ["--engine", options.engine, "--out", str(options.out)]
    if count is not None:
        command += ["--executions", str(count)]
    counter[:] = first.to_bytes(8, "little") + bytes(8)
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    seen, since = 0, time.monotonic()
    while True:
        try:
            _, errors = process.communicate(timeout=1)
            break
        except subprocess.TimeoutExpired:
            now = int.from_bytes(counter[8:], "little")
            if now != seen:
                seen, since = now, time.monotonic()
            limit = HANG_SECONDS if seen else START_SECONDS
            if time.monotonic() - since > limit:
                process.kill()
                process.communicate()
                return f"no end within {limit} s"
    if process.returncode == 0:
        return ""
    lines = [line for line in errors.strip().splitlines() if "^^^" not in line]
    return "\n".join([f"exit {process.returncode}", *lines[-5:]])


def child(options: argparse.Namespace) -> int:
    """The executions of one target in this process; the counter file tells which one is running."""
    (name,) = options.targets
    with open(options.child, "r+b") as file:
        counter = mmap.mmap(file.fileno(), 16)
    warnings.simplefilter("ignore")
    from targets import TARGETS

    target = TARGETS[name]
    seeds = target.seeds()
    if options.engine == "atheris":
        return with_atheris(target, seeds, options, counter)
    end = time.monotonic() + options.seconds
    number, ticks = options.first, 0
    last = None if options.executions is None else options.first + options.executions
    while number != last and (last is not None or time.monotonic() < end):
        ticks += 1
        counter[:] = number.to_bytes(8, "little") + ticks.to_bytes(8, "little")
        try:
            target.run(input_of(name, options.seed, number, seeds))
        except Exception:
            traceback.print_exc()
            return 1
        number += 1
    counter[:8] = number.to_bytes(8, "little")
    return 0


def with_atheris(target, seeds, options, counter) -> int:
    """The same target under libFuzzer."""
    import atheris

    folder = options.out / "corpus" / options.targets[0]
    folder.mkdir(parents=True, exist_ok=True)
    for i, seed in enumerate(seeds):
        (folder / f"seed{i}").write_bytes(seed)
    executions = 0

    def run(data: bytes) -> None:
        nonlocal executions
        executions += 1
        count = options.first + executions
        counter[:] = count.to_bytes(8, "little") + executions.to_bytes(8, "little")
        target.run(data)

    atheris.instrument_all()
    end = f"-max_total_time={max(1, round(options.seconds))}"
    if options.executions is not None:
        end = f"-runs={options.executions}"
    artifacts = f"-artifact_prefix={options.out}/"
    atheris.Setup([sys.argv[0], str(folder), end, artifacts, "-verbosity=0"], run)
    atheris.Fuzz()
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(HERE))
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
