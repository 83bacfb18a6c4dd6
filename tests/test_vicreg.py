"""vicreg: each convention against the formula of its codebase, properties, bad input."""

import pytest
import torch
import torch.nn.functional as F
from tolerances import assert_matches
from torch import Tensor

from bagssl_fast import ops
from bagssl_fast.ops.reference.vicreg import CONVENTIONS
from bagssl_fast.ops.reference.vicreg import vicreg as reference

IMPLS = ("reference", "cpu")


def bag(num_slots: int, batch: int, dim: int, seed: int = 0, dtype=torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(num_slots, batch, dim, generator=generator, dtype=torch.float64)
    # Correlated features, unequal scales around gamma, a mean.
    mix = torch.randn(dim, dim, generator=generator, dtype=torch.float64) / dim**0.5
    return (0.7 * z @ mix + 0.3).to(dtype)


def off_diagonal(c: Tensor) -> Tensor:
    return c - torch.diag(torch.diag(c))


def std_term(z: Tensor) -> Tensor:
    return torch.relu(1 - torch.sqrt(z.var(dim=0) + 1e-4)).mean()


def cov_term(z: Tensor) -> Tensor:
    z = z - z.mean(dim=0)
    cov = z.T @ z / (len(z) - 1)
    return off_diagonal(cov).pow(2).sum() / z.shape[1]


def authors_loss(a: Tensor, b: Tensor) -> Tensor:
    """main_vicreg.py of the authors: the variance term is halved, the covariance term is not."""
    std = std_term(a) / 2 + std_term(b) / 2
    return 25 * F.mse_loss(a, b) + 25 * std + cov_term(a) + cov_term(b)


def paper_loss(a: Tensor, b: Tensor) -> Tensor:
    """Equation 6 of the paper: nothing is halved, squared distances are summed over features."""
    distance = (a - b).square().sum(dim=1).mean()
    return 25 * distance + 25 * (std_term(a) + std_term(b)) + cov_term(a) + cov_term(b)


def solo_learn_loss(a: Tensor, b: Tensor) -> Tensor:
    return 25 * F.mse_loss(a, b) + 25 * (std_term(a) + std_term(b)) + cov_term(a) + cov_term(b)


def vicregl_loss(a: Tensor, b: Tensor) -> Tensor:
    std = std_term(a) / 2 + std_term(b) / 2
    return 25 * F.mse_loss(a, b) + 25 * std + cov_term(a) / 2 + cov_term(b) / 2


FORMULAS = {
    "official": authors_loss,
    "paper": paper_loss,
    "solo_learn": solo_learn_loss,
    "vicregl": vicregl_loss,
}
# The same, frozen: weighted sums (25, 25, 1) for z = sin(1, 2, 3, ...) as [2, 5, 3].
GOLDEN = {
    "official": 54.1060617018,
    "paper": 153.1897187695,
    "solo_learn": 61.0588421832,
    "vicregl": 53.5621402382,
}


def weighted(z: Tensor, convention: str, impl: str) -> Tensor:
    invariance, variance, covariance = ops.vicreg(z, convention=convention, impl=impl)
    return 25 * invariance + 25 * variance + covariance


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", [(2, 12, 7), (2, 7, 12), (2, 2, 1)], ids=str)
@pytest.mark.parametrize("convention", CONVENTIONS)
def test_conventions_are_those_codebases(convention, shape, impl):
    z = bag(*shape).requires_grad_()
    expected = FORMULAS[convention](z[0], z[1])
    (dz_expected,) = torch.autograd.grad(expected, z)
    actual = weighted(z, convention, impl)
    (dz,) = torch.autograd.grad(actual, z)
    assert_matches(actual, expected, torch.float64, "loss")
    assert_matches(dz, dz_expected, torch.float64, "dz")


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_conventions_are_pinned(convention):
    z = torch.arange(1, 31, dtype=torch.float64).sin().reshape(2, 5, 3)
    assert weighted(z, convention, "reference").item() == pytest.approx(
        GOLDEN[convention], abs=1e-9
    )


@pytest.mark.parametrize("impl", IMPLS)
def test_official_is_lightly(impl):
    lightly = pytest.importorskip("lightly.loss")
    z = bag(2, 16, 10, dtype=torch.float32).requires_grad_()
    expected = lightly.VICRegLoss()(z[0], z[1])
    (dz_expected,) = torch.autograd.grad(expected, z)
    actual = weighted(z, "official", impl)
    (dz,) = torch.autograd.grad(actual, z)
    # Two float32 results: either may be off by its rounding.
    assert_matches(actual, expected, torch.float32, "loss", slack=2)
    assert_matches(dz, dz_expected, torch.float32, "dz", slack=2)


def test_terms_are_means_over_slots_and_pairs():
    z = bag(4, 9, 6)
    pairs = [(p, q) for p in range(4) for q in range(p)]
    invariance, variance, covariance = ops.vicreg(z, impl="reference")
    assert_matches(
        invariance, torch.stack([F.mse_loss(z[p], z[q]) for p, q in pairs]).mean(), z.dtype, "inv"
    )
    assert_matches(variance, torch.stack([std_term(s) for s in z]).mean(), z.dtype, "var")
    assert_matches(covariance, 2 * torch.stack([cov_term(s) for s in z]).mean(), z.dtype, "cov")


def test_gradcheck_of_the_reference():
    z = bag(3, 5, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: reference(z, gamma=0.9, eps=1e-3), z)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", [(3, 8, 5), (3, 5, 8)], ids=str)
def test_collapsed_features_have_finite_gradients(shape, impl):
    z = bag(*shape, dtype=torch.float32)
    z[:, :, 1] = 0.25  # constant: variance exactly 0
    z[1] = 0.0  # a whole slot collapsed
    expected = z.double().requires_grad_()
    sum(reference(expected)).backward()
    z.requires_grad_()
    sum(ops.vicreg(z, impl=impl)).backward()
    assert_matches(z.grad, expected.grad, torch.float32, "dz")


@pytest.mark.parametrize("impl", IMPLS)
def test_half_precision_grams_do_not_overflow(impl):
    # (B - 1) C reaches 64 * 40^2 > 65504, the largest float16.
    z = (40 * bag(2, 64, 8)).half().requires_grad_()
    terms = ops.vicreg(z, impl=impl)
    for actual, expected in zip(terms, reference(z.detach().double()), strict=True):
        assert actual.dtype == torch.float32
        assert_matches(actual, expected, torch.float32, "term")


@pytest.mark.parametrize("impl", IMPLS)
def test_statistics_stay_float32_under_autocast(impl):
    z = bag(2, 8, 12, dtype=torch.float32).requires_grad_()
    plain = ops.vicreg(z, impl=impl)
    (dz_plain,) = torch.autograd.grad(sum(plain), z)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        terms = ops.vicreg(z, impl=impl)
    (dz,) = torch.autograd.grad(sum(terms), z)
    assert all(torch.equal(a, b) for a, b in zip(terms, plain, strict=True))
    assert torch.equal(dz, dz_plain)


@pytest.mark.parametrize("impl", IMPLS)
def test_equal_slots_have_no_invariance_term(impl):
    z = bag(1, 8, 5, dtype=torch.float32).expand(4, -1, -1)
    invariance, _, _ = ops.vicreg(z, impl=impl)
    assert invariance.item() == 0.0


@pytest.mark.parametrize("impl", IMPLS)
def test_non_finite_input_reaches_the_terms(impl):
    z = bag(2, 8, 5, dtype=torch.float32)
    z[0, 3, 2] = torch.nan
    assert not any(term.isfinite() for term in ops.vicreg(z, impl=impl))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("z", "options", "message"),
    [
        (torch.zeros(4, 5), {}, r"z is \[4, 5\], expected \[P, B, D\]"),
        (torch.zeros(2, 4, 5, dtype=torch.int64), {}, "torch.int64, supported are float64"),
        (torch.zeros(1, 4, 5), {}, "1 slots .* pairs need at least 2"),
        (torch.zeros(0, 4, 5), {}, "0 slots"),
        (torch.zeros(2, 1, 5), {}, r"need B >= 2 .*drop_last"),
        (torch.zeros(2, 0, 5), {}, "need B >= 2"),
        (torch.zeros(2, 4, 0), {}, "D >= 1"),
        (torch.zeros(2, 4, 5), {"convention": "lightly"}, "'lightly'; expected one of official"),
        (torch.zeros(2, 4, 5), {"eps": 0.0}, "eps is 0.0"),
        ([1.0], {}, "z is a list, expected a tensor"),
    ],
)
def test_bad_input_is_named(z, options, message, impl):
    with pytest.raises(ValueError, match=f"vicreg: .*{message}"):
        ops.vicreg(z, impl=impl, **options)
