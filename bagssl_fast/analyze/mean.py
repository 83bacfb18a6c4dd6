"""Claim 3: the embedding of the whole image is the mean of its patches' embeddings.

For each test image, the cosine between the whole image's embedding (the central crop at the
network's size) and the mean over N patches of a grid in random order, against N. All embeddings
after a ReLU share a large mean, which alone makes cosines high. Hence three controls: features
centered over the images, patches of another image, and a random network. Retrieval needs no scale:
how often the whole-image embedding nearest to a mean of patches is that of the same image.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from bagssl_fast.analyze import figures
from bagssl_fast.analyze.bags import with_patch_scale
from bagssl_fast.analyze.models import Context
from bagssl_fast.analyze.patches import MAIN_SIDE, MULTI_SCALE
from bagssl_fast.analyze.study import Figure, Result, Study, Table, plural
from bagssl_fast.analyze.verdict import Difference, all_of, paired
from bagssl_fast.config import Config
from bagssl_fast.evaluation.features import CENTER, embed_patches, make_plan
from bagssl_fast.models.bag_model import BagModel

PATCHES, QUICK_PATCHES = 256, 64
IMAGES, QUICK_IMAGES = 500, 100
# A squared cosine above one half: the mean of the patches explains most of the whole.
CLOSE = 0.5
TITLE = "The whole is the mean of its patches: embeddings of patches average to the image's"
TRAINED, FIXED, RANDOM = "multi-scale training", "fixed-scale training", "random network"
Curves = dict[str, Tensor]  # quantity -> [counts, images]


def run(context: Context) -> Result:
    """Trains or reuses models and measures; see the module's docstring."""
    found: dict[str, list[Curves]] = {TRAINED: [], FIXED: [], RANDOM: []}
    for seed in context.seeds:
        multi = context.config(side=MULTI_SCALE, seed=seed)
        fixed = context.config(side=MAIN_SIDE, seed=seed)
        models = {
            TRAINED: (context.model(multi, f"multi-scale crops, seed {seed}"), multi),
            FIXED: (context.model(fixed, f"patches of {MAIN_SIDE:.0%}, seed {seed}"), fixed),
            RANDOM: (context.random_model(multi), multi),
        }
        for name, (model, config) in models.items():
            found[name].append(curves(context, model, config, seed))
    counts = steps(QUICK_PATCHES if context.quick else PATCHES)
    parts = judge(found)
    return Result(
        claim=3,
        title=TITLE,
        verdict=all_of([part.verdict for part in parts.values()]),
        text=text(context, found, counts, parts),
        tables=[table(found, counts)],
        figures=[draw(context, found, counts)],
        numbers={
            "counts": counts,
            "means": {
                name: {key: averages(seeds, key) for key in seeds[0]}
                for name, seeds in found.items()
            },
            "tests": {name: vars(part) for name, part in parts.items()},
        },
    )


def steps(most: int) -> list[int]:
    """1, 2, 4, ... up to `most`, a power of two."""
    return [1 << i for i in range(most.bit_length())]


@torch.inference_mode()
def curves(context: Context, model: BagModel, config: Config, seed: int) -> Curves:
    """Cosines and hits per number of patches and image.

    Returns:
        `own`, `other` (plain cosines with the own image's patches and with another's), `centered`,
        `centered other`, and `found` (1 where the own image is nearest), each [counts, images].
    """
    images = QUICK_IMAGES if context.quick else IMAGES
    source, places = context.images.test, context.images.test_indices
    places = torch.arange(len(source)) if places is None else places
    generator = torch.Generator().manual_seed(seed)
    # Not sorted: data sets are often ordered by class, and the next image is "another image".
    chosen = places[torch.randperm(len(places), generator=generator)[:images]]
    most = QUICK_PATCHES if context.quick else PATCHES
    config = with_patch_scale(config, MAIN_SIDE, (most,))
    plan = replace(make_plan(config, model, context.device), counts=(CENTER, most))
    whole = embed_patches(model, config, source, plan, CENTER, chosen)[0]
    patches = embed_patches(model, config, source, plan, most, chosen)  # [P, N, F]
    order = torch.rand(patches.shape[:2], generator=generator).argsort(dim=0).to(patches.device)
    patches = patches.gather(0, order[..., None].expand_as(patches))
    sums = patches.cumsum(dim=0)
    whole_mean, patch_mean = whole.mean(dim=0), patches.mean(dim=(0, 1))
    rows: dict[str, list[Tensor]] = {}
    for n in steps(most):
        mean = sums[n - 1] / n
        centered, target = mean - patch_mean, whole - whole_mean
        near = F.normalize(centered, dim=1) @ F.normalize(target, dim=1).T
        row = {
            "own": F.cosine_similarity(mean, whole, dim=1),
            "other": F.cosine_similarity(mean, whole.roll(1, dims=0), dim=1),
            "centered": near.diagonal(),
            "centered other": F.cosine_similarity(centered, target.roll(1, dims=0), dim=1),
            "found": (near.argmax(dim=1).cpu() == torch.arange(len(near))).float(),
        }
        for key, value in row.items():
            rows.setdefault(key, []).append(value.cpu())
    return {key: torch.stack(values) for key, values in rows.items()}


