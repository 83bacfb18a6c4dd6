"""One look for all figures: colours by what a line is, light grid, PNG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bagssl_fast.analyze.study import Figure

# What a line stands for has one colour in every figure.
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
    """A figure of `rows` x `columns` axes: (figure, axes as a flat list).

    Raises:
        ValueError: If matplotlib is not installed.
    """
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError as error:
        raise ValueError("the figures need matplotlib: pip install 'bagssl_fast[demo]'") from error
    with pyplot.rc_context(STYLE):
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


def patch_axis(axis: Any, counts: Sequence[int], label: str = "patches per bag") -> None:
    """A logarithmic axis with a tick for each number of patches."""
    axis.set_xscale("log", base=2)
    axis.set_xticks(list(counts), [str(n) for n in counts])
    axis.minorticks_off()
    axis.set_xlabel(label)
