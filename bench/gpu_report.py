"""Ten minutes of a GPU: is it right, how fast is it, and where does a step's time go.

    python bench/gpu_report.py [--minutes 10] [--json gpu_report.json] [--kernels-only] [--dry-run]

Stages, the most telling first, each within its share of the time and written to the file as it
ends, so that a run that is cut short leaves what it has:

    parity    every op at the recipes' shapes in float32, bfloat16 and float16 against float64
    steps     whole training steps: ours and torch's own ops, compiled, graphed and eager; memory;
              whether a step makes the host wait; its longest kernels
    ops       each op forward and backward: ours, the reference, the reference compiled
    kernels   each kernel's device time against the measured speed of a copy and of a product
    ranks     two GPUs: losses equal to one, the speed of an all-reduce

It reads no data set and needs no network, and of the package neither a decoder nor Pillow. ResNets
need torchvision, the ViT needs timm; recipes of what is not installed are left out, and said.
`--dry-run` runs all of it on a CPU at toy sizes, the kernels in Triton's interpreter. The exit
status is 1 if a parity failed. docs/gpu.md says how to read the tables.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SHARES = {"parity": 0.15, "steps": 0.45, "ops": 0.15, "kernels": 0.15, "ranks": 0.1}
ALONE = ("steps", "ranks")  # stages that --kernels-only leaves out
DTYPES = ("float32", "bfloat16", "float16")
Row = dict[str, Any]


class Report:
    """What is known so far; every stage is written as it ends."""

    def __init__(self, path: Path, minutes: float) -> None:
        self.path, self.seconds = path, 60 * minutes
        self.data: dict[str, Any] = {"command": " ".join(sys.argv), "left_out": []}

    def stage(self, name: str, cases: list[Any], run: Callable[[Any], list[Row]]) -> None:
        """The rows of cases until the stage's time is over; an error is a row, not the end."""
        begin, rows = time.monotonic(), self.data.setdefault(name, [])
        for case in cases:
            label = " ".join(filter(None, (getattr(case, "op", ""), getattr(case, "label", case))))
            if time.monotonic() - begin > SHARES[name] * self.seconds:
                self.data["left_out"].append(f"{name} {label}: no time was left")
                continue
            print(f"{name}: {label}", file=sys.stderr, flush=True)
            try:
                rows += run(case)
            except Exception as error:
                first = (str(error).splitlines() or [""])[0]
                rows.append({"case": label, "failed": f"{type(error).__name__}: {first}"})
        self.write()

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.data, indent=1) + "\n")

    def wrong(self) -> list[str]:
        """What makes the exit status 1."""
        rows = [row for name in ("parity", "ranks") for row in self.data.get(name, [])]
        bad = [row for row in rows if not row.get("passed", False)]
        bad += [row for row in self.data.get("steps", []) if not row.get("finite", True)]
        return [" ".join(str(value) for value in row.values()) for row in bad]


def build_extension() -> None:
    """The compiled extension, if it is not there yet."""
    try:
        import bagssl_fast._C  # noqa: F401
    except ImportError:
        command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation"]
        subprocess.run([*command, "-e", str(ROOT)], check=True)


def machine(device: Any) -> Row:
    import torch
    import triton

    on_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else "cpu, interpreted",
        "capability": list(torch.cuda.get_device_capability(device)) if on_gpu else None,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda or torch.version.hip,
    }


