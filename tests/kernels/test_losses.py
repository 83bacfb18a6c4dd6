"""vicreg, tcr and bag_pool in the interpreter against the float64 reference."""

from collections.abc import Callable

import pytest
import torch
from bagssl_fast.kernels import bag_pool, tcr, vicreg
from tolerances import assert_matches
from torch import Tensor

from bagssl_fast import ops
from bagssl_fast.ops.reference.bag_pool import bag_pool as bag_pool_ref
from bagssl_fast.ops.reference.tcr import tcr as tcr_ref
from bagssl_fast.ops.reference.vicreg import vicreg as vicreg_ref

DTYPES = [torch.float32, torch.float16]
# Operands of a half-precision product carry 11 bits: what comes of it is that far from the truth.
HALF = {"element": 2e-3, "vector": 1e-3}  # of the largest element; relative L2
# What amplifies the float32 rounding of the Gram: its largest eigenvalue over its smallest.
TCR_SLACK = 30
OPS: dict[str, tuple[Callable, Callable]] = {
    "vicreg": (vicreg.vicreg, vicreg_ref),
    "tcr": (tcr.tcr, tcr_ref),
    "bag_pool": (
        lambda x: bag_pool.bag_pool(x, deviation=True, cosine=True),
        lambda x: bag_pool_ref(x, deviation=True, cosine=True),
    ),
}


def normal(*shape: int, seed: int = 0, mean: float = 0.3, std: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return mean + std * torch.randn(shape, generator=generator, dtype=torch.float64)


def tensors(out: object) -> list[Tensor]:
    return [out] if isinstance(out, Tensor) else [x for x in out if x is not None]


def run(op: Callable, x: Tensor) -> dict[str, Tensor]:
    """Results and the gradient of x, for a fixed gradient of the results."""
    x = x.detach().requires_grad_()
    outs = tensors(op(x))
    loss = sum((normal(*out.shape, seed=1).to(out) * out).sum() for out in outs)
    (dx,) = torch.autograd.grad(loss, x)
    return {**{f"out{i}": out.detach() for i, out in enumerate(outs)}, "dx": dx}


def check(name: str, x: Tensor, slack: float = 1.0) -> None:
    op, reference = OPS[name]
    before = x.clone()
    actual, truth = run(op, x), run(reference, x.double())
    assert torch.equal(x, before), f"{name} wrote into its input"
    for key, expected in truth.items():
        if x.dtype == torch.float16 and name != "bag_pool":
            error = actual[key].double() - expected
            assert error.norm() <= HALF["vector"] * expected.norm() + 1e-8, f"{name} {key}"
            assert error.abs().max() <= HALF["element"] * expected.abs().max() + 1e-8, key
        else:
            wide = slack * (TCR_SLACK if name == "tcr" else 1)
            assert_matches(actual[key], expected, actual[key].dtype, f"{name} {key}", wide)
    again = run(op, x)
    assert all(torch.equal(again[key], actual[key]) for key in actual), f"{name}: not repeatable"


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("vicreg", (2, 2, 1)),
        ("vicreg", (3, 7, 31)),  # primes
        ("vicreg", (2, 65, 67)),  # a tile and one row more, B below D
        ("vicreg", (2, 129, 63)),  # two strips and one row more, D x D, a tile less one column
        ("vicreg", (2, 5, 530)),  # a split sum
        ("tcr", (1, 1, 1)),
        ("tcr", (3, 7, 31)),
        ("tcr", (2, 65, 67)),
        ("tcr", (2, 70, 63)),
        ("bag_pool", (1, 1, 1)),
        ("bag_pool", (5, 3, 127)),
        ("bag_pool", (2, 3, 257)),
        ("bag_pool", (8, 2, 1024)),
    ],
    ids=str,
)
def test_matches_the_float64_reference(name, shape, dtype):
    check(name, normal(*shape).to(dtype))


@pytest.mark.parametrize("name", OPS)
def test_values_that_autocast_rounded(name):
    """What bfloat16 projections hold: ties, equal columns, 8 bits; its own path needs a GPU."""
    check(name, normal(3, 9, 17, std=0.1).bfloat16().float())


@pytest.mark.parametrize("name", OPS)
def test_layouts_that_are_not_contiguous(name):
    check(name, normal(9, 7, 3).float().permute(2, 1, 0))
    check(name, normal(4, 14, 10).float()[::2, ::2, 1::2])
    check(name, normal(3, 14, 10).float()[:, :1].expand(3, 6, 10), slack=5)


@pytest.mark.parametrize("name", OPS)
def test_scales_and_constant_columns(name):
    check(name, normal(3, 6, 10, mean=0, std=1e-3).float())
    check(name, normal(3, 6, 10, mean=0, std=1e3).float())
    x = normal(3, 6, 10).float()
    x[..., 3] = 2.0
    check(name, x, slack=2)


