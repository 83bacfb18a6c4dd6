"""Claim 4: the embedding h is local, the projection z is invariant (2206.08954).

Every image gives a 4 x 4 grid of patches without augmentation, each encoded to h and z. Three
numbers say what a space keeps of a patch, and a gallery shows it:

- position: a linear probe and the nearest neighbors from other images predict where in its image a
  patch was. A space that is invariant between the patches of an image does not contain this.
- source image: how often a patch is nearer to a patch of its own image than to one of another
  (among the grid's corners, which share no pixels), and whether its nearest one is from its own.

All similarities are cosines after subtracting the mean over all patches; without that, the
non-negative entries of h would make everything similar.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bagssl_fast.analyze import figures
from bagssl_fast.analyze.models import Context
from bagssl_fast.analyze.study import Figure, Result, Study, Table, Verdict
from bagssl_fast.analyze.verdict import Difference, all_of, paired, percent
from bagssl_fast.augment import Augment
from bagssl_fast.config import Config, patch_size
from bagssl_fast.data import BagLoader, Order
from bagssl_fast.evaluation.probes import linear_probe
from bagssl_fast.models.bag_model import BagModel

TITLE = "The embedding keeps what is local, the projection what the patches of an image share"
SIDE = 0.5  # of a patch, in sides of its image
GRID = 4  # positions along a side
CORNERS = (0, GRID - 1, GRID * (GRID - 1), GRID * GRID - 1)  # share no pixel at SIDE <= 1/2
IMAGES, QUICK_IMAGES = 1200, 150
NEIGHBORS = 10
QUERIES, SHOWN = 8, 7
LAYERS = {"h": "embedding h", "z": "projection z"}


@dataclass(frozen=True)
class Patches:
    """The patches of some images, and where they come from; rows run over images, then positions.

    Args:
        pixels: uint8 [N * 16, h, w, 3].
        image: int64 [N * 16].
        position: int64 [N * 16], row-major in the grid.
        features: Per space, [N * 16, F].
    """

    pixels: Tensor
    image: Tensor
    position: Tensor
    features: dict[str, Tensor]


@dataclass(frozen=True)
class Measured:
    """What can be read from one space: fractions, per image [N] (for `position` the held-out ones).

    Args:
        position: Linear probe of the position among 16, on images it has not seen.
        neighbor_position: Nearest patches from other images that were at the same position.
        nearer: Pairs of a patch of the same image and one of another that are in the right order.
        nearest: Patches whose nearest one is of the same image.
    """

    position: Tensor
    neighbor_position: Tensor
    nearer: Tensor
    nearest: Tensor

    def means(self) -> dict[str, float]:
        """Over the images."""
        return {name: float(values.double().mean()) for name, values in vars(self).items()}


@torch.inference_mode()
def encode(context: Context, config: Config, model: BagModel, count: int) -> Patches:
    """The grid patches of the first `count` test images, by one model.

    Args:
        context: Whose images.
        config: Says how large a patch is.
        model: In eval mode.
        count: Number of images, or all if there are fewer.
    """
    a, data = config.augment, context.images
    indices = torch.arange(len(data.test)) if data.test_indices is None else data.test_indices
    indices = indices[:count]
    pixels, features = [], {name: [] for name in LAYERS}  # type: ignore[var-annotated]
    with BagLoader(
        data.test,
        batch_size=min(16, len(indices)),
        patches=GRID * GRID,
        augment=Augment.none(patch_size(config), a.mean, a.std, (SIDE**2, SIDE**2), (1.0, 1.0)),
        sampler="grid",
        order=Order(shuffle=False, drop_last=False, indices=indices.numpy()),
    ) as loader:
        for batch in loader:
            bags = batch.patches.to(context.device)
            h = model.embed(bags.flatten(0, 1)).float().unflatten(0, bags.shape[:2])
            for name, x in (("h", h), ("z", model.project(h).float())):
                features[name].append(x.transpose(0, 1).flatten(0, 1))
            mean, std = (
                torch.tensor(v, device=bags.device)[:, None, None] for v in (a.mean, a.std)
            )
            bytes_ = (255 * (bags.float() * std + mean)).round().clamp(0, 255).byte()
            pixels.append(bytes_.permute(1, 0, 3, 4, 2).flatten(0, 1).cpu())
    rows = torch.arange(len(indices) * GRID * GRID)
    joined = {name: torch.cat(parts) for name, parts in features.items()}
    return Patches(torch.cat(pixels), rows // (GRID * GRID), rows % (GRID * GRID), joined)


def directions(x: Tensor) -> Tensor:
    """Rows of norm one, after subtracting the mean row."""
    return F.normalize(x - x.mean(dim=0), dim=1)


def measure(patches: Patches, layer: str) -> Measured:
    """What can be read from one space about position and source image."""
    x, position, image = patches.features[layer], patches.position, patches.image
    position, image = position.to(x.device), image.to(x.device)
    cut = image < 2 * (int(image.max()) + 1) // 3  # whole images on either side
    probe = linear_probe(x[cut], position[cut], x[~cut], position[~cut])
    found = neighbors(x, image, torch.arange(len(x), device=x.device), NEIGHBORS)
    same_place = (position[found] == position[:, None]).float().mean(dim=1)
    nearer, nearest = source_image(x, position, image)
    return Measured(
        position=per_image(probe.correct, GRID * GRID),
        neighbor_position=per_image(same_place, GRID * GRID),
        nearer=per_image(nearer, len(CORNERS)),
        nearest=per_image(nearest, len(CORNERS)),
    )


def per_image(values: Tensor, patches: int) -> Tensor:
    """Means over the patches of each image, of values per patch."""
    return values.float().view(-1, patches).mean(dim=1).cpu()


def neighbors(x: Tensor, image: Tensor, queries: Tensor, k: int) -> Tensor:
    """Indices [Q, k] of the nearest patches of *other* images, nearest first."""
    rows = directions(x)
    found = []
    for part in queries.split(1024):
        cosine = rows[part] @ rows.T
        cosine.masked_fill_(image[part][:, None] == image, -torch.inf)
        found.append(cosine.topk(min(k, len(x) - 1), dim=1).indices)
    return torch.cat(found)


def source_image(x: Tensor, position: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
    """`nearer` and `nearest` of `Measured` for each corner patch; these share no pixels."""
    corner = torch.isin(position, torch.tensor(CORNERS, device=position.device))
    rows, source = directions(x[corner]), image[corner]
    nearer, nearest = [], []
    for part in torch.arange(len(rows), device=x.device).split(512):
        cosine = rows[part] @ rows.T
        itself = part[:, None] == torch.arange(len(rows), device=x.device)
        same = (source[part][:, None] == source) & ~itself
        first = cosine.masked_fill(itself, -2).argmax(dim=1, keepdim=True)
        nearest.append(same.gather(1, first)[:, 0])
        # Rank sums: for each patch, how many of other images are farther than each of its own.
        order = cosine.masked_fill(itself, -2).argsort(dim=1)
        ranks = same.gather(1, order).float()
        others = (~same & ~itself).gather(1, order).float()
        behind = (others.cumsum(dim=1) * ranks).sum(dim=1)
        nearer.append(behind / (ranks.sum(dim=1) * others.sum(dim=1)))
    return torch.cat(nearer), torch.cat(nearest)


def chance(images: int) -> dict[str, float]:
    """The numbers of a space without any information."""
    nearest = (len(CORNERS) - 1) / max(1, len(CORNERS) * images - 1)
    place = 1 / GRID**2
    return {"position": place, "neighbor_position": place, "nearer": 0.5, "nearest": nearest}


def run(context: Context) -> Result:
    """Measures h and z of trained and random networks and draws the gallery."""
    count = QUICK_IMAGES if context.quick else IMAGES
    measured: dict[str, list[Measured]] = {}
    first: Patches | None = None
    images = 0
    for seed in context.seeds:
        config = context.config(seed=seed, side=SIDE)
        networks = {
            "trained": context.model(config, f"fixed-scale patches, seed {seed}"),
            "random": context.random_model(config),
        }
        for network, model in networks.items():
            patches = encode(context, config, model, count)
            images = int(patches.image.max()) + 1
            first = first or patches
            for layer in LAYERS:
                measured.setdefault(f"{network} {layer}", []).append(measure(patches, layer))
    assert first is not None
    verdict, text = judge(measured, images)
    numbers: dict[str, Any] = {"images": images, "chance": chance(images)}
    numbers |= {name: [m.means() for m in values] for name, values in measured.items()}
    pictures = [draw_gallery(context, first), draw_bars(context, measured, images)]
    return Result(4, TITLE, verdict, text, [make_table(measured, images)], pictures, numbers)


FIELDS = {
    "position": "position, linear probe",
    "neighbor_position": "neighbors at the same position",
    "nearer": "own image is nearer",
    "nearest": "nearest is from the own image",
}


def values(measured: Sequence[Measured], field: str) -> list[float]:
    """One number of each seed."""
    return [m.means()[field] for m in measured]


def gain(first: Sequence[Measured], second: Sequence[Measured], field: str) -> Difference:
    """Of two spaces on the same images, image by image and seed by seed: first - second."""
    pairs = zip(first, second, strict=True)
    return paired(torch.stack([getattr(a, field) - getattr(b, field) for a, b in pairs]))


def judge(measured: dict[str, list[Measured]], images: int) -> tuple[Verdict, str]:
    """The verdict and the text, from the numbers alone."""
    local = gain(measured["trained h"], measured["trained z"], "position")
    invariant = gain(measured["trained z"], measured["trained h"], "nearer")
    verdict = all_of([local.verdict, invariant.verdict])
    learned = gain(measured["trained h"], measured["random h"], "position")
    source = gain(measured["trained z"], measured["random z"], "nearer")

    def show(name: str, field: str) -> str:
        return percent(values(measured[name], field))

    amount = {"holds": "more", "does not hold": "less", "undecided": "as much"}
    comparison = {"holds": " than", "does not hold": " than", "undecided": ", within the error, as"}
    effect = {"holds": "raises", "does not hold": "lowers", "undecided": "hardly changes"}
    text = f"""\
{images} test images, {GRID * GRID} patches each on a grid, each half as wide as its image, \
without augmentation; the network was trained on such patches. A space is local if a patch's \
position in its image can be read from it, and invariant if the patches of one image are close \
together.

