"""Claim 6: with more patches per image fewer epochs are enough (EMP-SSL, 2304.03977).

The network trains on a subset of the images with P patches per image and step. Equal images: one
pass for every P, so that compute grows with P. Equal compute: P times the number of passes is
constant, so that training with two patches makes many passes and with the largest P one. Each run
has a whole cosine schedule of its own; batch size and learning rate are the same. Patches keep
their resolution (16 pixels of CIFAR's 32), so the network is smaller than in claims 1 to 3.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from bagssl_fast.analyze import figures
from bagssl_fast.analyze.bags import (
    PROBE_NAMES,
    PROBES,
    Scores,
    bag_scores,
    over_seeds,
    test_images,
)
from bagssl_fast.analyze.models import Context
from bagssl_fast.analyze.patches import MAIN_SIDE, plain
from bagssl_fast.analyze.study import Figure, Result, Study, Table, Verdict, plural
from bagssl_fast.analyze.verdict import Difference, difference, mean_spread, percent
from bagssl_fast.config import Config, patch_size
from bagssl_fast.losses import LOSSES

PATCHES, QUICK_PATCHES = (2, 4, 8, 16), (2, 8)
IMAGES, QUICK_IMAGES = 10_240, 1_024
NATIVE_MIN = 8  # the smallest patch of PatchNet
# Loss -> its name; the first is EMP-SSL's own and is judged.
METHODS = {"emp_ssl": "TCR (EMP-SSL)", "sigreg": "SIGReg (LeJEPA)"}
MODES = {"images": "equal images: one pass", "compute": "equal compute"}
TITLE = "More patches, fewer epochs: one pass with many patches does what many passes with two do"
# (mode, patches) -> scores per seed
Grid = dict[tuple[str, int], list[Scores]]


def run(context: Context) -> Result:
    """Trains and measures; see the module's docstring."""
    methods = [name for name in METHODS if name in LOSSES]
    if context.quick:
        methods = methods[:1]
    grids = {METHODS[method]: measure(context, method) for method in methods}
    first = next(iter(grids.values()))
    tests = compare(context, first)
    return Result(
        claim=6,
        title=TITLE,
        verdict=verdict(tests),
        text=text(context, grids, tests),
        tables=[table(context, grids)],
        figures=[draw(context, grids)],
        numbers={
            "scores": {
                name: {f"{mode}/{p}": list(map(plain, seeds)) for (mode, p), seeds in grid.items()}
                for name, grid in grids.items()
            },
            "tests": {
                name: {probe: vars(gain) for probe, gain in one.items()}
                for name, one in tests.items()
            },
        },
    )


def numbers_of_patches(context: Context) -> tuple[int, ...]:
    """The numbers of patches that are compared."""
    return QUICK_PATCHES if context.quick else PATCHES


def bag_size(context: Context) -> int:
    """Patches that are averaged for reading."""
    return 16 if context.quick else 64


def passes(context: Context, mode: str, patches: int) -> int:
    """Passes over the images of a run."""
    return 1 if mode == "images" else max(numbers_of_patches(context)) // patches


def measure(context: Context, method: str) -> Grid:
    """All runs of a loss; the largest P is the same run in both modes."""
    grid: Grid = {}
    for mode in MODES:
        for patches in numbers_of_patches(context):
            epochs = passes(context, mode, patches)
            grid[mode, patches] = [
                scores(context, method, patches, epochs, seed) for seed in context.seeds
            ]
    return grid


def scores(context: Context, method: str, patches: int, epochs: int, seed: int) -> Scores:
    """One run: trained, and read from a bag."""
    changes: dict[str, Any] = {
        "epochs": epochs,
        "max_steps": 0,
        "max_images": QUICK_IMAGES if context.quick else IMAGES,
        "bag": replace(context.base.bag, patches=patches),
    }
    config = native_size(context.config(side=MAIN_SIDE, loss=method, seed=seed, **changes))
    label = f"{METHODS[method]}, {patches} patches x {epochs} passes, seed {seed}"
    return bag_scores(context, config, MAIN_SIDE, (bag_size(context),), label=label)


def native_size(config: Config) -> Config:
    """The network for patches that are not enlarged: no whole image is encoded here.

    Enlarged to the size of a whole image, patches would cost four times as much and show no more.
    """
    size = max(NATIVE_MIN, 4 * round(patch_size(config) * MAIN_SIDE / 4))
    encoder = replace(config.encoder, patch_size=0)
    return replace(config, augment=replace(config.augment, size=size), encoder=encoder)