def judge(found: dict[str, list[Curves]]) -> dict[str, Difference]:
    """The four parts of the claim, each as a number that should be positive."""

    def last(name: str, key: str, row: int = -1) -> Tensor:
        return torch.stack([one[key][row] for one in found[name]])

    own = last(TRAINED, "centered")
    return {
        "grows with the number of patches": paired(own - last(TRAINED, "centered", 0)),
        "own patches beat another image's": paired(own - last(TRAINED, "centered other")),
        "training beats the random network": paired(own - last(RANDOM, "centered")),
        "explains most of the whole (squared cosine above one half)": paired(
            own.sign() * own.square() - CLOSE
        ),
    }


def averages(seeds: list[Curves], key: str) -> list[float]:
    """Mean over images and seeds, per number of patches."""
    return [round(float(v), 4) for v in torch.stack([one[key] for one in seeds]).mean(dim=(0, 2))]


def text(
    context: Context,
    found: dict[str, list[Curves]],
    counts: list[int],
    parts: dict[str, Difference],
) -> str:
    """The paragraphs, from the numbers."""
    images = found[TRAINED][0]["own"].shape[1]
    end = {name: {key: averages(one, key)[-1] for key in one[0]} for name, one in found.items()}
    start = averages(found[TRAINED], "centered")[0]
    listed = "; ".join(
        f"{name}: {part.verdict} ({part.mean:+.3f} ± {part.error:.3f})"
        for name, part in parts.items()
    )
    trained, fixed, random = end[TRAINED], end[FIXED], end[RANDOM]
    return (
        f"{images} test images, patches of {100 * MAIN_SIDE:g}% of the side; the network trained "
        f"on multi-scale crops with {context.base.loss.name}, "
        f"{plural(len(context.seeds), 'seed')}.\n\n"
        f"Plain cosines are misleadingly high: the mean of {counts[-1]} patches has cosine "
        f"{trained['own']:.2f} with its own image, but {trained['other']:.2f} with another image, "
        f"and a random network gives {random['own']:.2f}. After centering over the images, the "
        f"cosine with its own image rises from {start:.2f} (one patch) to "
        f"{trained['centered']:.2f} ({counts[-1]} patches), with another image it is "
        f"{trained['centered other']:+.2f}; the random network ends at {random['centered']:.2f}, "
        f"the network trained on fixed-scale patches at {fixed['centered']:.2f}. Among {images} "
        f"whole images, the nearest is its own for {trained['found']:.0%} (random network "
        f"{random['found']:.0%}, fixed-scale training {fixed['found']:.0%}).\n\n"
        f"The parts of the claim: {listed}.\n\n"
        f"What this does not show: that the two are equal. The whole image is encoded at a coarser "
        f"scale than its patches, and only its embedding can contain its layout, which no single "
        f"patch shows."
    )


def table(found: dict[str, list[Curves]], counts: list[int]) -> Table:
    """Centered cosine and retrieval per network and number of patches."""
    columns = ["network", "quantity", *(f"N = {n}" for n in counts)]
    names = {
        "own": "cosine, own image",
        "other": "cosine, another image",
        "centered": "centered cosine, own image",
        "centered other": "centered cosine, another image",
        "found": "own image is nearest",
    }
    rows: list[list[str | int | float]] = []
    for network, seeds in found.items():
        for key, name in names.items():
            rows.append([network, name, *(f"{value:.2f}" for value in averages(seeds, key))])
    return Table("Claim 3: the whole against the mean of N patches", columns, rows)


def draw(context: Context, found: dict[str, list[Curves]], counts: list[int]) -> Figure:
    """Plain cosine, centered cosine, retrieval, against N."""
    figure, axes = figures.panels(1, 3, 3.4, 3.2)
    colors = {TRAINED: figures.WHOLE, FIXED: figures.PATCHES, RANDOM: figures.RANDOM}
    titles = ("cosine", "cosine of centered features", "own image is nearest")
    pairs = (("own", "other"), ("centered", "centered other"), ("found", None))
    for axis, title, (own, other) in zip(axes, titles, pairs, strict=True):
        for name, seeds in found.items():
            axis.plot(counts, averages(seeds, own), "o-", color=colors[name], label=name)
            if other is not None:
                axis.plot(counts, averages(seeds, other), ":", color=colors[name])
        figures.patch_axis(axis, counts[::2], "patches averaged, N")
        axis.set_title(title)
        axis.set_ylim(min(-0.1, axis.get_ylim()[0]), 1.02)
    axes[0].plot([], [], ":", color="#555555", label="patches of another image")
    figures.legend(figure, axes[0], 4)
    return figures.save(
        figure,
        context.out,
        "claim3_mean",
        "The embedding of the whole image and the mean of its patches' embeddings",
        "Cosine between the whole image's embedding and the mean of N of its patches (solid) or of "
        "another image's (dotted). Left: as they are, where the common mean makes everything "
        "similar. Middle: centered over the images. Right: how often its own image is nearest.",
    )


STUDY = Study("mean", 3, TITLE, run)