def test_half_precision_gram_beyond_its_range():
    # Squares of up to 1e7 and sums of them: float16 ends at 65504, as would these gradients.
    z = normal(2, 6, 40, std=3000.0).half()
    for name in ("vicreg", "tcr"):
        op, reference = OPS[name]
        for a, e in zip(tensors(op(z)), tensors(reference(z.double())), strict=True):
            assert_matches(a, e, torch.float32, name, slack=100)


def test_flags_of_bag_pool():
    x = normal(4, 3, 33).float()
    for normalize, deviation, cosine in [
        (False, False, False),
        (False, False, True),
        (True, True, False),
    ]:
        flags = {"normalize": normalize, "deviation": deviation, "cosine": cosine}
        actual = run(lambda x, f=flags: bag_pool.bag_pool(x, **f), x)
        truth = run(lambda x, f=flags: bag_pool_ref(x, **f), x.double())
        for key, expected in truth.items():
            assert_matches(actual[key], expected, torch.float32, f"{flags} {key}")


def test_one_patch_of_zeros_has_a_finite_gradient():
    x = normal(3, 2, 8).float()
    x[1, 0] = 0.0
    assert run(OPS["bag_pool"][0], x)["dx"].isfinite().all()


def test_empty_batches_and_no_gradient():
    assert bag_pool.bag_pool(torch.zeros(3, 0, 5), cosine=True)[0].shape == (0, 5)
    z = normal(2, 5, 7).float()
    with torch.no_grad():
        quiet = [*tensors(vicreg.vicreg(z)), tcr.tcr(z)]
    z.requires_grad_()
    loud = [*tensors(vicreg.vicreg(z)), tcr.tcr(z)]
    assert all(torch.equal(a, b) for a, b in zip(quiet, loud, strict=True))


def test_non_finite_values_are_seen():
    z = normal(3, 6, 9).float()
    z[1, 2, 3] = torch.nan
    assert all(not term.isfinite() for term in vicreg.vicreg(z))
    assert tcr.tcr(z).isfinite().tolist() == [True, False, True]
    _, deviation, cosine = bag_pool.bag_pool(z, deviation=True, cosine=True)
    assert cosine.isfinite().tolist() == [True, True, False, True, True, True]
    assert deviation.isfinite().tolist() == [True, True, False, True, True, True]


@pytest.mark.parametrize("convention", ops.CONVENTIONS)
def test_conventions_scale_the_kernels_terms(convention):
    z = normal(2, 5, 7).float()
    scales = [7 if scale == "D" else scale for scale in ops.CONVENTIONS[convention]]
    own = [scale * term for scale, term in zip(scales, vicreg.vicreg(z), strict=True)]
    for impl in ("cuda", "reference"):
        terms = ops.vicreg(z, convention=convention, impl=impl)
        for a, b in zip(own, terms, strict=True):
            assert_matches(a, b, torch.float32, convention)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: vicreg.vicreg(torch.zeros(4, 5)), r"vicreg: got z of shape \[4, 5\]"),
        (lambda: vicreg.vicreg(torch.zeros(2, 1, 5)), r"vicreg: got z of shape \[2, 1, 5\]"),
        (lambda: vicreg.vicreg(torch.zeros(1, 4, 5)), r"P >= 2, B >= 2"),
        (lambda: vicreg.vicreg(torch.zeros(2, 4, 5), eps=0.0), "eps = 0.0"),
        (lambda: vicreg.vicreg(torch.zeros(2, 4, 5).double()), "dtype torch.float64.*float32"),
        (lambda: tcr.tcr(torch.zeros(2, 0, 5)), r"tcr: got z of shape \[2, 0, 5\]"),
        (lambda: tcr.tcr(torch.zeros(2, 3, 5).bfloat16()), "bfloat16 under TRITON_INTERPRET"),
        (lambda: tcr.tcr(torch.zeros(2, 3, 5, device="meta")), "z on meta.*CUDA"),
        (lambda: bag_pool.bag_pool(torch.zeros(0, 3, 5)), "P >= 1"),
        (lambda: bag_pool.bag_pool(torch.zeros(1, 1, 16385)), "D <= 16384"),
    ],
)
def test_bad_input_names_the_how_to_fix(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert 'impl="reference"' in str(error.value)


def test_registered_ops_and_compiled_graphs():
    z = normal(2, 5, 7).float()
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(vicreg._fwd_op, (z, 1.0, 1e-4, True), test_utils=tests)
    torch.library.opcheck(tcr._fwd_op, (z, 0.2, True), test_utils=tests)
    torch.library.opcheck(bag_pool._fwd_op, (z, True, True, True, True), test_utils=tests)

    def everything(z: Tensor) -> Tensor:
        _, deviation, cosine = bag_pool.bag_pool(z, cosine=True, deviation=True)
        extra = cosine.sum() + deviation.sum()
        return sum(vicreg.vicreg(z)) + tcr.tcr(z).sum() + extra

    compiled = torch.compile(everything, fullgraph=True, backend="aot_eager")
    eager, graph = run(everything, z), run(compiled, z)
    assert all(torch.equal(eager[key], graph[key]) for key in eager)
