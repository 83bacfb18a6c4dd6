"""SIGReg: its statistic against closed forms, the loss against the reference, directions, errors.

What all losses share (types, repeatability, two ranks, refused bags) is in test_losses.py.
"""

import math

import pytest
import torch
from tolerances import assert_matches
from torch import Tensor

from bagssl_fast.losses import SIGReg
from bagssl_fast.losses import _sketch as sketch
from bagssl_fast.ops.reference.sigreg import epps_pulley, sigreg

# E[T] of N(0, 1) rows and T / N of rows at 0, both over all t: the mean of (1 - exp(-t^2)) and the
# integral of (1 - exp(-t^2/2))^2, weighted by exp(-t^2/2).
GAUSSIAN = math.sqrt(2 * math.pi) * (1 - 1 / math.sqrt(3))
COLLAPSED = math.sqrt(2 * math.pi) * (1 - math.sqrt(2) + 1 / math.sqrt(3))


def bag(*shape: int, seed: int = 0, dtype=torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def closed_form(x: Tensor) -> Tensor:
    """The statistic with its integral over all t done by hand (Baringhaus, Epps, Henze, Pulley)."""
    pairs = torch.exp(-(x[:, None] - x[None]).square() / 2).mean()
    singles = torch.exp(-x.square() / 4).mean()
    total = pairs - math.sqrt(2) * singles + 1 / math.sqrt(3)
    return len(x) * math.sqrt(2 * math.pi) * total


@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_reference_is_the_integral(shift):
    x = bag(40) + shift
    assert epps_pulley(x).item() == pytest.approx(closed_form(x).item(), rel=1e-4)
    finer = epps_pulley(x, t_max=9, num_points=401)
    assert finer.item() == pytest.approx(closed_form(x).item(), rel=1e-12)


@pytest.mark.parametrize("grid", [(5.0, 17), (3.0, 33), (1.0, 3)], ids=str)
@pytest.mark.parametrize("shape", [(2, 7, 5), (3, 300, 130)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_loss_is_the_reference(dtype, shape, grid):
    t_max, num_points = grid
    loss = SIGReg(0.3, num_directions=11, t_max=t_max, num_points=num_points)
    z = (1.5 * bag(*shape) + 0.2).to(dtype).requires_grad_()
    directions = loss.directions(z)
    value, terms = loss(z)
    (dz,) = torch.autograd.grad(value, z)

    z64 = z.detach().double().requires_grad_()
    invariance, statistic = sigreg(z64, directions, t_max=t_max, num_points=num_points)
    expected = 0.7 * invariance + 0.3 * statistic
    (dz64,) = torch.autograd.grad(expected, z64)
    # In float32 a phase of up to t_max |x| radians is rounded before its sine is taken.
    slack = 4 if dtype == torch.float32 else 1
    assert_matches(terms["invariance"], invariance, dtype, "invariance")
    assert_matches(terms["sigreg"], statistic, dtype, "sigreg", slack)
    assert_matches(value, expected, dtype, "loss", slack)
    assert_matches(dz, dz64, dtype, "dz", slack)


def test_pieces_do_not_change_the_result(monkeypatch):
    x = bag(5, 9, 4).requires_grad_()
    results = []
    for piece in (1, 2 * 9 * 4, 1 << 20):
        monkeypatch.setattr(sketch, "PIECE", piece)
        ecf = sketch.characteristic(x, 0.625, 8)
        results.append((ecf, *torch.autograd.grad(ecf.square().sum(), x)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_gradients_of_the_reference_and_of_the_fast_form():
    z = bag(2, 4, 3).requires_grad_()
    directions = sketch.unit_directions(3, 2, seed=1, dtype=z.dtype, device=z.device)
    assert torch.autograd.gradcheck(lambda z: sigreg(z, directions, num_points=5), z)
    loss = SIGReg(num_directions=3).eval()  # the same directions at every call
    assert torch.autograd.gradcheck(lambda z: loss(z)[0], z)


def test_gaussian_rows_are_close_and_others_far():
    loss = SIGReg(1.0, num_directions=128).eval()
    size = 512

    def statistic(z: Tensor) -> float:
        return loss(z)[1]["sigreg"].item()

    gaussian = bag(2, size, 24, dtype=torch.float32)
    assert statistic(gaussian) == pytest.approx(GAUSSIAN, rel=0.15)
    assert statistic(torch.zeros(2, size, 24)) == pytest.approx(COLLAPSED * size, rel=1e-3)
    assert statistic(2 * gaussian) > 20 * GAUSSIAN  # a wrong scale
    assert statistic(gaussian + 0.5) > 20 * GAUSSIAN  # a wrong mean
    halved = gaussian * torch.tensor([1.0, 0.0]).repeat(12)
    assert statistic(halved) > 5 * GAUSSIAN  # a lost half of the dimensions
    signs = gaussian[..., :1].sign().expand(-1, -1, 24)
    assert statistic(signs) > 20 * GAUSSIAN


def test_descent_makes_gaussians_of_what_had_collapsed():
    z = (0.01 * bag(2, 64, 8)).requires_grad_()
    loss = SIGReg(1.0, num_directions=32)
    optimizer = torch.optim.SGD([z], lr=2.0)
    before = loss(z)[0].item()
    for _ in range(60):
        optimizer.zero_grad()
        loss(z)[0].backward()
        optimizer.step()
    assert loss(z)[0].item() < 0.05 * before
    assert z.detach().var().item() == pytest.approx(1, abs=0.2)


def test_patches_pulled_to_their_centroid_lower_the_loss():
    z = bag(4, 16, 8)
    closer = (z + z.mean(dim=0)) / 2
    assert SIGReg(0)(closer)[0] == pytest.approx(SIGReg(0)(z)[0].item() / 4)


def test_the_statistic_is_lightlys():
    """lightly halves the range, [0, t_max], and doubles: its 17 knots are 33 points here."""
    lightly = pytest.importorskip("lightly.loss.lejepa_loss")
    z = bag(3, 16, 8, dtype=torch.float32)
    ours = SIGReg(t_max=3.0, num_points=33)
    theirs = lightly.SIGReg(knots=17, t_max=3.0)
    theirs._generate_unit_vectors = lambda *_: ours.directions(z)
    expected = theirs(z)
    assert_matches(ours(z)[1]["sigreg"], expected, z.dtype, "sigreg", 4)  # two roundings


def test_directions_are_new_each_step_and_the_same_after_a_restart():
    z = bag(2, 8, 6, dtype=torch.float32)
    first, other = SIGReg(), SIGReg(seed=1)
    assert not torch.equal(first.directions(z), other.directions(z))
    values = [first(z)[0].item() for _ in range(4)]
    assert len(set(values)) == 4

    again = SIGReg()
    again(z)
    state = again.state_dict()
    resumed = SIGReg()
    resumed.load_state_dict(state)
    assert [resumed(z)[0].item() for _ in range(3)] == values[1:]
    assert resumed.eval()(z)[0] == resumed(z)[0]  # looking does not count as a step


def test_directions_have_norm_one():
    z = torch.zeros(2, 2, 7)
    directions = SIGReg(num_directions=9).directions(z)
    assert directions.shape == (7, 9)
    assert torch.allclose(directions.norm(dim=0), torch.ones(9))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lambda_sigreg": 1.5}, r"lambda_sigreg is 1.5, expected in \[0, 1\]"),
        ({"num_directions": 0}, "num_directions is 0, expected at least 1"),
        ({"num_points": 16}, "num_points is 16, expected an odd number"),
        ({"num_points": 1}, "num_points is 1"),
        ({"t_max": 0.0}, "t_max is 0.0, expected > 0"),
        ({"t_max": math.inf}, "t_max is inf"),
    ],
    ids=str,
)
def test_options_that_mean_nothing_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SIGReg(**options)
