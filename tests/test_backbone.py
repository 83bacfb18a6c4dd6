"""A backbone of one's own: taken everywhere, or refused everywhere with one sentence."""

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from bagssl_fast.augment import Augment
from bagssl_fast.config import BagConfig, Config, EncoderConfig
from bagssl_fast.data import open_source
from bagssl_fast.evaluation.features import CENTER, Plan, embed_patches, extract
from bagssl_fast.inference.bag_encoder import BagEncoder
from bagssl_fast.inference.export import backbone_state, host, write
from bagssl_fast.inference.graph import to_program
from bagssl_fast.losses import VICReg
from bagssl_fast.models.backbone import DenseMaps, Window, WindowMaps
from bagssl_fast.models.bag_model import BagModel, MomentumModel
from bagssl_fast.models.encoders import build_encoder
from bagssl_fast.models.heads import EMPHead, Projector

PATCH, STRIDE = 8, 4


class TinyViT(nn.Module):
    """Attention between the four quarters of a patch; the mean color goes before the embedding."""

    patch_size, feature_dim, head_dim = PATCH, 3 + 12, 12

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Conv2d(3, 12, 4, 4)
        self.place = nn.Parameter(torch.randn(4, 12))  # within the patch
        self.attention = nn.TransformerEncoderLayer(12, 2, 24, dropout=0.0, batch_first=True)

    def forward(self, patches: Tensor) -> Tensor:
        x = self.tokens(patches).flatten(2).mT + self.place
        return torch.cat([patches.detach().mean((2, 3)), self.attention(x).mean(1)], 1)


class DenseTinyViT(TinyViT):
    """The same, encoding the patches of whole images."""

    def dense_maps(self, images: Tensor, stride: int | None = None) -> DenseMaps:
        stride = stride or PATCH
        cut = images.unfold(2, PATCH, stride).unfold(3, PATCH, stride).permute(0, 2, 3, 1, 4, 5)
        h = self(cut.flatten(0, 2)).unflatten(0, cut.shape[:3])  # [N, rows, columns, F]
        return WindowMaps([h], [Window()])


class MeanColor(nn.Module):
    """The example of the documentation."""

    patch_size, feature_dim, head_dim = PATCH, 3, 3

    def forward(self, patches: Tensor) -> Tensor:
        return patches.mean((2, 3))

    def dense_maps(self, images: Tensor, stride: int | None = None) -> DenseMaps:
        x = F.avg_pool2d(images, self.patch_size, stride or self.patch_size)
        return WindowMaps([x.permute(0, 2, 3, 1)], [Window()])


CONFIG = Config(
    bag=BagConfig(patches=2, dense=True, stride=STRIDE),
    augment=Augment(size=16, scale=(0.5, 1.0), mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4)),
    encoder=EncoderConfig(patch_size=PATCH),
)


def model_of(backbone: Any, dense: bool = True) -> BagModel:
    torch.manual_seed(0)
    head = Projector(backbone.head_dim, hidden=16, out=10, num_layers=2)
    return BagModel(backbone, head, dense, STRIDE if dense else None)


