"""Static analysis of the kernels, without a GPU: `python bench/kernel_report.py [--json PATH]`.

For every kernel at the shapes of the recipes, for sm_80, sm_90, sm_100 and gfx942 and each dtype,
compiled ahead of time exactly as for a launch: registers, spills, shared memory, occupancy, matrix
instructions. For every pass: bytes loaded and stored, counted in Triton's interpreter, divided by
the minimum (each input, result and saved tensor once). Bytes of bfloat16 are those of float16,
which the interpreter can run.

The exit status depends on these limits: no spills to memory (on gfx942 scalar registers spill into
lanes of vector registers: shown as "+n"); no more shared memory than the target has; matrix
instructions in every kernel with a dot; at most 1.15 times the minimum of bytes for patch_views,
bag_pool, LARS, the passes around linear_bn_relu's products and vicreg's statistics. Bytes of a
scratch buffer that fits the second-level cache (of views above 64 pixels) are counted separately.

`h100_us` is an ESTIMATE, not a measurement: the larger of bytes / 3.35 TB/s and FLOPs over the
tensor cores' peak (989 TFLOP/s in 16 bits, 165 in float32 as three TF32 products; 67 without a
dot), i.e. the time of an H100 at those peaks.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

DTYPES = ("float32", "bfloat16", "float16")
BANDWIDTH = 3.35e12
PEAK = {"float32": 165e12, "bfloat16": 989e12, "float16": 989e12}
VECTOR_PEAK = 67e12
QUICK_TARGETS = ("sm_90",)


def compile_rows(quick: bool, targets: list[str], dtypes: list[str]) -> list[dict[str, Any]]:
    import torch

    from harness.kernel_cases import CASES
    from harness.kernel_probe import compile_case

    rows = []
    for target in targets:
        for case in CASES:
            if quick and not case.quick:
                continue
            for dtype in dtypes:
                rows += compile_case(case, target, getattr(torch, dtype))
                print(f"compiled {target} {case.op} {case.label} {dtype}", file=sys.stderr)
    return rows


def traffic_rows(quick: bool) -> list[dict[str, Any]]:
    """In the interpreter: bytes of every pass, in float32 and float16 (bfloat16 is the same)."""
    import torch

    from harness.kernel_cases import CASES
    from harness.kernel_probe import count_case

    rows = []
    for case in CASES:
        if quick and not case.quick:
            continue
        for dtypes in (
            (["float16", "bfloat16"],) if quick else (["float32"], ["float16", "bfloat16"])
        ):
            dtype = getattr(torch, dtypes[0])
            counts = count_case(case, dtype)
            shown = case.passes(dtype)
            for part, whole in zip((case.count_passes or case.passes)(dtype), shown, strict=True):
                found = [counts[name] for name in part.kernels if name in counts]
                main = sum(count.memory for count in found)
                total = main + sum(count.scratch for count in found)
                rows += [
                    {
                        "op": case.op,
                        "case": case.label,
                        "counted": case.count_label or "all of it",
                        "sampled": not all(count.exact for count in found),
                        "pass": part.name,
                        "dtype": name,
                        "bytes": round(total),
                        "fewest": round(part.fewest),
                        "ratio": round(main / part.fewest, 4),
                        "ratio_with_scratch": round(total / part.fewest, 4),
                        "floor": part.floor,
                        "h100_us": round(estimate(whole, main / part.fewest, name) * 1e6, 2),
                    }
                    for name in dtypes
                ]
            print(f"counted {case.op} {case.label} {dtypes[0]}", file=sys.stderr)
    return rows


def estimate(part: Any, ratio: float, dtype: str) -> float:
    """Seconds on an H100 at its peaks, for products (their tiles are cached) at minimum bytes."""
    has_floor = part.floor is not None
    moved = part.fewest * (ratio if has_floor else 1.0)
    return max(moved / BANDWIDTH, part.flops / (VECTOR_PEAK if has_floor else PEAK[dtype]))


def count_in_interpreter(quick: bool) -> list[dict[str, Any]]:
    command = [sys.executable, __file__, "--count", *(["--quick"] if quick else [])]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    result = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    rows: list[dict[str, Any]] = json.loads(result.stdout)
    return rows


def failures(kernels: list[dict[str, Any]], traffic: list[dict[str, Any]]) -> list[str]:
    """A message for every limit that is missed."""
    missed = []
    for row in kernels:
        name = f"{row['kernel']} ({row['case']}, {row['target']}, {row['dtype']})"
        if row["spills"]:
            missed.append(f"{name}: {row['spills']} spills")
        if row["shared"] > row["shared_limit"]:
            missed.append(f"{name}: {row['shared']} bytes of shared memory")
        if row["has_dot"] and not row["matrix_instructions"]:
            missed.append(f"{name}: a dot without matrix instructions")
    for row in traffic:
        if row["floor"] and row["ratio"] > row["floor"]:
            name = f"{row['op']} {row['pass']} ({row['case']}, {row['dtype']})"
            missed.append(f"{name}: {row['ratio']:.3f} times the minimum of bytes")
    return missed


def show(kernels: list[dict[str, Any]], traffic: list[dict[str, Any]]) -> None:
    print(f"\n{'kernel':<26}{'target':<8}{'most registers':>15}{'spills':>9}{'most shared':>13}"
          f"{'occupancy':>11}  matrix instructions")  # fmt: skip
    for key in sorted({(row["op"], row["kernel"], row["target"]) for row in kernels}):
        rows = [row for row in kernels if (row["op"], row["kernel"], row["target"]) == key]
        names = sorted({name for row in rows for name in row["matrix_instructions"]})
        scalar = max(row["scalar_spills"] for row in rows)
        spills = f"{max(row['spills'] for row in rows)}" + (f"+{scalar}" if scalar else "")
        print(
            f"{key[1].strip('_').removesuffix('_kernel'):<26}{key[2]:<8}"
            f"{max(row['registers'] for row in rows):>15}{spills:>9}"
            f"{max(row['shared'] for row in rows):>13}"
            f"{min(row['occupancy'] for row in rows):>11.2f}  {' '.join(names)}"
        )
    print(f"\n{'pass':<64}{'dtype':<10}{'bytes/fewest':>13}{'H100 estimate':>15}")
    for row in traffic:
        extra = "" if row["ratio"] == row["ratio_with_scratch"] else (
            f"  ({row['ratio_with_scratch']:.2f} with the cached scratch)"
        )  # fmt: skip
        print(f"{row['op'] + ' ' + row['pass'] + ', ' + row['case']:<64}{row['dtype']:<10}"
              f"{row['ratio']:>13.3f}{row['h100_us']:>12.1f} us{extra}")  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write all rows to this file")
    parser.add_argument("--quick", action="store_true", help="one target, one dtype, few shapes")
    parser.add_argument("--targets", nargs="+", help="only these")
    parser.add_argument("--count", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.count:
        json.dump(traffic_rows(options.quick), sys.stdout)
        return 0

    import torch
    import triton

    from harness.kernel_probe import TARGETS

    targets = options.targets or list(QUICK_TARGETS if options.quick else TARGETS)
    if unknown := set(targets) - set(TARGETS):
        parser.error(f"--targets {' '.join(sorted(unknown))}: the targets are {' '.join(TARGETS)}")
    kernels = compile_rows(options.quick, targets, ["float16"] if options.quick else list(DTYPES))
    traffic = count_in_interpreter(options.quick)
    show(kernels, traffic)
    missed = failures(kernels, traffic)
    if options.json:
        report = {
            "command": "python bench/kernel_report.py --json PATH",
            "triton": triton.__version__,
            "torch": torch.__version__,
            "note": "compiled ahead of time and counted in the interpreter; h100_us is an estimate",
            "missed": missed,
            "kernels": kernels,
            "traffic": traffic,
        }
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    print("\n" + ("\n".join(["limits missed:", *missed]) if missed else "all limits are met"))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
