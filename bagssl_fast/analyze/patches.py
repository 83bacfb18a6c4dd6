"""Claim 1: fixed-scale patches and their mean do what multi-scale crops do, or better.

The same network is trained on patches of one size, for several sizes, and on multi-scale crops
(8 to 100% of the area), with the same loss, augmentation, steps and crops per step. The former is
read from the mean over a grid of patches of its size, the latter from one pass over the whole image
at the network's size, the usual "central crop" evaluation.
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
from bagssl_fast.analyze.study import Figure, Result, Study, Table, plural
from bagssl_fast.analyze.verdict import Difference, difference, mean_spread, percent
from bagssl_fast.evaluation.features import CENTER

# Sides of a patch as fractions of the image's: 8, 12, 16 and 24 pixels of CIFAR's 32.
SIDES = (0.25, 0.375, 0.5, 0.75)
QUICK_SIDES = (0.25, 0.5)
COUNTS = (1, 4, 16, 64, 256)
QUICK_COUNTS = (1, 4, 16)
MAIN_SIDE = 0.5  # the one that is judged; chosen before any result was known
MULTI_SCALE = 0.0  # the value of `side` for multi-scale crops, see Context.config
TITLE = "Patches are enough: fixed-scale patches and their mean match multi-scale crops"


def run(context: Context) -> Result:
    """Trains and measures; see the module's docstring."""
    sides = QUICK_SIDES if context.quick else SIDES
    counts = QUICK_COUNTS if context.quick else COUNTS
    fixed: dict[float, list[Scores]] = {side: [] for side in sides}
    multi: list[Scores] = []
    random: list[Scores] = []
    for seed in context.seeds:
        config = context.config(side=MULTI_SCALE, seed=seed)
        label = f"multi-scale crops, seed {seed}"
        multi.append(multi_scale_scores(context, seed, label=label))
        for side in sides:
            config = context.config(side=side, seed=seed)
            label = f"patches of {side:.0%} of the side, seed {seed}"
            scores = bag_scores(
                context, config, side, counts, projections_up_to=max(counts), label=label
            )
            fixed[side].append(scores)
        config = context.config(side=MAIN_SIDE, seed=seed)
        random.append(bag_scores(context, config, MAIN_SIDE, (CENTER, *counts[:-1]), random=True))

    images = test_images(context)
    best = largest_bag(fixed[MAIN_SIDE][0])
    gains = {
        probe: difference(
            over_seeds(fixed[MAIN_SIDE], "h", best, probe),
            over_seeds(multi, "h", CENTER, probe),
            images,
        )
        for probe in PROBES
    }
    return Result(
        claim=1,
        title=TITLE,
        verdict=gains["linear"].verdict,
        text=text(context, gains, fixed, multi, random, best),
        tables=[table(probe, fixed, multi, random, counts) for probe in PROBES],
        figures=[draw_counts(context, fixed, multi, random), draw_layers(context, fixed, multi)],
        numbers={
            "gain": {probe: vars(gain) for probe, gain in gains.items()},
            "fixed": {str(side): list(map(plain, scores)) for side, scores in fixed.items()},
            "multi_scale": list(map(plain, multi)),
            "random": list(map(plain, random)),
        },
    )


def multi_scale_scores(
    context: Context, seed: int, loss: str | None = None, label: str = ""
) -> Scores:
    """A model trained on multi-scale crops: the central crop and bags of the main size.

    Shared with claim 2, so that the model is measured once.
    """
    counts = (CENTER, 1, 4, 16) if context.quick else (CENTER, 1, 4, 16, 64)
    config = context.config(side=MULTI_SCALE, loss=loss, seed=seed)
    return bag_scores(
        context, config, MAIN_SIDE, counts, projections_up_to=max(counts), label=label
    )


def plain(scores: Scores) -> dict[str, dict[str, float]]:
    """Scores with text keys, for JSON: "h/64", the central crop "h/center"."""
    return {f"{layer}/{n or 'center'}": values for (layer, n), values in scores.items()}


def side_name(side: float) -> str:
    """Such as "patches, 50% of the side"."""
    return f"patches, {100 * side:g}% of the side"


def text(
    context: Context,
    gains: dict[str, Difference],
    fixed: dict[float, list[Scores]],
    multi: list[Scores],
    random: list[Scores],
    best: int,
) -> str:
    """The paragraphs, from the numbers."""
    linear, knn = gains["linear"], gains["knn"]
    word = {
        "holds": "better than the central crop",
        "does not hold": "worse than the central crop",
        "undecided": "no different from the central crop beyond two standard errors",
    }
    one = over_seeds(fixed[MAIN_SIDE], "h", 1, "linear")
    many = over_seeds(fixed[MAIN_SIDE], "h", best, "linear")
    center = over_seeds(multi, "h", CENTER, "linear")
    floor = over_seeds(random, "h", largest_bag(random[0]), "linear")
    by_side = {
        side: mean_spread(over_seeds(scores, "h", largest_bag(scores[0]), "linear"))[0]
        for side, scores in fixed.items()
    }
    ranking = ", ".join(
        f"{100 * side:g}%: {100 * accuracy:.1f}" for side, accuracy in by_side.items()
    )
    multi_bag = over_seeds(multi, "h", largest_bag(multi[0]), "linear")
    return (
        f"One network, one loss ({context.base.loss.name}), the same number of steps and of crops "
        f"per step; only the crop differs: a fixed size, or 8 to 100% of the area. A linear probe "
        f"and kNN learn from {bank_images(context)} labeled images and are tested on "
        f"{test_images(context)}; {plural(len(context.seeds), 'seed')}.\n\n"
        f"With training on patches of {100 * MAIN_SIDE:g}% of the side, the mean of {best} patches "
        f"gives {percent(many)}% with the linear probe, one patch {percent(one)}%; multi-scale "
        f"training, read from the central crop, gives {percent(center)}%. The mean of patches is "
        f"{word[linear.verdict]} by the linear probe, {linear.points()} points, and "
        f"{word[knn.verdict]} by kNN, {knn.points()}. Without training, the same network reaches "
        f"{percent(floor)}% from a bag.\n\nBy patch size (linear, largest bag): {ranking}.\n\n"
        f"What this does not show: whether longer training, where multi-scale crops may catch up, "
        f"or larger images would change the order. The comparison also mixes training and readout: "
        f"the multi-scale network read from patches reaches {percent(multi_bag)}% (claim 2 "
        f"separates the two)."
    )


