"""Claim 2: models trained on multi-scale crops gain when patch embeddings are averaged.

Several losses train the same encoder on multi-scale crops; each is read once from the central crop
and once from the mean over a grid of patches. The same is done for a random network, which
shows what averaging alone contributes.
"""

from __future__ import annotations

from bagssl_fast.analyze import figures
from bagssl_fast.analyze.bags import (
    PROBE_NAMES,
    PROBES,
    Scores,
    bag_scores,
    bank_images,
    largest_bag,
    over_seeds,
    test_images,
)
from bagssl_fast.analyze.models import Context
from bagssl_fast.analyze.patches import MAIN_SIDE, MULTI_SCALE, multi_scale_scores, plain
from bagssl_fast.analyze.study import Figure, Result, Study, Table, Verdict, plural
from bagssl_fast.analyze.verdict import Difference, difference, mean_spread, percent
from bagssl_fast.evaluation.features import CENTER
from bagssl_fast.losses import LOSSES

# Loss -> the method's name in its paper; in the order of the table.
METHODS = {
    "info_nce": "SimCLR (InfoNCE)",
    "barlow_twins": "Barlow Twins",
    "vicreg": "VICReg",
    "byol": "BYOL",
    "emp_ssl": "TCR (EMP-SSL)",
    "spectral": "spectral",
    "sigreg": "SIGReg (LeJEPA)",
}
QUICK_METHODS = ("info_nce", "vicreg")
TITLE = "Averaging patch embeddings improves baselines trained on multi-scale crops"
Gains = dict[str, dict[str, Difference]]  # method -> probe -> bag minus central crop


def run(context: Context) -> Result:
    """Trains and measures; see the module's docstring."""
    methods = QUICK_METHODS if context.quick else [name for name in METHODS if name in LOSSES]
    scores: dict[str, list[Scores]] = {}
    for method in methods:
        scores[METHODS[method]] = [
            multi_scale_scores(context, seed, method, f"{METHODS[method]}, seed {seed}")
            for seed in context.seeds
        ]
    best = largest_bag(next(iter(scores.values()))[0])
    random = [random_scores(context, seed) for seed in context.seeds]
    images = test_images(context)
    gains = {name: bag_gains(one, best, images) for name, one in scores.items()}
    of_random = bag_gains(random, best, images)
    everything = scores | {"random network": random}
    return Result(
        claim=2,
        title=TITLE,
        verdict=verdict(gains),
        text=text(context, gains, of_random, best),
        tables=[table(everything, gains | {"random network": of_random}, best)],
        figures=[draw(context, everything, best)],
        numbers={
            "scores": {name: list(map(plain, one)) for name, one in everything.items()},
            "gains": {
                name: {probe: vars(gain) for probe, gain in one.items()}
                for name, one in (gains | {"random network": of_random}).items()
            },
        },
    )


def random_scores(context: Context, seed: int) -> Scores:
    """The untrained network, read in the same two ways."""
    counts = (CENTER, 16) if context.quick else (CENTER, 64)
    config = context.config(side=MULTI_SCALE, seed=seed)
    return bag_scores(context, config, MAIN_SIDE, counts, random=True)


def bag_gains(scores: list[Scores], best: int, images: int) -> dict[str, Difference]:
    """Bag minus central crop, embedding, per probe."""
    return {
        probe: difference(
            over_seeds(scores, "h", best, probe), over_seeds(scores, "h", CENTER, probe), images
        )
        for probe in PROBES
    }


def verdict(gains: Gains) -> Verdict:
    """Holds if most gain by the linear probe and none loses; does not hold in reverse."""
    words = [gain["linear"].verdict for gain in gains.values()]
    won, lost = words.count("holds"), words.count("does not hold")
    if lost == 0 and 2 * won > len(words):
        return "holds"
    return "does not hold" if won == 0 and 2 * lost > len(words) else "undecided"


