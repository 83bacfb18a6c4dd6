"""Claim 5: the closed form, its identities, and trainings that reach it."""

import pytest
import torch

from bagssl_fast.analyze import alphabet as al
from bagssl_fast.analyze import cooccurrence as co
from bagssl_fast.analyze.models import Context
from bagssl_fast.analyze.study import Result
from bagssl_fast.config import Config
from bagssl_fast.losses import VICReg


@pytest.fixture(scope="module")
def world() -> al.World:
    return al.make_world()


def optimum(world: al.World, w: float = co.W) -> torch.Tensor:
    values, vectors = world.spectrum()
    scaled = vectors[:, : co.DIM] * (values[: co.DIM] / w).sqrt()
    return scaled / world.marginal.sqrt()[:, None]


def test_the_joint_is_a_distribution_with_its_marginals(world):
    assert world.joint.sum().item() == pytest.approx(1)
    assert torch.allclose(world.joint.sum(dim=0), world.marginal)
    values, _ = world.spectrum()
    assert values[0].item() == pytest.approx(1)  # the constant function
    assert values[al.KINDS :].abs().max() < 1e-12  # as many kinds, as much rank


def test_sampled_bags_follow_the_joint(world):
    bags = world.bags(2, 40_000, torch.Generator().manual_seed(0))
    counts = torch.zeros_like(world.joint)
    counts.index_put_((bags[0], bags[1]), torch.ones(40_000, dtype=torch.float64), accumulate=True)
    assert (counts / 40_000 - world.joint).abs().max() < 0.006  # five standard deviations


@pytest.mark.parametrize("w", [0.5, 1.0, 2.0])
def test_nothing_lies_below_the_closed_form(world, w):
    z = optimum(world, w)
    values, _ = world.spectrum()
    best = -values[: co.DIM].square().sum() / (2 * w)
    assert al.spectral_loss(world, z, w).item() == pytest.approx(best.item(), rel=1e-12)
    z.requires_grad_()
    (gradient,) = torch.autograd.grad(al.spectral_loss(world, z, w), z)
    assert gradient.abs().max() < 1e-12
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        nudge = 0.1 * torch.randn(z.shape, generator=generator, dtype=torch.float64)
        assert al.spectral_loss(world, z.detach() + nudge, w) > best


def test_the_angle_is_none_at_the_optimum_and_knows_no_rotation(world):
    z = optimum(world)
    rotation, _ = torch.linalg.qr(torch.randn(co.DIM, co.DIM, dtype=torch.float64))
    assert al.angle(world, z @ rotation) < 1e-5
    _, vectors = world.spectrum()
    other = vectors[:, 1 : co.DIM + 1] / world.marginal.sqrt()[:, None]
    assert al.angle(world, other) == pytest.approx(90)
    assert al.angle(world, other, first=1) < 1e-5
    assert al.angle(world, other + 3.0, first=1) < 1e-5  # constants are taken out


def test_the_identities_hold_to_rounding(world):
    assert max(co.identity_errors(world).values()) < 1e-12


def test_vicreg_in_expectation_is_vicreg_on_a_large_batch(world):
    z = torch.randn(al.LETTERS, co.DIM, generator=torch.Generator().manual_seed(1)).double()
    bags = world.bags(2, 200_000, torch.Generator().manual_seed(2))
    expected = VICReg(*co.HARD)(z[bags])[0]
    assert al.vicreg_loss(world, z, co.HARD).item() == pytest.approx(expected.item(), rel=0.01)


def test_spectral_on_bags_is_unbiased(world):
    difference, error = co.bias(world, 200)
    assert abs(difference) < 4 * error


def test_judgement_follows_the_numbers():
    ends = {
        "spectral, expectation": (1e-6, 0.1),
        "spectral, bags": (1e-3, 2.0),
        "VICReg, hard": (0.7, 0.3),
        co.USUAL: (0.9, 60.0),
    }
    errors = {"co-occurrence": 1e-15, "second moment": 1e-16, "covariance": 1e-16}
    verdict, text = co.judge(ends, errors, (1e-4, 1e-4), 0.3)
    assert verdict == "holds"
    assert "60 degrees away" in text
    for changed in ({"spectral, bags": (0.5, 2.0)}, {"VICReg, hard": (0.7, 40.0)}):
        verdict, text = co.judge(ends | changed, errors, (1e-4, 1e-4), 0.3)
        assert verdict == "does not hold"
        assert "does not reach" in text
    assert co.judge(ends, errors | {"covariance": 0.1}, (0.0, 1.0), 0.3)[0] == "does not hold"
    assert "is NOT unbiased" in co.judge(ends, errors, (1.0, 0.1), 0.3)[1]


def test_a_quick_study_gives_a_result(tmp_path, monkeypatch):
    monkeypatch.setattr(co, "QUICK_STEPS", 40)
    result = co.run(Context(Config(), tmp_path, quick=True))
    assert Result.from_json(result.to_json()) == result
    assert result.claim == 5
    for figure in result.figures:
        assert (tmp_path / figure.path).stat().st_size > 5000
    curve = result.numbers["curves"][0]["spectral, expectation"]
    assert curve["gap"][-1] < curve["gap"][0]
