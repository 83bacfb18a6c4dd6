"""bag_pool: EMP-SSL's formula, the degenerate bags, bad input."""

import pytest
import torch
import torch.nn.functional as F
from tolerances import assert_matches
from torch import Tensor

from bagssl_fast import ops
from bagssl_fast.ops.reference.bag_pool import bag_pool as reference

IMPLS = ("reference", "cpu")


def bag(*shape: int, dtype=torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) + 0.2).to(dtype)


@pytest.mark.parametrize("impl", IMPLS)
def test_results_are_the_formulas(impl):
    x = bag(4, 5, 6)
    pooled = ops.bag_pool(x, deviation=True, cosine=True, impl=impl)
    mean = sum(x[p] for p in range(4)) / 4
    cosine = sum(F.cosine_similarity(x[p], mean, dim=1) for p in range(4)) / 4
    deviation = sum((x[p] - mean).square().mean(dim=1) for p in range(4)) / 4
    assert_matches(pooled.mean, mean, x.dtype, "mean")
    assert_matches(pooled.cosine, cosine, x.dtype, "cosine")
    assert_matches(pooled.deviation, deviation, x.dtype, "deviation")
    normalized = ops.bag_pool(x, normalize=True, deviation=True, cosine=True, impl=impl)
    assert_matches(normalized.mean, F.normalize(mean, dim=1), x.dtype, "normalized mean")
    assert torch.equal(normalized.cosine, pooled.cosine)
    assert torch.equal(normalized.deviation, pooled.deviation)


@pytest.mark.parametrize("impl", IMPLS)
def test_what_was_not_asked_for_is_none(impl):
    pooled = ops.bag_pool(bag(2, 3, 4), impl=impl)
    assert pooled.deviation is None
    assert pooled.cosine is None


@pytest.mark.parametrize("impl", IMPLS)
def test_deviation_is_the_mean_squared_distance_of_pairs(impl):
    """(1/P^2) sum_pq |x_p - x_q|^2 = 2/P sum_p |x_p - mean|^2, per feature."""
    x = bag(3, 4, 5)
    pairs = (x[:, None] - x[None]).square().mean(dim=(0, 1, 3))
    assert_matches(2 * ops.bag_pool(x, deviation=True, impl=impl).deviation, pairs, x.dtype, "dev")


@pytest.mark.parametrize("impl", IMPLS)
def test_one_patch_agrees_with_itself(impl):
    x = bag(1, 3, 4)
    pooled = ops.bag_pool(x, deviation=True, cosine=True, impl=impl)
    assert torch.equal(pooled.mean, x[0])
    assert_matches(pooled.cosine, torch.ones(3), x.dtype, "cosine")
    assert torch.equal(pooled.deviation, torch.zeros(3, dtype=x.dtype))


@pytest.mark.parametrize("options", [{}, {"normalize": True}, {"cosine": True}], ids=str)
def test_zero_vectors_have_the_references_gradients(options):
    x = bag(4, 3, 5)
    x[2, 1] = 0  # a zero patch
    x[:, 2] = 0  # a zero bag
    grads = []
    for impl in IMPLS:
        leaf = x.clone().requires_grad_()
        pooled = ops.bag_pool(leaf, impl=impl, **options)
        (dx,) = torch.autograd.grad(sum(r.sin().sum() for r in pooled if r is not None), leaf)
        grads.append(dx)
    assert_matches(grads[1], grads[0], torch.float64, "dx")


def test_gradcheck_of_the_reference():
    def run(x: Tensor) -> tuple[Tensor, ...]:
        plain = reference(x, deviation=True, cosine=True)
        return (*plain, reference(x, normalize=True)[0])

    assert torch.autograd.gradcheck(run, bag(3, 2, 4).requires_grad_())


@pytest.mark.parametrize("impl", IMPLS)
def test_many_chunks_are_one_result(impl):
    """More elements per bag than are passed over at once: several passes, no seam."""
    x = bag(3, 7, 60_000, dtype=torch.float32).requires_grad_()
    pooled = ops.bag_pool(x, cosine=True, impl=impl)
    (dx,) = torch.autograd.grad(pooled.mean.sum() + pooled.cosine.sum(), x)
    for b in (0, 6):
        alone = x[:, b : b + 1].detach().requires_grad_()
        expected = ops.bag_pool(alone, cosine=True, impl=impl)
        (dx_alone,) = torch.autograd.grad(expected.mean.sum() + expected.cosine.sum(), alone)
        assert_matches(dx[:, b : b + 1], dx_alone, torch.float32, "dx")
        assert_matches(pooled.cosine[b : b + 1], expected.cosine, torch.float32, "cosine")


@pytest.mark.parametrize("impl", IMPLS)
def test_no_images_give_empty_results(impl):
    pooled = ops.bag_pool(torch.zeros(4, 0, 5), deviation=True, cosine=True, impl=impl)
    assert pooled.mean.shape == (0, 5)
    assert pooled.deviation.shape == pooled.cosine.shape == (0,)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(4, 5), r"x is \[4, 5\], expected \[P, B, D\]"),
        (torch.zeros(2, 4, 5, dtype=torch.uint8), "torch.uint8, supported are float64"),
        (torch.zeros(0, 4, 5), "at least one patch"),
        (torch.zeros(2, 4, 0), "one feature"),
    ],
)
def test_bad_input_is_named(x, message, impl):
    with pytest.raises(ValueError, match=f"bag_pool: .*{message}"):
        ops.bag_pool(x, impl=impl)
