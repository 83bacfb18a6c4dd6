"""add_relu: the residual sum and its gradients against float64, with the kernels' ReLU masks."""

import pytest
import torch
from test_conv_bn_relu import Masked, deferred, images, leaf, mask_of, normal
from tolerances import assert_matches
from torch import Tensor

from bagssl_fast import ops
from bagssl_fast._extension import _C
from bagssl_fast.ops import Deferred, Normalized
from bagssl_fast.ops.cpu import add_relu as cell

# N, C, H, W: vectors are 16, 8 and 4 channels, parts 2^15 numbers.
SHAPES = [(9, 64, 8, 8), (1, 1, 1, 1), (5, 13, 4, 7), (65, 33, 6, 5), (2, 515, 3, 3)]
KINDS = ["tensor", "normalized", "deferred"]


def sides(shape: tuple[int, ...], kind: str, dtype: torch.dtype) -> tuple[Normalized, ...]:
    x = Normalized(*(leaf(v, dtype) for v in deferred(images(*shape, mean=0.2))))
    other = deferred(images(*shape, seed=3, mean=-0.1))
    if kind == "tensor":
        return x, leaf(other.y, dtype)
    made = Deferred if kind == "deferred" else Normalized
    return x, made(*(leaf(v.flip(0), dtype) for v in other))


def named(x: Normalized, identity, out: Tensor, dy: Tensor) -> dict[str, Tensor]:
    others = [identity] if isinstance(identity, Tensor) else [*identity]
    grads = torch.autograd.grad(out, [*x, *others], dy)
    names = [f"dx.{name}" for name in x._fields] + [f"didentity {i}" for i in range(len(others))]
    return {"out": out.detach()} | dict(zip(names, grads, strict=True))


def run(shape: tuple[int, ...], kind: str, dy: Tensor) -> dict[str, Tensor]:
    x, identity = sides(shape, kind, torch.float32)
    return named(x, identity, ops.add_relu(x, identity, impl="cpu"), dy.float())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_float64(shape, kind, simd_level):
    dy = normal(*shape, seed=1)
    actual = run(shape, kind, dy)
    x, identity = sides(shape, kind, torch.float64)
    other = identity
    if kind != "tensor":
        center, scale, shift = (v[:, None, None] for v in identity[1:])
        other = scale * (identity.y - center) + shift
        if kind == "deferred":
            other = Masked.apply(other, mask_of(sides(shape, kind, torch.float32)[1]))
    expected = named(x, identity, Masked.apply(ops.applied(x) + other, actual["out"] > 0), dy)
    for name, value in expected.items():
        assert_matches(actual[name], value, torch.float32, name, slack=3)


@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_takes_every_kind_and_passes_gradcheck(kind):
    x, identity = sides((2, 3, 2, 2), kind, torch.float64)
    expected = torch.relu(ops.applied(x) + ops.applied(identity))
    assert torch.equal(ops.add_relu(x, identity, impl="reference"), expected)
    assert torch.equal(
        ops.add_relu(x, identity, impl="cpu"), expected
    )  # float64 is the reference's
    assert torch.equal(ops.add_relu(ops.applied(x), ops.applied(identity)), expected)
    others = (identity,) if kind == "tensor" else tuple(identity)
    made = (lambda v: v) if kind == "tensor" else type(identity)

    def call(*v: Tensor) -> Tensor:
        return ops.add_relu(Normalized(*v[:4]), made(*v[4:]))

    assert torch.autograd.gradcheck(call, (*x, *others))


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_bits_with_any_number_of_threads_and_layout(kind, monkeypatch):
    shape = (65, 33, 6, 5)
    dy = normal(*shape, seed=1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    first = run(shape, kind, dy)
    for threads in (2, 3, 8):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        other = dy.contiguous(memory_format=torch.channels_last) if threads == 3 else dy
        for name, value in run(shape, kind, other).items():
            assert torch.equal(value, first[name]), (threads, name)


def test_everything_is_written_and_a_nan_stays_a_nan(simd_level):
    n, side, c = 3, 4, 21
    y, identity, dout = (normal(n, side, side, c, seed=k).float() for k in range(3))
    y[0, 0, 0, 5] = float("nan")
    reader = [v.float().numpy() for v in deferred(images(1, c, 1, 1))[1:]]
    out, dy, other = (torch.full((n + 2, side, side, c), float("inf")) for _ in range(3))
    sums = [torch.full((c + 2,), float("inf")) for _ in range(2)]
    given = (y.numpy(), *reader, identity.numpy(), None, None, None, False)
    _C.add_relu(*given, out[1:-1].numpy(), 2)
    _C.add_relu_backward(
        dout.numpy(), out[1:-1].numpy(), *given, dy[1:-1].numpy(),
        *(v[1:-1].numpy() for v in sums), other[1:-1].numpy(), None, None, 2,
    )  # fmt: skip
    for written in (out, dy, other, *sums):
        assert written[[0, -1]].isinf().all() and not written[1:-1].isinf().any()
    assert out[1, 0, 0].isnan().nonzero().tolist() == [[5]]


def test_no_maps():
    x, identity = sides((0, 5, 3, 3), "normalized", torch.float32)
    out = ops.add_relu(x, identity, impl="cpu")
    for name, value in named(x, identity, out, torch.zeros_like(out)).items():
        assert value.numel() == 0 or torch.equal(value, torch.zeros(5)), name


def test_registration_and_refusals():
    x, identity = sides((2, 5, 3, 3), "deferred", torch.float32)
    arguments = (*x, *identity, True)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(cell.add_relu_forward, arguments, test_utils=tests)
    out = ops.add_relu(x, identity)
    torch.library.opcheck(cell.add_relu_backward, (out, out, *arguments), test_utils=tests)
    with pytest.raises(ValueError, match=r"add_relu: x is \[2, 5, 3\], expected \[N, C, H, W\]"):
        ops.add_relu(torch.zeros(2, 5, 3), torch.zeros(2, 5, 3, 3))
    with pytest.raises(ValueError, match=r"x is \[2, 5, 3, 3\], identity \[2, 5, 3, 4\]"):
        ops.add_relu(x, torch.zeros(2, 5, 3, 4))
    with pytest.raises(ValueError, match="x is a Deferred, expected a tensor"):
        ops.add_relu(identity, x)
    with pytest.raises(ValueError, match="x is a Normalized, expected a tensor"):
        ops.relu_mean(x)
    maps, vector = torch.zeros(2, 3, 3, 5).numpy(), torch.zeros(5).numpy()
    with pytest.raises(ValueError, match=r"identity is \(2, 3, 4, 5\)"):
        other = torch.zeros(2, 3, 4, 5).numpy()
        _C.add_relu(maps, vector, vector, vector, other, None, None, None, False, maps, 1)
    with pytest.raises(ValueError, match="expected center, scale and shift of y"):
        _C.add_relu(maps, None, None, None, maps, None, None, None, False, maps, 1)