def text(context: Context, gains: Gains, of_random: dict[str, Difference], best: int) -> str:
    """The paragraphs, from the numbers."""
    words = {name: gain["linear"].verdict for name, gain in gains.items()}
    won = [name for name, word in words.items() if word == "holds"]
    lost = [name for name, word in words.items() if word == "does not hold"]
    listed = "; ".join(
        f"{name} {gain['linear'].points()} linear, {gain['knn'].points()} kNN"
        for name, gain in gains.items()
    )
    control = of_random["linear"]
    by_knn = [gain["knn"].verdict for gain in gains.values()]
    smaller = [name for name, gain in gains.items() if gain["linear"].mean < control.mean]
    return (
        f"Each method trains the same encoder on two multi-scale crops per image with the same "
        f"optimizer and number of steps; coefficients are the losses' defaults, not tuned. The "
        f"embedding is then read from the central crop (the whole image at the network's size), "
        f"and as the mean over {best} patches of {100 * MAIN_SIDE:g}% of the side; "
        f"{bank_images(context)} labeled images, {test_images(context)} test images, "
        f"{plural(len(context.seeds), 'seed')}.\n\n"
        f"{len(won)} of {len(gains)} methods gain beyond two standard errors with the linear "
        f"probe, {len(lost)} lose; with kNN {by_knn.count('holds')} gain and "
        f"{by_knn.count('does not hold')} lose. The verdict is that of the linear probe. Points "
        f"gained by averaging: {listed}.\n\n"
        f"The control: the untrained network gains {control.points()} points (linear) in the same "
        f"way, so much of the gain comes from averaging itself, which encodes every patch at full "
        f"detail. {len(smaller)} of {len(gains)} trained methods gain less than it does: their "
        f"central crop already contains part of what the patches add.\n\n"
        f"What this does not show: a ranking of the methods. They are trained briefly with one set "
        f"of hyperparameters and might rank differently with their own."
    )


def table(scores: dict[str, list[Scores]], gains: Gains, best: int) -> Table:
    """A row per method."""
    columns = ["method"]
    for probe in PROBES:
        name = PROBE_NAMES[probe]
        columns += [f"{name}: central", f"{best} patches", "gain"]
    columns += ["projection, linear: central", f"{best} patches"]
    rows: list[list[str | int | float]] = []
    for name, one in scores.items():
        row: list[str | int | float] = [name]
        for probe in PROBES:
            row += [percent(over_seeds(one, "h", n, probe)) for n in (CENTER, best)]
            row.append(gains[name][probe].points())
        row += [
            percent(over_seeds(one, "z", n, "linear")) if ("z", n) in one[0] else "-"
            for n in (CENTER, best)
        ]
        rows.append(row)
    return Table(
        "Claim 2: accuracy in %, ± over seeds; gain in points ± its standard error", columns, rows
    )


def draw(context: Context, scores: dict[str, list[Scores]], best: int) -> Figure:
    """Central crop and bag of each method, joined by a line."""
    figure, axes = figures.panels(1, 2, 4.2, 0.9 + 0.36 * len(scores))
    names = list(scores)
    for axis, probe in zip(axes, PROBES, strict=True):
        for row, name in enumerate(names):
            center = mean_spread(over_seeds(scores[name], "h", CENTER, probe))
            bag = mean_spread(over_seeds(scores[name], "h", best, probe))
            figures.change(
                axis,
                row,
                (100 * center[0], 100 * center[1]),
                (100 * bag[0], 100 * bag[1]),
                ("central crop", f"mean of {best} patches") if row == 0 else None,
            )
        axis.set_yticks(range(len(names)), names if axis is axes[0] else [""] * len(names))
        axis.set_ylim(len(names) - 0.5, -0.5)
        axis.set_xlabel("test accuracy, %")
        axis.set_title(PROBE_NAMES[probe])
    figures.legend(figure, axes[0], 4)
    return figures.save(
        figure,
        context.out,
        "claim2_aggregation",
        "What averaging patches adds to models trained on multi-scale crops",
        "Accuracy from the central crop and from the mean over a grid of patches, one line per "
        "method; bars: standard deviation over seeds. The untrained network is the control.",
    )


STUDY = Study("aggregation", 2, TITLE, run)
