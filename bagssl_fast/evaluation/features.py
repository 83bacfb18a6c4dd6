"""Bag features of a data set for evaluation: grids of patches, averaged image by image."""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import islice

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from tqdm import tqdm

from bagssl_fast import ops
from bagssl_fast.augment import Augment
from bagssl_fast.config import Config, patch_size
from bagssl_fast.data import BagLoader, Decoding, Order, Output, Source, Threads
from bagssl_fast.models.backbone import as_dense, is_dense
from bagssl_fast.models.bag_model import BagModel, build_model
from bagssl_fast.models.heads import Projector

CALIBRATION_BATCHES = 20
CENTER = 0  # the "number of patches" of the central crop
Features = dict[tuple[str, int], Tensor]  # (layer, patches) -> [N, G * G * F] in float32


@dataclass(frozen=True)
class Plan:
    """What is extracted, and how.

    Args:
        counts: Patches per bag; `CENTER` stands for the central square, whole, at patch size.
        projection_up_to: Largest count whose patches are projected too; -1 for none.
        batch_size: Images per forward pass.
        device: Where the model is.
        precision: Of the forward pass.
        num_threads: Of the loader, 0 for its own choice.
        on_error: What a broken image does.
        grid: The largest bag that allows it is averaged over each of grid x grid regions, whose
            means stand side by side.
    """

    counts: tuple[int, ...]
    projection_up_to: int
    batch_size: int
    device: torch.device
    precision: torch.dtype = torch.float32
    num_threads: int = 0
    on_error: str = "raise"
    grid: int = 1

    def layers(self, count: int) -> tuple[str, ...]:
        """The layers that are measured at a count."""
        return ("h", "z") if count <= self.projection_up_to else ("h",)

    def regions(self, count: int) -> int:
        """Regions G per side of the bag, of which `extract` gives the means; mostly 1."""
        whole = [n for n in self.counts if n and math.isqrt(n) % self.grid == 0]
        return self.grid if count == max(whole, default=None) else 1


def view_size(config: Config) -> int:
    """Side to which a whole image is brought so that a patch covers what it covered in training.

    Raises:
        ValueError: If no patch fits.
    """
    if config.eval.view:
        if config.eval.view < patch_size(config):
            raise ValueError(
                f"--eval.view {config.eval.view} is smaller than the patch of "
                f"{patch_size(config)} pixels: no patch fits; 0 chooses the view's size"
            )
        return config.eval.view
    if config.bag.dense:
        return config.augment.size
    scale = sum(config.augment.scale) / 2
    return max(patch_size(config), round(patch_size(config) / math.sqrt(scale)))


