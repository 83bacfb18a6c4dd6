"""Every filled cell of the dispatch table against the float64 reference, forward and backward.

Parametrized from the table: a new cell is tested by being written there, and an op without cases
fails. (CUDA cells run here on a GPU only; `tests/kernels` runs them in Triton's interpreter.)
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from tolerances import assert_matches
from torch import Tensor

from bagssl_fast import ops

HALVES = (torch.float16, torch.bfloat16)
STATISTICS = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.25, 0.3)}


class Case(NamedTuple):
    """Inputs of one call: tensors by name (floating ones are differentiated), and options."""

    id: str
    tensors: Callable[[], dict[str, Tensor]]
    options: dict[str, Any]
    halves: bool = True  # also in float16 and bfloat16


def normal(*shape: int, scale: float = 1.0, mean: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return mean + scale * torch.randn(shape, generator=generator, dtype=torch.float64)


def bags(name: str, shapes: list[tuple[int, ...]], **options: Any) -> list[Case]:
    """Shapes, then layouts and scales, of an op over one [P, B, D] tensor."""

    def case(label: str, make: Callable[[], Tensor], halves: bool = True) -> Case:
        return Case(label, lambda: {name: make()}, options, halves)

    cases = [case(str(shape), lambda s=shape: normal(*s, mean=0.3)) for shape in shapes]
    return [
        *cases,
        case("transposed", lambda: normal(9, 7, 3).permute(2, 1, 0)),
        case("strided", lambda: normal(6, 14, 10)[::2, ::2, 1::2]),
        case("expanded", lambda: normal(1, 7, 5).expand(3, 7, 5)),
        case("std 1e-3", lambda: normal(3, 12, 8, scale=1e-3), halves=False),
        case("std 1e3", lambda: normal(3, 8, 12, scale=1e3), halves=False),
        case("mean 100", lambda: normal(3, 12, 8, mean=100.0), halves=False),
    ]


def patches(
    label: str,
    positions: Callable[[], Tensor],
    patch: tuple[int, int] = (4, 3),
    batch: int = 3,
    **options: Any,
) -> Case:
    def tensors() -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(0, 256, (batch, 16, 18, 3), generator=generator).byte()
        weight = normal(7, 3, *patch) / (3 * patch[0] * patch[1]) ** 0.5
        return {"images": images, "weight": weight, "bias": normal(7), "positions": positions()}

    return Case(label, tensors, {**STATISTICS, **options})


def scattered(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 8, (*shape, 2), generator=generator)


def grid(tops: list[int], lefts: list[int]) -> Tensor:
    return torch.cartesian_prod(torch.tensor(tops), torch.tensor(lefts))


def blocks(label: str, *shape: int, **options: Any) -> Case:
    def tensors() -> dict[str, Tensor]:
        return {
            "x": normal(*shape, mean=0.2),
            "weight": normal(5, shape[-1]) / shape[-1] ** 0.5,
            "gamma": normal(5, scale=0.2, mean=1.0),
            "beta": normal(5),
            "running_mean": torch.zeros(5),
            "running_var": torch.ones(5),
        }

    return Case(label, tensors, options)


def convolutions(label: str, *shape: int, kernel: int, **options: Any) -> Case:
    def tensors() -> dict[str, Tensor]:
        return {
            "x": normal(*shape, mean=0.2),
            "weight": normal(5, shape[1], kernel, kernel) / (kernel**2 * shape[1]) ** 0.5,
            "gamma": normal(5, scale=0.2, mean=1.0),
            "beta": normal(5),
            "running_mean": torch.zeros(5),
            "running_var": torch.ones(5),
        }

    return Case(label, tensors, options, halves=False)  # torch's way: y is rounded to them


def sums(label: str, *shape: int) -> Case:
    return Case(label, lambda: {"x": normal(*shape), "identity": normal(*shape, mean=0.1)}, {})


def activations(label: str, *shape: int) -> Case:
    return Case(label, lambda: {"x": normal(*shape)}, {})


BAGS = [(2, 2, 1), (2, 17, 13), (3, 13, 17), (4, 16, 16), (5, 31, 33), (7, 33, 31), (8, 3, 67)]
CASES: dict[str, list[Case]] = {
    "patch_embed": [
        patches("scattered", lambda: scattered(11)),
        patches("per image", lambda: scattered(5, 3), relu=True),
        patches("one", lambda: torch.tensor([[12, 15]])),
        patches("int32", lambda: scattered(4).int()),
        patches("repeated", lambda: torch.tensor([[2, 3]] * 3)),
        patches("every position", lambda: grid([*range(5)], [*range(7)]), (12, 12)),
        patches("uneven grid", lambda: grid([0, 2, 3], [1, 2, 4, 5, 6]), (9, 12), relu=True),
        patches("odd width", lambda: grid([0, 1], [*range(6)]), (9, 12)),
        patches("column by column", lambda: grid([*range(5)], [*range(7)]).sort(0)[0], (12, 12)),
    ],
    "conv_bn_relu": [
        convolutions("training", 4, 3, 7, 6, kernel=3, training=True),
        convolutions("strided", 5, 3, 9, 8, kernel=4, training=True, stride=2, padding=1),
        convolutions("pointwise", 3, 7, 4, 4, kernel=1, training=True),
        convolutions("eval", 4, 3, 7, 6, kernel=3, training=False),
    ],
    "add_relu": [sums("maps", 4, 3, 5, 6), sums("pixels", 3, 7, 1, 1)],
    "relu_mean": [activations("maps", 4, 3, 5, 6), activations("pixels", 3, 7, 1, 1)],
    "linear_bn_relu": [
        blocks("three rows", 3, 3, training=True),
        blocks("training", 4, 11, 7, training=True),
        blocks("no relu", 23, 7, training=True, relu=False),
        blocks("eval", 4, 11, 7, training=False),
    ],
    "vicreg": [
        *bags("z", BAGS),
        *bags("z", [(3, 9, 5)], gamma=2.0, eps=1e-3, convention="paper")[:1],
    ],
    "tcr": bags("z", [(1, 1, 1), (1, 5, 3), *BAGS]),
    "bag_pool": [
        *bags("x", [(1, 1, 1), (1, 5, 3), *BAGS], cosine=True, deviation=True),
        *bags("x", [(3, 9, 5)], normalize=True)[:2],
    ],
}
# Ops that are compared elsewhere, and where.
EXEMPT = {"patch_views": "test_patch_views.py"}  # no gradient, and pixels are equal or they are not
SLACK: dict[tuple[str, str], float] = {
    # A float32 of 100 has an absolute rounding of 4e-6, which features of std 1 show.
    ("vicreg", "mean 100"): 5,
    ("bag_pool", "mean 100"): 5,
    # Rows equal to 1%: the gradient is a difference of much larger float32 products.
    ("tcr", "mean 100"): 20,
}
# On tensor cores the operands of a product are in the input's own precision, unlike on the CPU:
# relative L2 error of four roundings, beside twice what the reference loses by them in its product.
HALF_PRODUCTS = {torch.float16: 4e-3, torch.bfloat16: 3e-2}
NOT_DIFFERENTIATED = ("running_mean", "running_var")


def filled_cells() -> list[Any]:
    params = []
    for op, cells in ops.DISPATCH.items():
        for impl, cell in zip(ops.IMPLS, cells, strict=True):
            if cell is not None and op not in EXEMPT:
                marks = [pytest.mark.gpu] if impl == "cuda" else []
                params.append(pytest.param(op, impl, id=f"{op}-{impl}", marks=marks))
    return params


def run(
    op: str, case: Case, impl: str, dtype: torch.dtype, truth: bool = False
) -> dict[str, Tensor]:
    """All results and all gradients by name; the truth takes what `dtype` can hold of the input."""
    device = "cuda" if impl == "cuda" else "cpu"
    tensors = {}
    for name, x in case.tensors().items():
        if x.is_floating_point():
            x = x.to(dtype) if name not in NOT_DIFFERENTIATED else x.float()
            x = x.double() if truth else x
            x = x.to(device).detach().requires_grad_(name not in NOT_DIFFERENTIATED)
        tensors[name] = x.to(device)
    before = {name: x.detach().clone() for name, x in tensors.items()}
    out = getattr(ops, op)(**tensors, **case.options, impl=impl)
    out = ops.applied(out) if isinstance(out, ops.Deferred) else out
    outs = {
        f"result {i}": x
        for i, x in enumerate([out] if isinstance(out, Tensor) else out)
        if x is not None
    }
    size = max(x.numel() for x in tensors.values() if x.is_floating_point()) ** 0.5
    loss = sum(
        # Weights of the size that keeps gradients near 1: half precision has few exponents.
        ((normal(*x.shape, mean=1.0) * size / x.numel()).to(dtype).to(x) * x).sum()
        for x in outs.values()
    )
    needed = {name: x for name, x in tensors.items() if x.requires_grad}
    grads = torch.autograd.grad(loss, list(needed.values()))
    for name, x in tensors.items():
        if name not in NOT_DIFFERENTIATED:
            assert torch.equal(x, before[name]), f"{op} wrote into {name}"
    running = {name: tensors[name] for name in NOT_DIFFERENTIATED if name in tensors}
    named = {f"d{name}": grad for name, grad in zip(needed, grads, strict=True)}
    return {name: x.detach().cpu() for name, x in {**outs, **named, **running}.items()}


def test_every_op_has_cases_here_or_a_file_of_its_own():
    assert CASES.keys() | EXEMPT.keys() == ops.DISPATCH.keys()
    assert not CASES.keys() & EXEMPT.keys()
    for op, file in EXEMPT.items():
        text = (Path(__file__).parent / file).read_text()
        assert f"ops.{op}" in text or f"ops.reference.{op}" in text


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize(("op", "impl"), filled_cells())
def test_cells_match_the_float64_reference(op, impl, dtype):
    if impl == "reference" and dtype != torch.float32:
        pytest.skip("the reference computes what it is given in float32")
    for case in CASES[op]:
        if dtype in HALVES and not case.halves:
            continue
        actual = run(op, case, impl, dtype)
        truth = run(op, case, "reference", dtype, truth=True)
        in_halves = impl == "cuda" and dtype in HALVES and op != "bag_pool"
        rough = run(op, case, "reference", dtype) if in_halves else {}
        for name, expected in truth.items():
            own = actual[name].dtype
            if in_halves:
                error, lost = (x[name].double() - expected for x in (actual, rough))
                allowed = 2 * lost.norm() + HALF_PRODUCTS[dtype] * expected.norm() + 1e-6
                assert error.norm() <= allowed, f"{op}, {case.id}, {name}"
                continue
            label = f"{op} on {impl}, {case.id}, {name}"
            assert_matches(actual[name], expected, own, label, SLACK.get((op, case.id), 1))
        again = run(op, case, impl, dtype)
        for name, x in actual.items():
            assert torch.equal(x, again[name]), f"{op} on {impl}, {case.id}: {name} differs"


def test_table_names_what_runs(monkeypatch):
    monkeypatch.setitem(ops.DISPATCH, "tcr", ("reference", None, "kernels"))
    lines = {line.split()[0]: line.split()[1:] for line in ops.table().splitlines()}
    assert lines["op"] == ["on", "cpu", "on", "cuda"]
    assert lines["tcr"] == ["reference", "kernels"]
    assert lines["vicreg"][0] == "cpu"
    try:
        ops.set_impl("reference")
        assert "kernels" not in ops.table()
    finally:
        ops.set_impl(None)


def test_impl_is_explicit_then_process_wide_then_the_device(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    z = normal(2, 4, 3)
    chosen = []
    monkeypatch.setattr(
        ops, "_load", lambda op, cell: lambda z, eps: chosen.append(cell) or z.sum((1, 2))
    )
    monkeypatch.setitem(ops.DISPATCH, "tcr", ("reference", "cpu", "kernels"))
    try:
        ops.tcr(z)
        ops.tcr(z, impl="reference")
        ops.set_impl("reference")
        ops.tcr(z)
        ops.tcr(z, impl="cpu")
        ops.set_impl("cuda")
        with pytest.raises(
            ValueError, match=r"impl='cuda' was given a tensor on cpu.*\"reference\""
        ):
            ops.tcr(z)
        monkeypatch.setitem(ops.DISPATCH, "tcr", ("reference", "cpu", None))
        ops.tcr(z)
    finally:
        ops.set_impl(None)
    assert chosen == ["cpu", "reference", "reference", "cpu", "reference"]
    with pytest.raises(ValueError, match="'triton', expected one of reference, cpu, cuda"):
        ops.tcr(z, impl="triton")
    with pytest.raises(ValueError, match="'triton', expected one of"):
        ops.set_impl("triton")


def registered_ops() -> list[Any]:
    from bagssl_fast.ops.cpu import bag_pool, patch_embed, tcr, vicreg

    z = normal(2, 5, 7).float().requires_grad_()
    images, weight = torch.zeros(2, 9, 9, 3, dtype=torch.uint8), normal(4, 3, 3, 3).float()
    weight.requires_grad_()
    channels = [0.5, 0.5, 0.5]
    return [
        pytest.param(vicreg.vicreg_forward, (z, 1.0, 1e-4), id="vicreg"),
        pytest.param(tcr.tcr_forward, (z, 0.2, True), id="tcr"),
        pytest.param(bag_pool.bag_pool_forward, (z, True, True, True), id="bag_pool"),
        pytest.param(
            patch_embed.patch_embed_forward,
            (images, weight, None, torch.tensor([[1, 2]]), channels, channels, True),
            id="patch_embed",
        ),
    ]


@pytest.mark.parametrize(("op", "args"), registered_ops())
def test_registered_ops_are_what_they_declare(op, args):
    # Results that only backward reads have no gradient, so the tests of autograd run through `run`.
    torch.library.opcheck(
        op, args, test_utils=("test_schema", "test_faketensor", "test_autograd_registration")
    )


def test_compiled_graphs_keep_ops_whole():
    """fullgraph=True: one graph, the same numbers."""

    def everything(z: Tensor, weight: Tensor, images: Tensor, positions: Tensor) -> Tensor:
        y = ops.patch_embed(images, weight, None, positions, **STATISTICS, relu=True)
        pooled = ops.bag_pool(y, cosine=True)
        return (
            sum(ops.vicreg(z)) + ops.tcr(z).sum() + pooled.mean.sum() + pooled.cosine.square().sum()
        )

    z, weight = (
        normal(3, 5, 7).float().requires_grad_(),
        normal(4, 3, 3, 3).float().requires_grad_(),
    )
    images = torch.randint(0, 256, (2, 9, 9, 3), dtype=torch.uint8)
    args = (z, weight, images, torch.tensor([[1, 2], [0, 4]]))
    compiled = torch.compile(everything, fullgraph=True, backend="aot_eager")
    expected, actual = everything(*args), compiled(*args)
    assert_matches(actual, expected, torch.float32, "value")
    needed = torch.autograd.grad(expected, (z, weight))
    for name, a, e in zip(
        ("dz", "dweight"), torch.autograd.grad(actual, (z, weight)), needed, strict=True
    ):
        assert_matches(a, e, torch.float32, name)