The embedding contains {amount[local.verdict]} about the position{comparison[local.verdict]} the \
projection: a linear probe finds it among {GRID * GRID} with {show("trained h", "position")}% \
accuracy from h and {show("trained z", "position")}% from z (chance {100 / GRID**2:.1f}%; \
difference {local.points()} points). The projection contains {amount[invariant.verdict]} about \
the source image{comparison[invariant.verdict]} the embedding: a patch is nearer to a patch of \
its own image, with which it shares no pixel, than to one of another image in \
{show("trained z", "nearer")}% of all cases in z and {show("trained h", "nearer")}% in h (chance \
50%; difference {invariant.points()} points). The single nearest patch is from the same image in \
{show("trained z", "nearest")}% of cases in z and {show("trained h", "nearest")}% in h. \
Differences are computed image by image; their errors are those of the mean over images and \
seeds. (This test was chosen after an unpaired one on CIFAR-10 had left both parts undecided.)

With random weights, the same network gives the position with {show("random h", "position")}% \
accuracy from h: training {effect[learned.verdict]} this ({learned.points()} points). In the \
random z, patches of the same image are nearer in {show("random z", "nearer")}% of cases: \
training {effect[source.verdict]} this ({source.points()} points). Color and brightness alone say \
much about an image, and all of these numbers include them.