def compare(context: Context, grid: Grid) -> dict[str, dict[str, Difference]]:
    """The largest P against two patches, in both modes and for both probes."""
    least, most = min(numbers_of_patches(context)), max(numbers_of_patches(context))
    return {
        mode: {
            probe: difference(
                over_seeds(grid[mode, most], "h", bag_size(context), probe),
                over_seeds(grid[mode, least], "h", bag_size(context), probe),
                test_images(context),
            )
            for probe in PROBES
        }
        for mode in MODES
    }


def verdict(tests: dict[str, dict[str, Difference]]) -> Verdict:
    """Of the linear probe: more patches must win at equal images and not lose at equal compute."""
    if tests["compute"]["linear"].verdict == "does not hold":
        return "does not hold"
    return tests["images"]["linear"].verdict


def text(
    context: Context,
    grids: dict[str, Grid],
    tests: dict[str, dict[str, Difference]],
) -> str:
    """The paragraphs, from the numbers."""
    least, most = min(numbers_of_patches(context)), max(numbers_of_patches(context))
    name, grid = next(iter(grids.items()))
    n = bag_size(context)

    def accuracy(mode: str, patches: int) -> str:
        return percent(over_seeds(grid[mode, patches], "h", n, "linear"))

    images, compute = tests["images"], tests["compute"]
    word = {
        "holds": "better",
        "does not hold": "worse",
        "undecided": "no different beyond two standard errors",
    }
    return (
        f"{QUICK_IMAGES if context.quick else IMAGES} images, batches of "
        f"{context.base.batch_size}, patches of {100 * MAIN_SIDE:g}% of the side, {name}; read "
        f"from the mean of {n} patches, {plural(len(context.seeds), 'seed')}.\n\n"
        f"After one pass {least} patches give {accuracy('images', least)}% (linear) and {most} "
        f"patches {accuracy('images', most)}%: {images['linear'].points()} points linear, "
        f"{images['knn'].points()} kNN. At equal compute {passes(context, 'compute', least)} "
        f"passes with {least} patches give {accuracy('compute', least)}%: one pass with {most} "
        f"patches is {word[compute['linear'].verdict]} by the linear probe, "
        f"{compute['linear'].points()} points, and {word[compute['knn'].verdict]} by kNN, "
        f"{compute['knn'].points()}.\n\n"
        "What this does not show: how large the gap at equal compute "
        f"is with a learning rate tuned for each number of patches. One pass with {most} patches "
        f"makes {most // least} times fewer updates than the {passes(context, 'compute', least)} "
        f"passes with {least}, at the same learning rate."
    )


def table(context: Context, grids: dict[str, Grid]) -> Table:
    """A row per run."""
    n = bag_size(context)
    columns = ["loss", "comparison", "patches", "passes", "patches seen per image"]
    columns += [f"{PROBE_NAMES[probe]}, {n} patches" for probe in PROBES]
    rows: list[list[str | int | float]] = []
    for name, grid in grids.items():
        for (mode, patches), seeds in grid.items():
            epochs = passes(context, mode, patches)
            row: list[str | int | float] = [name, MODES[mode], patches, epochs, patches * epochs]
            rows.append(row + [percent(over_seeds(seeds, "h", n, probe)) for probe in PROBES])
    return Table("Claim 6: accuracy in % against patches per image", columns, rows)


def draw(context: Context, grids: dict[str, Grid]) -> Figure:
    """Accuracy against P, a line per mode and loss."""
    figure, axes = figures.panels(1, 2, 4.2, 3.4)
    counts = numbers_of_patches(context)
    for axis, probe in zip(axes, PROBES, strict=True):
        for (name, grid), style in zip(grids.items(), ("-", "--"), strict=False):
            for mode, color in zip(MODES, (figures.WHOLE, figures.PATCHES), strict=True):
                values = [
                    mean_spread(over_seeds(grid[mode, p], "h", bag_size(context), probe))
                    for p in counts
                ]
                figures.line(
                    axis,
                    counts,
                    [100 * mean for mean, _ in values],
                    [100 * spread for _, spread in values],
                    color,
                    f"{name}, {MODES[mode]}",
                    ls=style,
                )
        figures.patch_axis(axis, counts, "patches per image and step, P")
        axis.set_ylabel("test accuracy, %")
        axis.set_title(PROBE_NAMES[probe])
    figures.legend(figure, axes[0], 2)
    return figures.save(
        figure,
        context.out,
        "claim6_epochs",
        "More patches per image against more passes over the images",
        "Accuracy from the mean embedding against the patches per image and step. Equal images: "
        "one pass for every P. Equal compute: P times the number of passes is constant, so the "
        "largest P makes one pass in both. Bars: standard deviation over seeds.",
    )


STUDY = Study("epochs", 6, TITLE, run)
