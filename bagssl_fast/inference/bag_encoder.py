"""Images in, bag embeddings out: `BagEncoder.from_run(path)(images)`."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from bagssl_fast.config import Config, patch_size
from bagssl_fast.data import ImageError, Source, open_files, open_source
from bagssl_fast.data.pixels import is_path, split_images, to_array
from bagssl_fast.data.source import is_image_name
from bagssl_fast.distributed import ranks
from bagssl_fast.evaluation.features import (
    CENTER,
    Plan,
    extract_folded,
    fold_batch_norm,
    view_size,
)
from bagssl_fast.models import saved
from bagssl_fast.models.backbone import is_dense
from bagssl_fast.models.bag_model import BagModel

LAYERS = {"embedding": "h", "projection": "z"}
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class BagEncoder:
    """A trained encoder as a function from images to the embeddings of their bags.

    An image's bag is the grid of patches of `python -m bagssl_fast.evaluate`, at the same places
    and scale, and the embedding is the mean over it: `BagEncoder(..., patches=n, grid=g)` gives the
    numbers of `evaluate --patches n --grid g`.

    Args:
        model: Backbone and head.
        config: Their configuration; of `augment` size, scale, ratio and normalization are used.
        patches: Patches per image, a square number n * n; or "center": one patch that shows the
            whole central square of the image.
        layer: "embedding" (what evaluation pools) or "projection" (where the loss lives).
        grid: The bag is averaged over each of grid x grid regions, whose means stand side by side;
            1 for the bag's mean. It divides the patches per side.
        normalize: Divide each result by its L2 norm.
        device: "auto" (CUDA where there is one), "cpu" or "cuda".
        precision: Of the forward pass: fp32, bf16 or fp16 (`evaluate` uses bf16 on CUDA).
        batch_size: Images per forward pass, or patches where these are encoded one by one; 0 for
            32 on a CPU (for its caches), else 256.
        num_threads: Threads that decode and cut; 0 for a choice by the machine.

    Attributes:
        dim: Size of an embedding (or projection), of all regions together.

    Raises:
        ValueError: For options that do not exist or do not go together.
    """

    def __init__(
        self,
        model: BagModel,
        config: Config,
        *,
        patches: int | str = 16,
        layer: str = "embedding",
        grid: int = 1,
        normalize: bool = False,
        device: str = "auto",
        precision: str = "fp32",
        batch_size: int = 0,
        num_threads: int = 0,
    ) -> None:
        if layer not in LAYERS or precision not in PRECISIONS:
            raise ValueError(
                f"BagEncoder: layer {layer!r} and precision {precision!r}; expected one of "
                f"{', '.join(LAYERS)}, and one of {', '.join(PRECISIONS)}"
            )
        place = ranks.pick_device(device)
        # What only training needs, such as BYOL's targets, is left out.
        bare = BagModel(model.backbone, model.head, model.dense, model.stride)
        self.model = fold_batch_norm(bare).to(place)
        self.config, self.layer, self.normalize = config, layer, normalize
        self.patches, self.grid = patches, grid
        count = _check_count(patches, config, is_dense(model.backbone))
        _check_grid(grid, count)
        dim = model.embedding_dim if layer == "embedding" else model.projection_dim
        self.dim = dim * grid * grid
        self.plan = Plan(
            counts=(count,),
            projection_up_to=count if layer == "projection" else -1,
            batch_size=batch_size or (32 if place.type == "cpu" else 256),
            device=place,
            precision=PRECISIONS[precision],
            num_threads=num_threads,
            grid=grid,
        )

    @classmethod
    def from_run(cls, path: str | os.PathLike[str], **options: Any) -> BagEncoder:
        """The encoder of a run directory, or of a folder that `bagssl_fast.export` wrote.

        Args:
            path: It holds model.safetensors, and config.yaml or config.json.
            options: `patches`, `layer` and the others of `BagEncoder`.

        Raises:
            FileNotFoundError: If these files are not there.
            ValueError: If they are damaged or of another version, or for options that do not exist.
        """
        run = saved.load(path)
        return cls(run.model, run.config, **options)

    def __call__(self, images: Any) -> Tensor:
        """Embeds images.

        Args:
            images: uint8 pixels, neither scaled nor normalized, as numpy arrays or torch tensors:
                a batch [N, H, W, 3 or 1] or [N, 3 or 1, H, W], one image ([H, W, 3], [3, H, W] or
                [H, W]), or a list of images of any sizes; gray is repeated to three channels. PIL
                images, paths of image files, or lists of them. Or a data set: a `Source`, or the
                path of anything `open_source` takes.

        Returns:
            float32 [N, dim] on the CPU, in the order of the images; one image is a batch of one.

        Raises:
            ValueError, FileNotFoundError: Naming the image and what is wrong with it.
        """
        if isinstance(images, Source):
            return self._finish(self._of_source(images))
        if is_path(images) and not is_image_name(os.fsencode(images)):
            return self._finish(self._of_source(open_source(images)))
        items = split_images(images)
        if len(items) == 0:
            return torch.zeros(0, self.dim)
        if all(is_path(item) for item in items):
            return self._finish(self._of_source(open_files(items)))
        return self._finish(self._of_items(items))

    def _of_source(self, source: Source) -> Tensor:
        features, _ = extract_folded(self.model, self.config, source, self.plan)
        return features[LAYERS[self.layer], self.plan.counts[0]]

    def _of_items(self, items: Sequence[Any]) -> Tensor:
        """Images in memory, and paths among them."""
        refused: dict[int, Exception] = {}

        def read(i: int) -> bytes | NDArray[np.uint8]:
            try:
                return Path(items[i]).read_bytes() if is_path(items[i]) else to_array(items[i], i)
            except Exception as error:
                refused[i] = error
                raise

        def name(i: int) -> str:
            return os.fspath(items[i]) if is_path(items[i]) else f"image {i}"

        try:
            return self._of_source(Source.from_function(read, len(items), name=name))
        except ImageError:
            if refused:  # what `read` said names the image, and has its own type
                raise refused[min(refused)] from None
            raise

    def _finish(self, x: Tensor) -> Tensor:
        x = x.cpu().clone()  # outside of inference mode: a probe may be trained on it
        return F.normalize(x, dim=1) if self.normalize else x

    def __repr__(self) -> str:
        return (
            f"BagEncoder({self.config.encoder.name}, patches={self.patches!r}, "
            f"grid={self.grid}, layer={self.layer!r}, dim={self.dim}, "
            f"device={str(self.plan.device)!r})"
        )


def _check_count(patches: int | str, config: Config, dense: bool) -> int:
    """The number of patches, `CENTER` for "center"."""
    if patches == "center":
        return CENTER
    if not isinstance(patches, (int, np.integer)) or patches < 1:
        raise ValueError(f'BagEncoder: patches {patches!r}; expected 1, 4, 9, 16, ... or "center"')
    if round(patches**0.5) ** 2 != patches:
        raise ValueError(
            f"BagEncoder: patches {patches} is not a square number: bags are n x n grids, "
            "expected 1, 4, 9, 16, ..."
        )
    if dense:
        side = view_size(config) - patch_size(config) + 1
        if patches > side * side:
            raise ValueError(
                f"BagEncoder: patches {patches}: a view of {view_size(config)} pixels holds "
                f"{side * side} patches of {patch_size(config)} pixels; ask for at most that many"
            )
    return int(patches)


def _check_grid(grid: int, count: int) -> None:
    if not isinstance(grid, (int, np.integer)) or grid < 1:
        raise ValueError(f"BagEncoder: grid {grid!r}; expected a whole number from 1 on")
    if grid > 1 and (count == CENTER or math.isqrt(count) % grid):
        had = "one" if count == CENTER else f"{math.isqrt(count)} x {math.isqrt(count)}"
        raise ValueError(
            f"BagEncoder: grid {grid} does not divide a bag of {had} patches into regions; take "
            f"patches {(2 * grid) ** 2}, say"
        )
