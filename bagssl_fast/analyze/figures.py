"""One style for all figures: colors by what a line shows, a light grid, PNG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bagssl_fast.analyze.study import Figure

# The same thing has the same color in every figure.
PATCHES, WHOLE, RANDOM, OTHER = "#c0392b", "#1f5fa8", "#8a8a8a", "#2e8b57"
CYCLE = (PATCHES, WHOLE, OTHER, "#b8860b", "#7d3c98", "#17a2b8", "#555555", "#d35400")
STYLE = {
    "font.size": 9.0,
    "axes.titlesize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.markersize": 4,
    "figure.constrained_layout.use": True,
}
DPI = 150


def panels(rows: int = 1, columns: int = 1, width: float = 3.6, height: float = 2.9) -> Any:
    """A figure of `rows` x `columns` axes: (figure, axes as a flat list)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update(STYLE)  # not a context: legends and texts are added later
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(width * columns, height * rows), squeeze=False
    )
    return figure, list(axes.flat)


def save(figure: Any, out: Path, name: str, title: str, caption: str) -> Figure:
    """Writes `name`.png into the output directory and closes the figure."""
    from matplotlib import pyplot

    figure.savefig(out / f"{name}.png", dpi=DPI, metadata={"Software": None})
    pyplot.close(figure)
    return Figure(title, f"{name}.png", caption)


def legend(figure: Any, axis: Any, columns: int = 3) -> None:
    """One legend for all axes, below them, of what one of them shows."""
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=columns)


def patch_axis(axis: Any, counts: Sequence[int], label: str = "patches per bag") -> None:
    """A logarithmic axis with a tick for each number of patches."""
    axis.set_xscale("log", base=2)
    axis.set_xticks(list(counts), [str(n) for n in counts])
    axis.minorticks_off()
    axis.set_xlabel(label)


def line(
    axis: Any,
    x: Sequence[float],
    y: Sequence[float],
    spread: Sequence[float],
    color: Any,
    label: str,
    **style: Any,
) -> None:
    """A line with a marker per value and bars where a spread is known."""
    bars = list(spread) if any(spread) else None
    style = {"marker": "o", "capsize": 2, "elinewidth": 0.8} | style
    axis.errorbar(list(x), list(y), yerr=bars, color=color, label=label, **style)


def level(axis: Any, y: float, spread: float, label: str, color: Any = WHOLE) -> None:
    """A dashed horizontal line, with a band where a spread is known."""
    axis.axhline(y, color=color, ls="--", lw=1.2, label=label)
    if spread:
        axis.axhspan(y - spread, y + spread, color=color, alpha=0.12, lw=0)


def shades(number: int) -> list[Any]:
    """So many colors from light to dark, of one family."""
    from matplotlib import colormaps

    return [colormaps["OrRd"](0.35 + 0.6 * i / max(number - 1, 1)) for i in range(number)]


def change(
    axis: Any,
    row: float,
    before: tuple[float, float],
    after: tuple[float, float],
    labels: tuple[str, str] | None = None,
) -> None:
    """A horizontal line from one value (mean, spread) to another, in the colors of claim 2."""
    axis.plot([before[0], after[0]], [row, row], color="#bbbbbb", lw=1.5, zorder=1)
    names = labels or (None, None)
    for (mean, spread), color, label in zip((before, after), (WHOLE, PATCHES), names, strict=True):
        axis.errorbar(
            [mean], [row], xerr=[spread] if spread else None, fmt="o", ms=6, capsize=2,
            color=color, label=label, zorder=2,
        )  # fmt: skip
