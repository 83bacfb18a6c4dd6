"""BYOL: the loss against its formula, targets that follow, and a training that resumes bitwise."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bagssl_fast.config import Config, HeadConfig, LossConfig, check
from bagssl_fast.losses import BYOL
from bagssl_fast.models.bag_model import MomentumModel, build_model


def bag(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


CONFIG = Config(
    seed=3,
    head=HeadConfig(hidden=8, out=6, num_layers=2, momentum=0.75),
    loss=LossConfig(name="byol"),
)


def small(config: Config = CONFIG) -> MomentumModel:
    encoder = replace(config.encoder, patch_size=16, width=4, options={"stem": 8})
    model = build_model(replace(config, encoder=encoder))
    assert isinstance(model, MomentumModel)
    return model


def test_loss_is_the_mean_over_pairs_of_different_slots() -> None:
    z = bag(3, 5, 8)
    prediction, target = z.chunk(2, dim=2)
    pairs = [
        2 - 2 * F.cosine_similarity(prediction[p], target[q], dim=1).mean()
        for p in range(3)
        for q in range(3)
        if p != q
    ]
    loss, terms = BYOL()(z)
    torch.testing.assert_close(loss, torch.stack(pairs).mean())
    torch.testing.assert_close(loss, 2 - 2 * terms["agreement"])


def test_two_slots_are_lightlys_symmetric_loss() -> None:
    lightly = pytest.importorskip("lightly.loss")
    criterion = lightly.NegativeCosineSimilarity()
    z = bag(2, 5, 8)
    (p0, t0), (p1, t1) = (half.chunk(2, dim=1) for half in z)
    expected = 0.5 * (criterion(p0, t1) + criterion(p1, t0))
    torch.testing.assert_close(BYOL()(z)[0], 2 + 2 * expected)


def test_targets_carry_no_gradient() -> None:
    z = bag(2, 5, 8).requires_grad_()
    BYOL()(z)[0].backward()
    assert z.grad is not None
    assert z.grad[..., :4].abs().sum() > 0
    assert z.grad[..., 4:].abs().sum() == 0
    model = small().train()
    BYOL()(model(torch.randn(2, 4, 3, 16, 16))[1])[0].backward()
    assert all(p.grad is None for p in model.target.parameters())
    assert all(p.grad is not None for p in model.predictor.parameters())


def test_target_follows_the_trained_network_by_its_momentum() -> None:
    model = small().train()
    x = torch.randn(2, 4, 3, 16, 16)
    old = model.backbone.layers[0].weight.detach().clone()
    model(x)
    assert torch.equal(model.target.backbone.layers[0].weight, old)  # nothing moved yet
    with torch.no_grad():
        model.backbone.layers[0].weight.add_(1.0)
    model(x)
    torch.testing.assert_close(model.target.backbone.layers[0].weight, old + 0.25)
    model.eval()(x)
    torch.testing.assert_close(model.target.backbone.layers[0].weight, old + 0.25)


def test_evaluation_sees_backbone_and_head_alone() -> None:
    model, plain = small().eval(), build_model(replace(CONFIG, encoder=small_encoder())).eval()
    x = torch.randn(2, 4, 3, 16, 16)
    assert model(x)[1].shape == (2, 4, 12)
    assert model.project(model.embed(x[0])).shape == (4, 6)
    assert model.embedding_dim == plain.embedding_dim


def small_encoder():
    return replace(CONFIG.encoder, patch_size=16, width=4, options={"stem": 8})


@pytest.mark.parametrize(
    "config",
    [
        replace(CONFIG, head=HeadConfig()),
        replace(CONFIG, loss=LossConfig(name="vicreg")),
        replace(CONFIG, head=HeadConfig(momentum=1.0)),
    ],
    ids=["no target", "target of another loss", "target that never moves"],
)
def test_loss_and_momentum_go_together(config: Config) -> None:
    with pytest.raises(ValueError, match=r"head\.momentum"):
        check(config)


def test_odd_features_are_refused() -> None:
    with pytest.raises(ValueError, match="side by side"):
        BYOL()(torch.zeros(2, 4, 3))
