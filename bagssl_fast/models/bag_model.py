"""The model that is trained: a backbone, a head, and how a bag passes through them."""

import copy
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from bagssl_fast.arguments import check_options
from bagssl_fast.config import Config, patch_size
from bagssl_fast.models.backbone import as_dense, check_backbone
from bagssl_fast.models.encoders import build_encoder
from bagssl_fast.models.heads import EMPHead, Projector

# Parameters of the heads that have options of their own, or none.
OWN_OPTIONS = ("in_dim", "hidden", "out", "num_layers")


class BagModel(nn.Module):
    """Backbone and head over bags, slot-major.

    Args:
        backbone: maps `[N, C, h, w]` to `[N, F]`, see `backbone.py`.
        head: `Projector` or `EMPHead`; maps embeddings to projections.
        dense: whether training input is whole views, of which the backbone encodes every patch on
            a grid in one pass, rather than patches.
        stride: pixels between neighboring patches of a dense bag; the backbone's own if None.
    """

    def __init__(
        self,
        backbone: nn.Module,
        head: Projector | EMPHead,
        dense: bool = False,
        stride: int | None = None,
    ) -> None:
        super().__init__()
        if dense:
            as_dense(backbone)
        check_backbone(backbone)
        if stride is not None and stride < 1:
            raise ValueError(f"BagModel: stride {stride} must be at least 1 pixel")
        self.backbone, self.head = backbone, head
        self.dense, self.stride = dense, stride

    @property
    def embedding_dim(self) -> int:
        """Size F of the embedding that evaluation pools."""
        if isinstance(self.head, Projector):
            return cast(int, self.backbone.feature_dim)
        return self.head.embedding_dim

    @property
    def projection_dim(self) -> int:
        """Size D of the projection."""
        return self.head.out_dim

    def embed(self, x: Tensor) -> Tensor:
        """Embeddings of single patches: `[N, C, h, w]` -> h `[N, F]`."""
        return self.head.embed(self.backbone(x))

    def embed_dense(self, images: Tensor, stride: int | None = None) -> Tensor:
        """Embeddings of all patches of images: `[N, C, H, W]` -> h `[P, N, F]`, row-major."""
        maps = as_dense(self.backbone).dense_maps(images, stride or self.stride)
        return self.head.embed(maps.patches())

    def project(self, h: Tensor) -> Tensor:
        """Projections of embeddings: h `[..., F]` -> z `[..., D]`.

        Of an embedding wider than the head's input (PatchNet's hypercolumn) the head reads the last
        entries, those of the top layer.
        """
        return cast(Tensor, self.head(h[..., -self.head.embedding_dim :]))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Encodes the bags of a batch.

        Args:
            x: patches `[P, B, C, h, w]`, or, if `dense`, whole views `[V, B, C, H, W]`.

        Returns:
            h `[P', B, F]` and z `[P', B, D]`; P' is P, or V times the positions of the dense grid
            (all positions of view 0 first).
        """
        if x.dim() != 5:
            raise ValueError(
                f"BagModel: expected bags [P, B, C, h, w] (or views [V, B, C, H, W] if dense), got "
                f"{list(x.shape)}"
            )
        bags, batch = x.shape[:2]
        flat = x.flatten(0, 1)
        if self.dense:
            h = self.embed_dense(flat).unflatten(1, (bags, batch))
            h = h.transpose(0, 1).flatten(0, 1)
        else:
            h = self.embed(flat).unflatten(0, (bags, batch))
        return h, self.project(h)


class MomentumModel(BagModel):
    """A BagModel whose forward also gives targets: what BYOL (2006.07733) trains.

    The target network is a moving average of backbone and head, which follows them at the start of
    every training step; a predictor guesses the targets from the projections. Evaluation uses
    backbone and head, as with any other model.

    Args:
        backbone, head, dense, stride: as of `BagModel`.
        momentum: share of the average that each step keeps.
    """

    def __init__(
        self,
        backbone: nn.Module,
        head: Projector | EMPHead,
        dense: bool = False,
        stride: int | None = None,
        momentum: float = 0.99,
    ) -> None:
        super().__init__(backbone, head, dense, stride)
        self.momentum = momentum
        self.predictor = Projector(head.out_dim, 2 * head.out_dim, head.out_dim, num_layers=2)
        self.target = BagModel(copy.deepcopy(backbone), copy.deepcopy(head), dense, stride)
        self.target.requires_grad_(False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """As `BagModel.forward`, with z `[P', B, 2 D]`: predictions, then targets, side by side."""
        with torch.no_grad():
            if self.training:
                online = [*self.backbone.parameters(), *self.head.parameters()]
                move_average(list(self.target.parameters()), online, self.momentum)
            _, target = self.target(x)
        h, z = super().forward(x)
        return h, torch.cat([self.predictor(z), target], dim=2)


@torch.no_grad()
def move_average(averages: Sequence[Tensor], values: Sequence[Tensor], keep: float) -> None:
    """Moves averages in place: `keep` of each, and `1 - keep` of its new value."""
    torch._foreach_lerp_(list(averages), list(values), 1.0 - keep)


def build_model(config: Config, pretrained: bool | None = None) -> BagModel:
    """The model of a configuration, its weights drawn from `config.seed` alone.

    Args:
        config: A run's configuration.
        pretrained: Overrides `config.encoder.pretrained`.

    Raises:
        ValueError: For an unknown name, a missing package or settings that do not go together.
    """
    torch.manual_seed(config.seed)
    encoder, head = config.encoder, config.head
    try:
        backbone: Any = build_encoder(
            encoder.name,
            patch_size(config),
            encoder.width or None,
            encoder.pretrained if pretrained is None else pretrained,
            encoder.options,
        )
    except TypeError as error:
        raise ValueError(f"--encoder.options {encoder.options}: {error}") from error
    # A projector reads the part of the embedding that is trained, EMP-SSL's head all of it.
    dim = backbone.head_dim if head.name == "projector" else backbone.feature_dim
    heads: dict[str, type[Projector] | type[EMPHead]] = {"projector": Projector, "emp": EMPHead}
    if head.name not in heads:
        raise ValueError(f"head.name is {head.name!r}, expected one of {', '.join(heads)}")
    options = dict(head.options)
    if head.name == "projector":
        options["num_layers"] = head.num_layers
    else:
        options.setdefault("projector", head.hidden)
    check_options(f"head {head.name}", head.options, heads[head.name], OWN_OPTIONS)
    try:
        module = heads[head.name](dim, hidden=head.hidden, out=head.out, **options)
    except TypeError as error:
        raise ValueError(f"--head.options {head.options}: {error}") from error
    stride = config.bag.stride if config.bag.dense else None
    if head.momentum > 0:
        return MomentumModel(backbone, module, config.bag.dense, stride, head.momentum)
    return BagModel(backbone, module, config.bag.dense, stride)
