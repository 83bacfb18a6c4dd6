"""The evaluation's table for a terminal and its curve as a picture."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

Rows = list[dict[str, Any]]
LAYERS = {"h": "embedding h", "z": "projection z"}


def table(result: dict[str, Any]) -> str:
    """The results as text: a line per bag and grid, a column group per network and layer."""
    rows: Rows = result["results"]
    columns = [
        (network, layer)
        for network in ("trained", "random")
        for layer in ("h", "z")
        if any(r["network"] == network and r["layer"] == layer for r in rows)
    ]
    head, names = " " * 8, f"{'patches':>8}"
    values = [_values(rows, layer) for _, layer in columns]
    for (network, layer), group in zip(columns, values, strict=True):
        words = " ".join(f"{_name(value):>10}" for value in group)
        head += f" | {f'{network}, {LAYERS[layer]}':^{len(words)}}"
        names += f" | {words}"
    lines = [head, names, "-" * len(names)]
    for patches, grid in dict.fromkeys((r["patches"], r["grid"]) for r in rows):
        line = f"{patches:>8}" if grid == 1 else f"{f'{patches} {grid}x{grid}':>8}"
        for (network, layer), group in zip(columns, values, strict=True):
            row = _find(rows, network, layer, patches, grid)
            line += " | " + " ".join(_cell(row, value) for value in group)
        lines.append(line)
    return "\n".join(["", *lines, "", *(f"({note})" for note in result["notes"]), ""])


def _name(value: str) -> str:
    return "kNN" if value == "knn" else value.removeprefix("knn_")


def _values(rows: Rows, layer: str) -> list[str]:
    """What is shown of a layer."""
    row = next(r for r in rows if r["layer"] == layer)
    if "linear" not in row:
        return ["std", "rank"]
    return ["knn", *(key for key in row if key.startswith("knn_")), "linear"]


def _find(
    rows: Rows, network: str, layer: str, patches: Any, grid: int = 1
) -> dict[str, Any] | None:
    key = network, layer, patches, grid
    for row in rows:
        if (row["network"], row["layer"], row["patches"], row["grid"]) == key:
            return row
    return None


def _cell(row: dict[str, Any] | None, value: str) -> str:
    width = max(10, len(_name(value)))
    if row is None:
        return f"{'-':>{width}}"
    return f"{row[value]:>{width}{'.2f' if value in ('std', 'rank') else '.1%'}}"


def draw(result: dict[str, Any]) -> tuple[bytes, str]:
    """Draws accuracy against the number of patches: a PNG, or nothing and why there is none."""
    rows = [r for r in result["results"] if r["layer"] == "h" and "linear" in r]
    if not rows:
        return b"", "none: there are no labels"
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        return b"", "none: matplotlib is not installed (pip install matplotlib)"
    figure, axes = pyplot.subplots(figsize=(6.4, 5.0), layout="constrained")
    style = {"trained": ("tab:blue", 1.0), "random": ("tab:gray", 0.9)}
    lines = {"linear": "-", "knn": "--"} | {k: ":" for k in _values(rows, "h") if "knn_" in k}
    names = {"linear": "linear probe", "knn": "kNN"}  # others: the kNN in a space
    for network, (color, alpha) in style.items():
        for probe, line in lines.items():
            points = [
                (r["patches"], r["grid"], 100 * r[probe])
                for r in rows
                if r["network"] == network and r["patches"] != "center"
            ]
            if not points:
                continue
            label = f"{network}, {names.get(probe) or f'kNN, {_name(probe)}'}"
            x, y = zip(*sorted((n, v) for n, grid, v in points if grid == 1), strict=True)
            axes.plot(x, y, line, marker="o", color=color, alpha=alpha, label=label)
            for n, _, v in (point for point in points if point[1] > 1):
                axes.plot([n], [v], ls=line, marker="s", mfc="none", color=color, alpha=alpha)
            center = _find(rows, network, "h", "center")
            if center is not None and probe == "linear":
                level = 100 * center[probe]
                label = f"{network}, central crop, linear"
                axes.axhline(level, color=color, alpha=alpha, ls=":", lw=1, label=label)
    for grid in {r["grid"] for r in rows} - {1}:
        axes.plot([], [], "ks", mfc="none", label=f"{grid}x{grid} regions, each reading")
    counts = sorted({r["patches"] for r in rows if r["patches"] != "center"})
    if counts:
        axes.set_xscale("log", base=2)
        axes.set_xticks(counts, [str(n) for n in counts])
        axes.minorticks_off()
    axes.set_xlabel("patches per bag")
    axes.set_ylabel("test accuracy, %")
    axes.set_title(f"{Path(result['run']).name}: the bag against one patch", fontsize=10)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, fontsize=8)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=140)
    pyplot.close(figure)
    return picture.getvalue(), ""
