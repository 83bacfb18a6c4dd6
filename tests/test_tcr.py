"""tcr: EMP-SSL's formula, its sign and bounds, conditioning, bad input."""

import math

import pytest
import torch
import torch.nn.functional as F
from tolerances import assert_matches
from torch import Tensor

from bagssl_fast import ops
from bagssl_fast.ops.reference.tcr import tcr as reference

IMPLS = ("reference", "cpu")


def rows(num_slots: int, batch: int, dim: int, dtype=torch.float64, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(num_slots, batch, dim, generator=generator, dtype=torch.float64)
    return (scale * F.normalize(z, dim=2)).to(dtype)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", [(3, 6, 9), (3, 9, 6), (1, 1, 4)], ids=str)
def test_rate_is_emp_ssls(shape, impl):
    z = rows(*shape)
    _, batch, dim = shape
    for slot, rate in zip(z, ops.tcr(z, eps=0.3, impl=impl), strict=True):
        matrix = torch.eye(dim, dtype=z.dtype) + dim / (batch * 0.3) * slot.T @ slot
        assert_matches(rate, 0.5 * torch.logdet(matrix), z.dtype, "rate")


@pytest.mark.parametrize("impl", IMPLS)
def test_rate_is_pinned(impl):
    # Two orthogonal unit rows of D = 2: 1/2 log (1 + 2 / (2 * 0.2))^2 = log 6.
    rate = ops.tcr(torch.eye(2)[None], eps=0.2, impl=impl)
    assert rate.item() == pytest.approx(math.log(6), rel=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_bounds_of_emp_ssls_setting(impl):
    """B = 100, D = 1024, eps = 0.2: 197.75 for orthogonal rows, 4.27 for one row 100 times."""
    spread = torch.eye(1024)[:100][None]
    collapsed = rows(1, 1, 1024, torch.float32).expand(1, 100, -1)
    assert ops.tcr(spread, impl=impl).item() == pytest.approx(50 * math.log1p(51.2), rel=1e-5)
    assert ops.tcr(spread, impl=impl).item() == pytest.approx(197.75, abs=0.01)
    assert ops.tcr(collapsed, impl=impl).item() == pytest.approx(4.27, abs=0.01)


@pytest.mark.parametrize("impl", IMPLS)
def test_spreading_rows_raises_the_rate(impl):
    """The sign: moving rows away from their mean raises the rate, in value and in gradient."""
    base = rows(2, 10, 16)
    amount = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    mean = base.mean(dim=1, keepdim=True)
    rates = ops.tcr(F.normalize(mean + amount * (base - mean), dim=2), impl=impl)
    (slope,) = torch.autograd.grad(rates.sum(), amount)
    wider = ops.tcr(F.normalize(mean + 0.6 * (base - mean), dim=2), impl=impl)
    assert slope > 0
    assert (wider > rates).all()


def test_gradcheck_of_the_reference():
    for shape in [(2, 3, 5), (2, 5, 3)]:
        assert torch.autograd.gradcheck(reference, rows(*shape).requires_grad_())


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_collapsed_rows_keep_their_digits(scale):
    """Rows equal to 1%: the Gram's condition reaches 10^10, beyond float32 (as EMP-SSL's code)."""
    z = rows(2, 1, 24, scale=scale).expand(2, 12, -1) + rows(2, 12, 24, scale=scale * 1e-2)
    z = z.float().requires_grad_()
    expected = z.detach().double().requires_grad_()
    reference(expected).sum().backward()
    rate = ops.tcr(z, impl="cpu")
    rate.sum().backward()
    assert_matches(rate, reference(expected), torch.float32, "rate")
    # Rows nearly cancel in the gradient, so the float32 rounding of z shows: 10 times as wide.
    assert_matches(z.grad, expected.grad, torch.float32, "dz", slack=10)


@pytest.mark.parametrize("impl", IMPLS)
def test_statistics_stay_float32_under_autocast(impl):
    z = rows(2, 8, 12, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rate = ops.tcr(z, impl=impl)
    assert torch.equal(rate, ops.tcr(z, impl=impl))


@pytest.mark.parametrize("impl", IMPLS)
def test_a_non_finite_slot_spoils_only_its_own_rate(impl):
    z = rows(3, 6, 9, torch.float32)
    z[1, 2, 3] = torch.inf
    assert ops.tcr(z, impl=impl).isfinite().tolist() == [True, False, True]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("z", "options", "message"),
    [
        (torch.zeros(4, 5), {}, r"z is \[4, 5\], expected \[P, B, D\]"),
        (torch.zeros(2, 4, 5, dtype=torch.int32), {}, "torch.int32, supported are float64"),
        (torch.zeros(0, 4, 5), {}, "at least one slot"),
        (torch.zeros(2, 0, 5), {}, "at least one slot, image"),
        (torch.zeros(2, 4, 0), {}, "and feature"),
        (torch.zeros(2, 4, 5), {"eps": 0}, "eps is 0"),
    ],
)
def test_bad_input_is_named(z, options, message, impl):
    with pytest.raises(ValueError, match=f"tcr: .*{message}"):
        ops.tcr(z, impl=impl, **options)