def run(report: Report, device: Any, toy: bool, kernels_only: bool) -> None:
    import torch

    from harness import gpu_clock, gpu_kernels, gpu_ops, gpu_steps

    dtypes = [getattr(torch, name) for name in (DTYPES[:1] if toy else DTYPES)]
    report.data["machine"] = machine(device)
    report.data["peaks"] = {"copy": gpu_clock.copy_peak(device, 1 if toy else 1024)} | {
        str(dtype)[6:]: gpu_clock.gemm_peak(device, dtype, 64 if toy else 8192) for dtype in dtypes
    }
    peaks, name = report.data["peaks"], str(device)
    report.write()

    def parity(case: gpu_ops.OpCase) -> list[Row]:
        return [
            {"op": case.op, "case": case.label, "dtype": str(dtype)[6:]}
            | gpu_ops.parity(case, dtype, name)
            for dtype in dtypes
        ]

    def steps(case: gpu_steps.StepCase) -> list[Row]:
        if package := gpu_steps.missing(case.config):
            report.data["left_out"].append(f"steps {case.label}: {package} is not installed")
            return []
        measured = gpu_steps.measure(case.config, device, case.variant, 0.0 if toy else 3.0)
        return [{"recipe": case.recipe, "variant": case.variant} | measured]

    def ops(case: gpu_ops.OpCase) -> list[Row]:
        return [
            {"op": case.op, "case": case.label, "dtype": str(dtype)[6:], "provider": provider}
            | {"ms": gpu_clock.milliseconds(call, device, 0.3, flush=True)}
            for dtype in dtypes[:2]
            for provider, call in gpu_ops.timed_calls(case, dtype, name, toy).items()
        ]

    def kernels(case: Any) -> list[Row]:
        return [
            row | {"op": case.op}
            for dtype in dtypes[:2]
            for row in gpu_kernels.kernel_rows(
                case, dtype, device, peaks["copy"], peaks[str(dtype)[6:]]
            )
        ]

    def ranks(label: str) -> list[Row]:
        from harness import gpu_ranks

        shape = (3, 4, 6) if toy else (20, 512, 1024)
        return [{"case": label} | gpu_ranks.exchange(not toy, shape, 1 if toy else 256)]

    several = toy or torch.cuda.device_count() > 1
    stages: dict[str, tuple[list[Any], Callable[[Any], list[Row]]]] = {
        "parity": (gpu_ops.op_cases(toy), parity),
        "steps": (gpu_steps.step_cases(toy), steps),
        "ops": (gpu_ops.op_cases(toy), ops),
        "kernels": (gpu_kernels.kernel_cases(toy), kernels),
        "ranks": (["two processes"] if several else [], ranks),
    }
    for stage, (cases, function) in stages.items():
        if not (kernels_only and stage in ALONE):
            report.stage(stage, cases, function)


def show(data: dict[str, Any]) -> None:
    """The tables that a person reads."""
    print(f"\n{data['machine']}\n{data['peaks']}")
    columns: dict[str, tuple[str, ...]] = {
        "parity": ("op", "case", "dtype", "error", "limit", "passed"),
        "steps": ("recipe", "variant", "ms", "images_per_s", "memory_mb", "waits"),
        "ops": ("op", "case", "dtype", "provider", "ms"),
        "kernels": ("op", "case", "pass", "dtype", "ms", "bound", "share_of_copy", "share_of_gemm"),
        "ranks": ("case", "backend", "error", "passed", "all_reduce_gb_per_s"),
    }
    for name, keys in columns.items():
        rows = data.get(name, [])
        if not rows:
            continue
        cells = [[*keys]] + [[_cell(row.get(key)) for key in keys] for row in rows]
        widths = [max(len(row[i]) for row in cells) for i in range(len(keys))]
        print(f"\n{name}")
        for row, line in zip([None, *rows], cells, strict=True):
            text = "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
            print(f"  {text.rstrip()}" + (f"  {row['failed']}" if row and "failed" in row else ""))
    for row in data.get("steps", []):
        if row.get("kernels"):
            print(f"\nlongest kernels of {row['recipe']}, {row['variant']}")
            for kernel in row["kernels"]:
                print(f"  {kernel['ms']:8.3f} ms {kernel['launches']:5}  {kernel['name']}")
    for line in data["left_out"]:
        print(f"left out  {line}")


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else str(value)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0, help="about how long it may take")
    parser.add_argument("--json", type=Path, default=Path("gpu_report.json"), help="the results")
    parser.add_argument("--kernels-only", action="store_true", help="no whole steps, no ranks")
    parser.add_argument("--dry-run", action="store_true", help="on a CPU, at toy sizes")
    options = parser.parse_args()
    if options.minutes <= 0:
        parser.error(f"--minutes {options.minutes}: must be greater than 0")
    if options.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported
    for package in ("torch", "triton"):
        if find_spec(package) is None:
            parser.error(f"{package} is not installed: the kernels need it")
    sys.path[:0] = [str(ROOT)]
    build_extension()
    import torch

    if not options.dry_run and not torch.cuda.is_available():
        parser.error("torch sees no GPU here: --dry-run shows on a CPU what would run")
    report = Report(options.json, options.minutes)
    device = torch.device("cpu" if options.dry_run else "cuda")
    run(report, device, options.dry_run, options.kernels_only)
    show(report.data)
    wrong = report.wrong()
    print("\n" + ("\n".join(["wrong:", *wrong]) if wrong else f"all is right; {options.json}"))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
