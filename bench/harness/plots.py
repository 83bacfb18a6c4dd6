"""The plots of the benches (needs matplotlib)."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from harness.clock import PHASES

COLORS = ("#d1495b", "#2e86ab", "#edae49", "#7a9e7e", "#8d8d8d")


def draw_steps(split: dict[str, dict[str, dict[str, float]]], machine: str, path: Path) -> None:
    """A bar per system, as long as its step, in the colors of its phases; a panel per case."""
    rows = [len(systems) for systems in split.values()]
    figure, panels = plt.subplots(
        len(split),
        1,
        figsize=(9, 1.2 + 0.4 * sum(rows) + 0.6 * len(rows)),
        height_ratios=rows,
        squeeze=False,
        layout="constrained",
    )
    for panel, (case, systems) in zip(panels[:, 0], split.items(), strict=True):
        names = list(systems)[::-1]
        left = [0.0] * len(names)
        for phase, color in zip(PHASES, COLORS, strict=True):
            widths = [systems[name][phase] * 1e3 for name in names]
            panel.barh(names, widths, left=left, color=color, label=phase)
            left = [a + b for a, b in zip(left, widths, strict=True)]
        panel.set_title(case, loc="left", fontsize=10)
        panel.set_xlabel("ms per step" if panel is panels[-1, 0] else "")
    panels[0, 0].legend(
        ncols=len(PHASES), fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.1)
    )
    _finish(figure, machine, path)


Curve = list[tuple[float, float]]  # (x, y), ...
Curves = dict[str, Curve]  # by label


def draw_curves(panels: dict[tuple[str, str], Curves], machine: str, path: Path) -> None:
    """Log-log curves, two panels in a row; panels are named by (title, label of y)."""
    rows = -(-len(panels) // 2)
    figure, axes = plt.subplots(
        rows, 2, figsize=(10, 3.2 * rows), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, ((title, label), curves) in zip(axes.flat, panels.items(), strict=False):
        for name, points in curves.items():
            axis.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_title(title, fontsize=10)
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    _finish(figure, machine, path)


def draw_runs(panels: dict[str, dict[str, list[Curve]]], machine: str, path: Path) -> None:
    """Accuracy against seconds: a panel per probe, a color per system, a line per run."""
    figure, axes = plt.subplots(1, len(panels), figsize=(9, 3.4), layout="constrained")
    for axis, (title, systems) in zip(axes, panels.items(), strict=True):
        for (name, runs), color in zip(systems.items(), COLORS, strict=False):
            for i, points in enumerate(runs):
                label = name if i == 0 else None
                axis.plot(
                    *zip(*points, strict=True), marker="o", markersize=3, color=color, label=label
                )
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("seconds of training")
        axis.set_ylabel("accuracy, %")
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    _finish(figure, machine, path)


def _finish(figure: plt.Figure, machine: str, path: Path) -> None:
    figure.supxlabel(machine, fontsize=6, color="#666666")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
