"""Write the README's performance section from `bench/results/*.json`: `python bench/readme.py`.

One line per case: our figure, and how many times better it is than each provider's in the same run.
Ratios are those of the medians; below 1 we lose.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

from _common import OURS

ROOT = Path(__file__).resolve().parent.parent
SECTION = re.compile(r"(<!-- performance -->\n).*?(<!-- /performance -->)", re.S)
RATES = ("images/s", "patches/s")  # units in which more is better
COSTS = ("time", "memory")  # metrics of which less is better


def rows() -> list[dict[str, Any]]:
    """All rows of the committed results, in the order of the files."""
    found: list[dict[str, Any]] = []
    for path in sorted((ROOT / "bench" / "results").glob("*.json")):
        content = json.loads(path.read_text())
        if isinstance(content, list):
            found += [row for row in content if "provider" in row]
    return found


def table(found: list[dict[str, Any]]) -> str:
    """Markdown: a line per (bench, case, metric) in which we and somebody else have a figure."""
    cases: dict[tuple[str, str, str], dict[str, dict[str, Any]]] = defaultdict(dict)
    for row in found:
        if row["unit"] in RATES or row["metric"] in COSTS:
            cases[row["bench"], row["case"], row["metric"]][row["provider"]] = row
    lines = ["| bench | case | ours | times better than |", "|---|---|---|---|"]
    for (bench, case, metric), providers in cases.items():
        ours = providers.pop(OURS, None)
        if ours is None or not providers:
            continue
        better = [
            f"{name} {ratio(ours, row):.3g}x"
            for name, row in providers.items()
            if ours["value"] > 0 and row["value"] > 0
        ]
        figure = f"{ours['value']:,.4g} {ours['unit']}"
        name = bench.removeprefix("bench_")
        lines.append(f"| {name} | {case}, {metric} | {figure} | {', '.join(better)} |")
    return "\n".join(lines)


def ratio(ours: dict[str, Any], theirs: dict[str, Any]) -> float:
    """How many times better ours is."""
    by = ours["value"] / theirs["value"]
    return by if ours["unit"] in RATES else 1 / by


def main() -> None:
    """Replaces what stands between the README's performance marks."""
    found = rows()
    machines = "\n".join(f"- {line}" for line in sorted({row["machine"] for row in found}))
    text = (
        "Measured side by side in one run, at equal numerics (checked before timing), medians of "
        f"interleaved rounds:\n\n{machines}\n\n{table(found)}\n"
    )
    readme = ROOT / "README.md"
    before = readme.read_text()
    after, count = SECTION.subn(lambda m: m[1] + text + m[2], before)
    if count != 1:
        raise SystemExit("README.md has lost its marks <!-- performance --> ... ")
    readme.write_text(after)


if __name__ == "__main__":
    main()