def photos(count: int, height: int, width: int) -> np.ndarray:
    rng = np.random.default_rng(height)
    return rng.integers(0, 256, (count, height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("kind", [DenseTinyViT, MeanColor])
@pytest.mark.parametrize("head", ["projector", "emp"])
def test_own_dense_backbone_trains_on_whole_views(kind: Any, head: str) -> None:
    """Patch by patch and in one pass: same embeddings, projections, loss and gradients."""
    results = []
    views = torch.randn(2, 4, 3, 16, 16)
    places = range(0, 16 - PATCH + 1, STRIDE)
    cut = [views[:, :, :, i : i + PATCH, j : j + PATCH] for i in places for j in places]
    patches = torch.stack(cut, 1).flatten(0, 1)  # positions of view 0 first
    for dense, bags in ((True, views), (False, patches)):
        torch.manual_seed(0)
        backbone = kind()
        own: Any = EMPHead(kind.feature_dim, 16, 12, 10)
        model = model_of(backbone, dense)
        model = model if head == "projector" else BagModel(backbone, own, dense, STRIDE)
        h, z = model(bags)
        loss, _ = VICReg()(z)
        loss.backward()
        assert h.shape == (18, 4, model.embedding_dim) and z.shape == (18, 4, 10)
        results.append((h, z, loss, [p.grad for p in model.parameters()]))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_own_dense_backbone_trains_with_targets() -> None:
    head = Projector(DenseTinyViT.head_dim, hidden=16, out=10, num_layers=2)
    h, z = MomentumModel(DenseTinyViT(), head, dense=True, stride=8)(torch.randn(2, 4, 3, 16, 16))
    assert h.shape == (8, 4, 15) and z.shape == (8, 4, 20)


@pytest.mark.parametrize("layers", [("h",), ("h", "z")], ids=["h", "h and z"])
@pytest.mark.parametrize("kind", [DenseTinyViT, MeanColor])
def test_own_dense_backbone_is_evaluated_in_one_pass(kind: Any, layers: tuple[str, ...]) -> None:
    """The bag is the mean over the single patches, which are cut from the whole image."""
    model = model_of(kind()).eval()
    source = open_source(photos(5, 16, 16))
    plan = Plan((CENTER, 1, 4), 4 if "z" in layers else -1, 3, torch.device("cpu"))
    features, _ = extract(model, CONFIG, source, plan)
    assert set(features) == {(layer, n) for n in (CENTER, 1, 4) for layer in layers}
    x = (torch.from_numpy(photos(5, 16, 16)).permute(0, 3, 1, 2) / 255).float()
    x = (x - torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1)) / torch.tensor([0.2, 0.3, 0.4]).view(
        3, 1, 1
    )
    with torch.no_grad():
        corners = [model.embed(x[:, :, i : i + 8, j : j + 8]) for i in (0, 8) for j in (0, 8)]
        want = torch.stack(corners)
        projected = model.project(want).mean(0)
    torch.testing.assert_close(features["h", 4], want.mean(0), rtol=1e-4, atol=1e-5)
    if "z" in layers:
        torch.testing.assert_close(features["z", 4], projected, rtol=1e-4, atol=1e-5)
    single = embed_patches(model, CONFIG, source, plan, 4)
    torch.testing.assert_close(single, want, rtol=1e-4, atol=1e-5)


def test_own_dense_backbone_in_bag_encoder_and_export(tmp_path: Any) -> None:
    model = model_of(DenseTinyViT()).eval()
    images = photos(3, 16, 16)
    plan = Plan((9,), -1, 3, torch.device("cpu"))
    want, _ = extract(model, CONFIG, open_source(images), plan)
    encoder = BagEncoder(model, CONFIG, patches=9, device="cpu")
    torch.testing.assert_close(encoder(images), want["h", 9], rtol=1e-5, atol=1e-6)
    program = to_program(encoder).module()
    torch.testing.assert_close(
        program(torch.from_numpy(images)), want["h", 9], rtol=1e-4, atol=1e-5
    )
    assert host(model).endswith("DenseTinyViT")
    assert backbone_state(model).keys() == model.backbone.state_dict().keys()
    write(tmp_path, model, CONFIG, step=3)
    assert load_file(tmp_path / "backbone.safetensors").keys() == backbone_state(model).keys()


def test_own_backbone_of_single_patches_is_refused_where_whole_images_are_asked_for() -> None:
    """One sentence, wherever it is asked for; the same backbone works patch by patch."""
    one_by_one = model_of(TinyViT(), dense=False)
    images = torch.randn(4, 3, 16, 16)
    asked: list[Any] = [
        lambda: model_of(TinyViT()),
        lambda: MomentumModel(TinyViT(), one_by_one.head, dense=True),
        lambda: one_by_one.embed_dense(images),
    ]
    sentences = set()
    for ask in asked:
        with pytest.raises(ValueError, match=r"TinyViT cannot encode whole images.*bag\.dense"):
            ask()
        try:
            ask()
        except ValueError as error:
            sentences.add(str(error))
    assert len(sentences) == 1

    plain = replace(CONFIG, bag=BagConfig(2), augment=replace(CONFIG.augment, size=PATCH))
    source = open_source(photos(5, 16, 16))
    plan = Plan((4,), -1, 3, torch.device("cpu"))
    want, _ = extract(one_by_one.eval(), plain, source, plan)
    encoder = BagEncoder(one_by_one, plain, patches=4, device="cpu")
    torch.testing.assert_close(encoder(photos(5, 16, 16)), want["h", 4], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["resnet18"])
def test_a_named_encoder_is_refused_by_the_same_sentence(name: str) -> None:
    pytest.importorskip("torchvision", reason="torchvision is not installed")
    backbone = build_encoder(name, 32)
    with pytest.raises(ValueError, match=r"cannot encode whole images.*bag\.dense"):
        BagModel(backbone, Projector(512, 8), dense=True)


def test_what_is_no_backbone_says_what_is_missing() -> None:
    class Half(nn.Module):
        patch_size, feature_dim = 8, 0

    with pytest.raises(ValueError, match=re.escape("(feature_dim 0, head_dim missing)")):
        BagModel(Half(), Projector(8, 8))


def test_a_head_reads_the_last_entries() -> None:
    """What goes before them (a hypercolumn) is for evaluation alone."""
    model = model_of(DenseTinyViT()).eval()
    h = torch.randn(5, 15)
    torch.testing.assert_close(model.project(h), model.head(h[:, 3:]))
    assert model.embedding_dim == 15