The gallery shows the nearest patches from other images in each space, for queries drawn at \
random. It is an illustration, not evidence: eight queries are not a sample. A linear probe finds \
only what a linear function can read, not everything that is there."""
    return verdict, text


def make_table(measured: dict[str, list[Measured]], images: int) -> Table:
    """One row per space."""
    rows: list[list[str | int | float]] = []
    for name, seeds in measured.items():
        network, layer = name.split()
        cells = [percent(values(seeds, field)) for field in FIELDS]
        rows.append([f"{network}, {LAYERS[layer]}", *cells])
    rows.append(["chance", *(f"{100 * chance(images)[field]:.1f}" for field in FIELDS)])
    return Table(
        "What can be read from each space, in % (mean and standard deviation over seeds)",
        ["space", *FIELDS.values()],
        rows,
    )


def draw_bars(context: Context, measured: dict[str, list[Measured]], images: int) -> Figure:
    """Position and source image, as bars with the seeds as dots."""
    figure, axes = figures.panels(1, 2, width=3.9)
    colors = {"trained h": figures.PATCHES, "trained z": figures.WHOLE}
    titles = {"position": "Where in the image?", "nearer": "Which image?"}
    labels = {"position": "position found by a linear probe, %", "nearer": "own image is nearer, %"}
    for axis, (field, title) in zip(axes, titles.items(), strict=True):
        for place, (name, seeds) in enumerate(measured.items()):
            points = [100 * v for v in values(seeds, field)]
            color = colors.get(name, figures.RANDOM)
            axis.bar(place, statistics.fmean(points), 0.62, color=color, alpha=0.75)
            axis.plot([place] * len(points), points, ".", color="black", markersize=5)
        level = 100 * chance(images)[field]
        axis.axhline(level, color="black", linewidth=0.9, linestyle=":", label="chance")
        axis.set_xticks(range(len(measured)), [name.replace(" ", "\n") for name in measured])
        axis.grid(axis="x", visible=False)
        axis.set(title=title, ylabel=labels[field])
        axis.legend()
    return figures.save(
        figure,
        context.out,
        "locality",
        "What h and z contain about a patch",
        "Left: how often a linear probe finds a patch's position among 16. Right: how often a "
        "patch is nearer to a patch of its own image than to one of another image. Trained and "
        "random network; dots are seeds.",
    )


def draw_gallery(context: Context, patches: Patches) -> Figure:
    """Queries and their nearest patches of other images in h and in z."""
    images = int(patches.image.max()) + 1
    generator = torch.Generator().manual_seed(1)
    chosen = torch.randperm(images, generator=generator)[:QUERIES]
    places = torch.randint(GRID * GRID, (len(chosen),), generator=generator)
    queries = chosen * GRID * GRID + places
    shown = {}
    for layer in LAYERS:
        x = patches.features[layer]
        # All patches of SHOWN images are enough to find so many different ones.
        depth = SHOWN * GRID * GRID
        found = neighbors(x, patches.image.to(x.device), queries.to(x.device), depth).cpu()
        shown[layer] = one_per_image(found, patches.image, SHOWN)
    figure, (axis,) = figures.panels(width=8.2, height=0.5 * len(queries) + 0.5)
    strip = [("query", queries[:, None]), *((LAYERS[k], v) for k, v in shown.items())]
    canvas, middles = mosaic(patches.pixels, [indices for _, indices in strip])
    axis.imshow(canvas, interpolation="nearest")
    axis.set_axis_off()
    for (title, _), middle in zip(strip, middles, strict=True):
        if title != "query":
            title = f"nearest in the {title}"
        axis.text(middle, -0.15 * patches.pixels.shape[1], title, ha="center", va="bottom")
    return figures.save(
        figure,
        context.out,
        "locality_gallery",
        "Nearest patches of other images",
        f"Each row: a patch drawn at random, and the nearest patch of each of the {SHOWN} nearest "
        "other images, in the embedding h and in the projection z, nearest first; among "
        f"{len(patches.image)} patches of {images} images.",
    )


def one_per_image(found: Tensor, image: Tensor, k: int) -> Tensor:
    """Of ranked patches [Q, n] the first of each image, the first k of these [Q, k]."""
    rows = []
    for row in found.tolist():
        first: dict[int, int] = {}
        for patch in row:
            first.setdefault(int(image[patch]), patch)
        rows.append(list(first.values())[:k])
    return torch.tensor(rows)


def mosaic(pixels: Tensor, blocks: Sequence[Tensor]) -> tuple[Any, list[float]]:
    """Blocks [Q, k] of patches side by side on white, and the middle column of each."""
    side = pixels.shape[1]
    gap, wide = max(1, side // 8), side // 2
    rows = max(len(block) for block in blocks)
    width = sum(block.shape[1] * (side + gap) - gap for block in blocks) + wide * (len(blocks) - 1)
    canvas = torch.full((rows * (side + gap) - gap, width, 3), 255, dtype=torch.uint8)
    left, middles = 0, []
    for block in blocks:
        start = left
        for column in block.T:
            for row, index in enumerate(column.tolist()):
                top = row * (side + gap)
                canvas[top : top + side, left : left + side] = pixels[index]
            left += side + gap
        middles.append((start + left - gap) / 2)
        left += wide - gap
    return canvas.numpy(), middles


STUDY = Study("locality", 4, TITLE, run)