def table(
    probe: str,
    fixed: dict[float, list[Scores]],
    multi: list[Scores],
    random: list[Scores],
    counts: tuple[int, ...],
) -> Table:
    """Accuracies of one probe: a row per training and layer, a column per bag."""
    columns = ["trained on", "layer", *(f"{n} patches" for n in counts), "central crop"]
    rows: list[list[str | int | float]] = []
    trained = [(side_name(side), scores) for side, scores in fixed.items()]
    trained += [("multi-scale crops", multi), ("nothing (random weights)", random)]
    for name, scores in trained:
        for layer in ("h", "z"):
            if not any(key[0] == layer for key in scores[0]):
                continue
            cells = [
                percent(over_seeds(scores, layer, n, probe)) if (layer, n) in scores[0] else "-"
                for n in (*counts, CENTER)
            ]
            rows.append([name, "embedding" if layer == "h" else "projection", *cells])
    return Table(f"Claim 1: accuracy in %, {PROBE_NAMES[probe]}", columns, rows)


def curve(
    scores: list[Scores], layer: str, probe: str
) -> tuple[list[int], list[float], list[float]]:
    """Numbers of patches, mean accuracies in % and their spread over seeds."""
    counts = sorted(n for one, n in scores[0] if one == layer and n != CENTER)
    values = [mean_spread(over_seeds(scores, layer, n, probe)) for n in counts]
    return counts, [100 * mean for mean, _ in values], [100 * spread for _, spread in values]


def draw_counts(
    context: Context,
    fixed: dict[float, list[Scores]],
    multi: list[Scores],
    random: list[Scores],
) -> Figure:
    """Accuracy against patches per bag, a line per patch size."""
    figure, axes = figures.panels(1, 2, 4.2, 3.4)
    shades = figures.shades(len(fixed))
    for axis, probe in zip(axes, PROBES, strict=True):
        for (side, scores), color in zip(fixed.items(), shades, strict=True):
            figures.line(axis, *curve(scores, "h", probe), color, side_name(side))
        figures.line(axis, *curve(random, "h", probe), figures.RANDOM, "random network")
        center, spread = mean_spread(over_seeds(multi, "h", CENTER, probe))
        figures.level(axis, 100 * center, 100 * spread, "multi-scale, central crop")
        figures.patch_axis(axis, curve(next(iter(fixed.values())), "h", probe)[0])
        axis.set_ylabel("test accuracy, %")
        axis.set_title(PROBE_NAMES[probe])
    figures.legend(figure, axes[0])
    return figures.save(
        figure,
        context.out,
        "claim1_patches",
        "Fixed-scale patches, averaged, against the central crop of multi-scale training",
        "Accuracy from the mean embedding against the number of patches, for networks trained on "
        "patches of one size. Dashed: the same network trained on multi-scale crops, read from the "
        "whole image. Bars and band: standard deviation over seeds.",
    )


def draw_layers(context: Context, fixed: dict[float, list[Scores]], multi: list[Scores]) -> Figure:
    """Embedding against projection, for the main size."""
    figure, axes = figures.panels(1, 2, 4.2, 3.4)
    layers = (("h", "embedding", figures.PATCHES), ("z", "projection", figures.OTHER))
    for axis, probe in zip(axes, PROBES, strict=True):
        for layer, name, color in layers:
            figures.line(axis, *curve(fixed[MAIN_SIDE], layer, probe), color, name)
            center, spread = mean_spread(over_seeds(multi, layer, CENTER, probe))
            label = f"multi-scale, central crop: {name}"
            figures.level(axis, 100 * center, 100 * spread, label, color)
        figures.patch_axis(axis, curve(fixed[MAIN_SIDE], "h", probe)[0])
        axis.set_ylabel("test accuracy, %")
        axis.set_title(f"{PROBE_NAMES[probe]}, {side_name(MAIN_SIDE)}")
    figures.legend(figure, axes[0])
    return figures.save(
        figure,
        context.out,
        "claim1_layers",
        "Embedding and projection",
        "The same curves for the embedding h and the projection z of one patch size; dashed, the "
        "multi-scale network's central crop in the same layer.",
    )


STUDY = Study("patches", 1, TITLE, run)