def dense_grid(count: int, positions: int) -> list[int]:
    """Rows, and likewise columns, of n x n patches spread evenly over positions x positions."""
    n = round(math.sqrt(count))
    if n == 1:
        return [(positions - 1) // 2]
    return [round(i * (positions - 1) / (n - 1)) for i in range(n)]


def dense_stride(counts: tuple[int, ...], span: int) -> int:
    """The coarsest stride whose positions, 0 to span pixels, hold the largest grid.

    It also reaches both ends (to a pixel) and has a position in the middle, for the bag of one.
    """
    finest = max(round(math.sqrt(count)) for count in counts)
    for stride in range(span, 1, -1):
        steps, rest = divmod(span, stride)
        if steps + 1 >= finest and steps % 2 == 0 and rest <= 1:
            return stride
    return 1


def extract(
    model: BagModel, config: Config, source: Source, plan: Plan, indices: Tensor | None = None
) -> tuple[Features, Tensor | None]:
    """Features of a data set, averaged over each image's bag or its regions.

    Args:
        model: In eval mode, on `plan.device`.
        config: Of the run, for sizes, scale and normalization.
        source: The images.
        plan: What is extracted.
        indices: Which images, int64; None for all.

    Returns:
        Features per layer and count, [N, G * G * F] for G = `plan.regions(count)`, on the device,
        and the labels [N] (None without labels).
    """
    return extract_folded(fold_batch_norm(model), config, source, plan, indices)


@torch.inference_mode()
def extract_folded(
    model: BagModel, config: Config, source: Source, plan: Plan, indices: Tensor | None = None
) -> tuple[Features, Tensor | None]:
    """As `extract`, for a model that `fold_batch_norm` made."""
    bags = [count for count in plan.counts if count != CENTER]
    passes = [bags] if is_dense(model.backbone) else [[count] for count in bags]
    if CENTER in plan.counts:
        passes.insert(0, [CENTER])
    means = [count for count in bags if "z" not in plan.layers(count)]
    features: Features = {}
    labels: Tensor | None = None
    for counts in filter(None, passes):
        collected = Collector()
        for h, batch_labels in _encoded(model, config, source, plan, counts, indices, means):
            collected.add(model, plan, h, batch_labels)
        features |= collected.features()
        labels = collected.labels()
    return features, labels if source.labels is not None else None


@torch.inference_mode()
def embed_patches(
    model: BagModel,
    config: Config,
    source: Source,
    plan: Plan,
    count: int,
    indices: Tensor | None = None,
) -> Tensor:
    """The embedding of every single patch of a grid, not averaged.

    Args:
        model, config, source, plan, indices: As for `extract`; the plan's counts are not used.
        count: Patches per image, a square; `CENTER` for the central square.

    Returns:
        h [P, N, F] in float32, positions in row-major order; P is 1 for the central square.
    """
    model = fold_batch_norm(model)
    batches = _encoded(model, config, source, plan, [count], indices)
    return torch.cat([h[count].float() for h, _ in batches], dim=1)


def fold_batch_norm(model: BagModel) -> BagModel:
    """A copy in eval mode whose batch norms behind convolutions have become part of these."""
    model = copy.deepcopy(model).eval()
    for module in model.modules():
        if not isinstance(module, nn.Sequential):
            continue
        for i in range(len(module) - 1):
            conv, norm = module[i], module[i + 1]
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                module[i] = fuse_conv_bn_eval(conv, norm)
                module[i + 1] = nn.Identity()
    return model


class Collector:
    """Bag means per layer and count, batch by batch; single patches are dropped at once."""

    def __init__(self) -> None:
        self._parts: dict[tuple[str, int], list[Tensor]] = {}
        self._labels: list[Tensor] = []

    def add(self, model: BagModel, plan: Plan, bags: dict[int, Tensor], labels: Tensor) -> None:
        """Takes embeddings h [P, B, F] per count, or the regions' [G * G, B, F] of unprojected."""
        self._labels.append(labels.to(plan.device, copy=True))
        for count, h in bags.items():
            grid = plan.regions(count)
            self._parts.setdefault(("h", count), []).append(side_by_side(h, grid))
            if "z" in plan.layers(count):
                with torch.autocast(
                    plan.device.type, plan.precision, plan.precision != torch.float32
                ):
                    z = model.project(h)
                self._parts.setdefault(("z", count), []).append(side_by_side(z, grid))

    def features(self) -> Features:
        return {key: torch.cat(parts) for key, parts in self._parts.items()}

    def labels(self) -> Tensor:
        return torch.cat(self._labels)


def region_means(x: Tensor, grid: int) -> Tensor:
    """Means of patches [n * n, B, F] over grid x grid regions: [grid * grid, B, F] in float32."""
    n = math.isqrt(len(x))
    x = x.float().unflatten(0, (grid, n // grid, grid, n // grid))
    return x.mean((1, 3)).flatten(0, 1)


def side_by_side(x: Tensor, grid: int) -> Tensor:
    """Patches, or the means of regions, [n * n, B, F] as features [B, grid * grid * F]."""
    return region_means(x, grid).transpose(0, 1).flatten(1)


def bag_mean(x: Tensor, grid: int) -> Tensor:
    """The bag's mean [N, F] of the features of its regions [N, grid * grid * F]."""
    return x.unflatten(1, (grid * grid, -1)).mean(1)


def dense_bags(
    model: BagModel, views: Tensor, counts: list[int], plan: Plan, means: Sequence[int] = ()
) -> dict[int, Tensor]:
    """Grids of patches of whole views from one dense pass.

    Args:
        model, plan: As for `extract`.
        views: [B, C, H, W].
        counts: Patches per bag, squares.
        means: Those counts of which means over the bag, or its regions, are enough.

    Returns:
        h [P, B, F] per count; [G * G, B, F], the means, for `means`.
    """
    backbone = as_dense(model.backbone)
    span = views.shape[2] - backbone.patch_size
    stride = dense_stride(tuple(counts), span)
    positions = span // stride + 1
    bags = {}
    with torch.autocast(plan.device.type, plan.precision, plan.precision != torch.float32):
        maps = backbone.dense_maps(views, stride)
        for count in counts:
            places, grid = dense_grid(count, positions), plan.regions(count)
            if count in means and isinstance(model.head, Projector):
                side = len(places) // grid
                bands = [places[i : i + side] for i in range(0, len(places), side)]
                bags[count] = maps.means(bands)  # their embeddings are the backbone's output
                continue
            h = model.head.embed(maps.patches(places))
            bags[count] = region_means(h, grid) if count in means else h
    return bags


def embed(model: BagModel, patches: Tensor, plan: Plan) -> Tensor:
    """Embeddings h [N, F] of patches [N, C, h, w]."""
    with torch.autocast(plan.device.type, plan.precision, plan.precision != torch.float32):
        return model.embed(patches)


def _encoded(
    model: BagModel,
    config: Config,
    source: Source,
    plan: Plan,
    counts: list[int],
    indices: Tensor | None,
    means: Sequence[int] = (),
) -> Iterator[tuple[dict[int, Tensor], Tensor]]:
    """Batches of embeddings h [P, B, F] per count, or their means as `dense_bags` has them.

    Several counts only of a dense backbone, which encodes the grids of all of them in one pass.
    """
    if counts != [CENTER] and is_dense(model.backbone):
        for views, labels in _batches(config, source, plan, indices, view_size(config), CENTER):
            yield dense_bags(model, views[0], counts, plan, means), labels
        return
    (count,) = counts
    for patches, labels in _batches(config, source, plan, indices, patch_size(config), count):
        h = embed(model, patches.flatten(0, 1), plan)
        yield {count: h.unflatten(0, patches.shape[:2])}, labels


def _batches(
    config: Config, source: Source, plan: Plan, indices: Tensor | None, size: int, count: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Unaugmented batches [P, B, 3, size, size]: grids of patches, or central squares."""
    a = config.augment
    # As many patches in flight as a batch of training images has, and no more than there are.
    images = len(source) if indices is None else len(indices)
    batch_size = max(1, min(plan.batch_size // max(count, 1), images))
    kind = "center" if count == CENTER else "grid"
    with BagLoader(
        source,
        batch_size=batch_size,
        patches=max(count, 1),
        augment=Augment.none(size, a.mean, a.std, a.scale, a.ratio),
        sampler=kind,
        order=Order(
            shuffle=False, drop_last=False, indices=None if indices is None else indices.numpy()
        ),
        output=Output(views=views_at(plan.device), pin_memory=plan.device.type == "cuda"),
        decoding=Decoding(plan.on_error),
        threads=Threads(plan.num_threads),
    ) as loader:
        for batch in tqdm(loader, kind, leave=False, disable=not sys.stderr.isatty()):
            yield batch.to(plan.device).patches, batch.labels


def views_at(device: torch.device) -> str:
    """Where patches are cut, the loader's `views`: its threads are the C++ form of the op."""
    cell = ops.cell("patch_views", device.type)
    by_threads = cell == "cpu" or (cell == "kernels" and find_spec("triton") is None)
    return "host" if by_threads else "device"


@torch.no_grad()
def calibrate(model: BagModel, batches: Iterator[Tensor]) -> int:
    """Sets batch-norm statistics to their average over training batches.

    A network at its random initialization still carries mean 0 and variance 1: without this it
    would be compared in a state that nobody would use it in.

    Args:
        model: Left in eval mode.
        batches: Training bags, as `model` takes them.

    Returns:
        The number of batches.
    """
    layers = [m for m in model.modules() if isinstance(getattr(m, "running_mean", None), Tensor)]
    momenta = [layer.momentum for layer in layers]
    model.train()
    count = 0
    for count, bags in enumerate(batches, start=1):
        for layer in layers:
            layer.momentum = 1.0 / count  # type: ignore[assignment]
        model(bags)
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum
    model.eval()
    return count


def random_network(config: Config, source: Source, device: torch.device) -> BagModel:
    """The network as training found it, its batch-norm statistics taken from training bags."""
    model = build_model(config, pretrained=False).to(device)
    odd = config.augment_odd
    with BagLoader(
        source,
        batch_size=min(config.batch_size, len(source)),
        patches=config.bag.patches,
        augment=config.augment if odd is None else (config.augment, odd),
        order=Order(seed=config.seed),
        decoding=Decoding(config.loader.on_error),
    ) as loader:

        def bags() -> Iterator[Tensor]:
            for batch in islice(loader, CALIBRATION_BATCHES):
                yield batch.patches.to(device)

        calibrate(model, bags())
    return model


def make_plan(config: Config, model: BagModel, device: torch.device) -> Plan:
    """What the configuration asks to extract, as far as an image has so many patches."""
    bf16 = device.type == "cuda" and config.precision in ("auto", "bf16")
    counts = sorted(set(config.eval.patches))
    if is_dense(model.backbone):
        places = (view_size(config) - patch_size(config) + 1) ** 2
        counts = [count for count in counts if count <= places]
    return Plan(
        counts=(CENTER, *counts),
        projection_up_to=config.eval.projection_patches,
        batch_size=config.eval.batch_size or (32 if device.type == "cpu" else 256),
        device=device,
        precision=torch.bfloat16 if bf16 else torch.float32,
        num_threads=config.loader.num_threads,
        on_error=config.loader.on_error,
        grid=config.eval.grid,
    )
