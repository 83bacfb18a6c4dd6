"""The evaluation's table for a terminal and its curve as a picture."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

Rows = list[dict[str, Any]]
LAYERS = {"h": "embedding h", "z": "projection z"}


def table(result: dict[str, Any]) -> str:
    """The results as text: a line per number of patches, a column group per network and layer."""
    rows: Rows = result["results"]
    columns = [
        (network, layer)
        for network in ("trained", "random")
        for layer in ("h", "z")
        if any(r["network"] == network and r["layer"] == layer for r in rows)
    ]
    labeled = any("linear" in r for r in rows)
    first, second = ("kNN", "linear") if labeled else ("std", "rank")
    head = " " * 8 + "".join(f" | {f'{n}, {LAYERS[y]}':^21}" for n, y in columns)
    names = f"{'patches':>8}" + "".join(f" | {first:>10} {second:>10}" for _ in columns)
    lines = [head, names, "-" * len(names)]
    for patches in dict.fromkeys(r["patches"] for r in rows):
        line = f"{patches:>8}"
        for network, layer in columns:
            row = _find(rows, network, layer, patches)
            line += f" | {_cell(row, first)} {_cell(row, second)}"
        lines.append(line)
    return "\n".join(["", *lines, "", *(f"({note})" for note in result["notes"]), ""])


def _find(rows: Rows, network: str, layer: str, patches: Any) -> dict[str, Any] | None:
    for row in rows:
        if (row["network"], row["layer"], row["patches"]) == (network, layer, patches):
            return row
    return None


def _cell(row: dict[str, Any] | None, column: str) -> str:
    if row is None:
        return f"{'-':>10}"
    if column in ("std", "rank"):
        return f"{row[column]:>10.2f}"
    return f"{row['knn' if column == 'kNN' else 'linear']:>10.1%}"


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
    figure, axes = pyplot.subplots(figsize=(6.4, 4.2), layout="constrained")
    style = {"trained": ("tab:blue", 1.0), "random": ("tab:gray", 0.9)}
    for network, (color, alpha) in style.items():
        for probe, line in (("linear", "-"), ("knn", "--")):
            curve = [
                (r["patches"], 100 * r[probe])
                for r in rows
                if r["network"] == network and r["patches"] != "center"
            ]
            if not curve:
                continue
            label = f"{network}, {'linear probe' if probe == 'linear' else 'kNN'}"
            x, y = zip(*sorted(curve), strict=True)
            axes.plot(x, y, line, marker="o", color=color, alpha=alpha, label=label)
            center = _find(rows, network, "h", "center")
            if center is not None and probe == "linear":
                level = 100 * center[probe]
                label = f"{network}, central crop, linear"
                axes.axhline(level, color=color, alpha=alpha, ls=":", lw=1, label=label)
    counts = sorted({r["patches"] for r in rows if r["patches"] != "center"})
    if counts:
        axes.set_xscale("log", base=2)
        axes.set_xticks(counts, [str(n) for n in counts])
        axes.minorticks_off()
    axes.set_xlabel("patches per bag")
    axes.set_ylabel("test accuracy, %")
    axes.set_title(f"{Path(result['run']).name}: the bag against one patch", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=140)
    pyplot.close(figure)
    return picture.getvalue(), ""
