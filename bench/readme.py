"""Write the README's performance section from `bench/results/*.json`: `python bench/readme.py`.

One table per bench with a line for each of our variants in a case: its figure, and how many times
better it is than each other provider in the same run; where whole trainings are compared, first
than the best plain PyTorch, eager or compiled. Ratios are of the medians; below 1 ours loses.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness.common import OURS, best_plain, is_ours

ROOT = Path(__file__).resolve().parent.parent
SECTION = re.compile(r"(<!-- performance -->\n).*?(<!-- /performance -->)", re.S)
TITLES = {  # in this order
    "throughput": "Whole training steps, data included, and evaluation (`bench/throughput.py`)",
    "time_to_accuracy": "Time to accuracy (`bench/time_to_accuracy.py`; medians over seeds)",
    "bench_loader": "The data path (`bench/bench_loader.py`)",
    "ops": "Ops, forward and (where there is one) backward (`bench/bench_<op>.py`)",
    "bench_swap": "In other people's trainings (`bench/bench_swap.py`)",
}
WHOLE = ("throughput", "time_to_accuracy")  # benches with plain PyTorch's systems
METRICS = {"images per second", "time", "memory", "step", "patches per core", "images per core"}


def is_shown(row: dict[str, Any]) -> bool:
    """Whether the README shows a row; the JSON files have all."""
    if row["bench"] == "throughput":
        return row["metric"] in ("images per second", "memory")
    return row["metric"] in METRICS or row["metric"].startswith("seconds to ")


def rows() -> list[dict[str, Any]]:
    """All rows of the committed results, in the order of the files."""
    found: list[dict[str, Any]] = []
    for path in sorted((ROOT / "bench" / "results").glob("*.json")):
        content = json.loads(path.read_text())
        if isinstance(content, list):
            found += [row for row in content if "provider" in row]
    for row in found:
        row["value"] = math.inf if row["value"] is None else row["value"]  # not reached
    return found


def tables(found: list[dict[str, Any]]) -> str:
    """Markdown: a table per title, a line per case and variant of ours."""
    cases: dict[tuple[str, str], dict[str, dict[str, dict[str, Any]]]] = {}
    for row in filter(is_shown, found):
        metrics = cases.setdefault((row["bench"], row["case"]), {})
        # Time and memory share a line; accuracy targets have lines of their own.
        metrics.setdefault(row["metric"], {})[row["provider"]] = row
    blocks: dict[str, list[str]] = {title: [] for title in TITLES}
    for (bench, case), metrics in cases.items():
        memory = metrics.pop("memory", {})
        for metric, providers in metrics.items():
            for provider, ours in providers.items():
                better = comparison(providers, provider)
                if not is_ours(provider) or not better:
                    continue
                name = case if bench in TITLES else f"{bench.removeprefix('bench_')}: {case}"
                if metric.startswith("seconds to "):
                    name += f", {metric}"
                if form := provider.removeprefix(OURS).strip("_"):
                    name += f" ({form})"
                figure = f"{ours['value']:,.4g} {ours['unit']}"
                if math.isinf(ours["value"]):  # an accuracy in the time that was given
                    figure = "not reached"
                cells = [name, figure, better, comparison(memory, provider)]
                if bench in WHOLE:
                    cells.insert(2, against_best(providers, ours))
                line = f"| {' | '.join(cells)} |"
                blocks[bench if bench in TITLES else "ops"].append(line)
    return "\n\n".join(
        f"**{TITLES[title]}**\n\n{head(title)}" + "\n".join(lines)
        for title, lines in blocks.items()
        if lines
    )


def head(title: str) -> str:
    """The head of a table."""
    names = ["case", "ours", "times faster than", "times less memory than"]
    if title in WHOLE:
        names.insert(2, "times faster than the best plain PyTorch")
    return f"| {' | '.join(names)} |\n|{'---|' * len(names)}\n"


def against_best(providers: dict[str, dict[str, Any]], ours: dict[str, Any]) -> str:
    """How many times better ours is than the best plain PyTorch, and which that is."""
    values = {name: row["value"] for name, row in providers.items()}
    best = best_plain(values, larger_is_better="/s" in ours["unit"])
    return f"{word(ours, providers[best])} ({best})" if best else ""


def comparison(providers: dict[str, dict[str, Any]], mine: str) -> str:
    """How many times better `mine` is than each other provider."""
    theirs = {name: row for name, row in providers.items() if not is_ours(name)}
    shown = [row["value"] for row in (providers.get(mine), *theirs.values()) if row]
    if mine not in providers or min(shown) <= 0 or math.isinf(min(shown)):
        return ""
    return ", ".join(f"{name} {word(providers[mine], row)}" for name, row in theirs.items())


def word(ours: dict[str, Any], theirs: dict[str, Any]) -> str:
    """How many times better ours is, or which of the two reached an accuracy at all."""
    if math.isinf(theirs["value"]):
        return "(not reached)"
    return "(reached)" if math.isinf(ours["value"]) else f"{ratio(ours, theirs):.3g}"


def ratio(ours: dict[str, Any], theirs: dict[str, Any]) -> float:
    """How many times better ours is."""
    by = ours["value"] / theirs["value"]
    return by if "/s" in ours["unit"] else 1 / by


def compilation(found: list[dict[str, Any]]) -> str:
    """A sentence on the seconds of compilation that times to accuracy include, if any do."""
    seconds = {
        row["provider"]: row["value"]
        for row in found
        if row["metric"] == "compilation" and row["value"] > 0
    }
    listed = ", ".join(f"{name} {value:.0f} s" for name, value in seconds.items())
    return f"\nTimes to accuracy include compilation: {listed}.\n" if listed else ""


def updated(readme: str) -> str:
    """README.md with the tables of the committed results between its performance marks."""
    found = rows()
    machines = "\n".join(
        f"- {line} (revisions: in the files)"
        for line in sorted({row["machine"].partition(", git ")[0] for row in found})
    )
    text = (
        "Measured side by side in one run, at equal numerics (checked before timing), medians of "
        f"interleaved rounds; below 1 ours is slower:\n\n{machines}\n\n{tables(found)}\n"
        f"{compilation(found)}"
    )
    after, count = SECTION.subn(lambda m: m[1] + text + m[2], readme)
    if count != 1:
        raise SystemExit(
            "README.md: expected one section <!-- performance --> ... <!-- /performance -->, "
            f"found {count}"
        )
    return after


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--check", action="store_true", help="change nothing; exit 1 if README.md is out of date"
    )
    options = parser.parse_args(argv)
    readme = ROOT / "README.md"
    before = readme.read_text(encoding="utf-8")
    after = updated(before)
    if before == after:
        return 0
    if options.check:
        print("README.md is out of date: run `python bench/readme.py`", file=sys.stderr)
        return 1
    readme.write_text(after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
