"""From numbers and their spread to a verdict, the same for every claim."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from bagssl_fast.analyze.study import Verdict

# How many standard errors a mean must be away from zero to count as a difference.
SIGMAS = 2.0


@dataclass(frozen=True)
class Difference:
    """A difference between two measurements, over seeds.

    Args:
        mean: Over the seeds.
        error: Its standard error: the seeds' spread and the finite test set together.
        seeds: How many.
    """

    mean: float
    error: float
    seeds: int

    @property
    def verdict(self) -> Verdict:
        """Whether it is positive by more than `SIGMAS` standard errors."""
        if self.mean > SIGMAS * self.error:
            return "holds"
        return "does not hold" if self.mean < -SIGMAS * self.error else "undecided"

    def points(self) -> str:
        """As percentage points, such as "+3.1 ± 0.8"."""
        return f"{100 * self.mean:+.1f} ± {100 * self.error:.1f}"


def difference(first: Sequence[float], second: Sequence[float], images: int) -> Difference:
    """Of two accuracies, seed by seed: first - second.

    The error adds the spread over the seeds (zero for one seed) to that of a finite test set, as if
    both had been tested on different images: on the same images it is smaller, so this is
    conservative.

    Args:
        first: Accuracies in 0..1, one per seed.
        second: The same for the other measurement.
        images: Test images.

    Raises:
        ValueError: If the lists do not match.
    """
    if len(first) != len(second) or not first or images < 1:
        raise ValueError(
            f"difference of {len(first)} and {len(second)} seeds on {images} images: as many "
            "seeds on both sides, and at least one seed and image are expected"
        )
    gains = [a - b for a, b in zip(first, second, strict=True)]
    seeds = statistics.variance(gains) / len(gains) if len(gains) > 1 else 0.0
    p, q = statistics.fmean(first), statistics.fmean(second)
    test = (p * (1 - p) + q * (1 - q)) / images
    return Difference(statistics.fmean(gains), math.sqrt(seeds + test), len(gains))


def paired(values: Tensor) -> Difference:
    """Of a quantity per image, such as a difference of two cosines.

    Args:
        values: [seeds, images].

    Raises:
        ValueError: If it is empty.
    """
    if values.dim() != 2 or values.numel() == 0:
        raise ValueError(
            f"paired: values {list(values.shape)}, expected [seeds, images], not empty"
        )
    seeds, images = values.shape
    values = values.double()
    error = float(values.mean(dim=0).var()) / images if images > 1 else 0.0
    if seeds > 1:
        error += float(values.mean(dim=1).var()) / seeds
    return Difference(float(values.mean()), math.sqrt(error), seeds)


def all_of(verdicts: Sequence[Verdict]) -> Verdict:
    """Holds if all do; does not hold if one does not; undecided otherwise."""
    if "does not hold" in verdicts:
        return "does not hold"
    return "holds" if verdicts and set(verdicts) == {"holds"} else "undecided"


def mean_spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation over seeds (0 for one)."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def percent(values: Sequence[float]) -> str:
    """Accuracies over seeds as "61.2 ± 0.4", or "61.2" of one seed."""
    mean, spread = mean_spread(values)
    return f"{100 * mean:.1f}" + (f" ± {100 * spread:.1f}" if len(values) > 1 else "")
