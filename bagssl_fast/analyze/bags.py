"""Accuracy of bags: kNN and a linear probe on the mean of N patches."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from bagssl_fast.analyze.models import Context
from bagssl_fast.config import Config, patch_size
from bagssl_fast.evaluation.datasets import count
from bagssl_fast.evaluation.features import CENTER, extract, make_plan
from bagssl_fast.evaluation.probes import knn_accuracy, linear_probe
from bagssl_fast.files import write_atomic
from bagssl_fast.models.bag_model import BagModel

PROBES = ("linear", "knn")
PROBE_NAMES = {"linear": "linear probe", "knn": "kNN"}
# (layer, patches) -> probe -> accuracy; layer h is the embedding, z the projection.
Scores = dict[tuple[str, int], dict[str, float]]


def bag_scores(
    context: Context,
    config: Config,
    side: float,
    counts: Sequence[int],
    *,
    projections_up_to: int = -1,
    random: bool = False,
    label: str = "",
) -> Scores:
    """Accuracies of a model for bags of several sizes, measured once and then stored next to it.

    Args:
        context: Data and models.
        config: The model's configuration, from `Context.config`.
        side: Side of the patches that are read, as a fraction of the image's; may differ from that
            of training.
        counts: Patches per bag; `CENTER` (0) for the whole image at the network's size. Bags that
            do not fit the image are left out.
        projections_up_to: Largest bag whose projection is measured too; -1 for none.
        random: The network at its random initialization instead.
        label: The model's name on the terminal.

    Raises:
        ValueError: If the images have no labels.
    """
    images = context.images
    if not images.labeled:
        raise ValueError(
            f"{context.base.data} has no labels, which claims 1, 2 and 6 need: put the images of "
            "each class into a folder of their own, or choose others: --claims 3,4,5"
        )
    needed: dict[str, Any] = {
        "side": side,
        "counts": list(counts),
        "z": projections_up_to,
        "eval": asdict(config.eval),
        "test": str(images.test.fingerprint),
    }
    text = json.dumps(needed, sort_keys=True)
    key = hashlib.sha256(text.encode()).hexdigest()[:12]
    name = f"{'random' if random else 'bags'}-{key}.json"
    path = context.run_dir(config) / name
    if not random:  # also where the scores are stored already: they cost this training too
        context.train(config, label)
    if path.is_file():
        kept = json.loads(path.read_text(encoding="utf-8"))
        context.used(path, kept["seconds"])
        return {(layer, patches): values for layer, patches, values in kept["scores"]}
    started = time.monotonic()
    model = context.random_model(config) if random else context.model(config, label)
    scores = _read(
        context, model, with_patch_scale(config, side, counts), counts, projections_up_to
    )
    content = [[layer, patches, values] for (layer, patches), values in scores.items()]
    kept = {"seconds": context.made(path, started), "scores": content}
    write_atomic(path, (json.dumps(kept) + "\n").encode())
    return scores


def _read(
    context: Context, model: BagModel, config: Config, counts: Sequence[int], projections_up_to: int
) -> Scores:
    """The accuracies of both probes for every bag."""
    images = context.images
    plan = make_plan(config, model, context.device)
    plan = replace(
        plan,
        counts=plan.counts if CENTER in counts else plan.counts[1:],
        projection_up_to=projections_up_to,
        grid=1,
    )
    train, train_labels = extract(model, config, images.train, plan, images.train_indices)
    test, test_labels = extract(model, config, images.test, plan, images.test_indices)
    assert train_labels is not None and test_labels is not None  # unlabeled data was refused
    scores: Scores = {}
    for entry, x in train.items():
        data = x, train_labels, test[entry], test_labels
        scores[entry] = {
            "linear": linear_probe(*data, method=config.eval.probe).accuracy,
            "knn": knn_accuracy(*data, k=config.eval.knn_k, temperature=config.eval.knn_t),
        }
    return scores


def with_patch_scale(config: Config, side: float, counts: Sequence[int] = (1,)) -> Config:
    """The configuration with which `features.extract` reads patches of another scale.

    Args:
        config: The model's.
        side: Side of a patch as a fraction of the image's.
        counts: Patches per bag.
    """
    size = patch_size(config)
    view = max(size, round(size / side))
    grids = tuple(n for n in counts if n != CENTER)
    augment = replace(config.augment, scale=(side**2, side**2), ratio=(1.0, 1.0))
    return replace(
        config, augment=augment, eval=replace(config.eval, view=view, patches=grids or (1,))
    )


def over_seeds(scores: Sequence[Scores], layer: str, patches: int, probe: str) -> list[float]:
    """One accuracy per seed."""
    return [one[layer, patches][probe] for one in scores]


def largest_bag(scores: Mapping[tuple[str, int], Any]) -> int:
    """The most patches that were measured."""
    return max(patches for _, patches in scores)


def test_images(context: Context) -> int:
    """How many images the accuracies are over."""
    return count(context.images.test, context.images.test_indices)


def bank_images(context: Context) -> int:
    """How many labeled training images the probes see."""
    return count(context.images.train, context.images.train_indices)
