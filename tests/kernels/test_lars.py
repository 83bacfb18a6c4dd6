"""LARS for many tensors at once in the interpreter, against the optimizer on a CPU."""

import pytest
import torch
from bagssl_fast.kernels import _lars as lars
from torch import Tensor

from bagssl_fast.training.optim import lars_update

CHUNK = 2 * lars.BLOCK  # smaller than on a GPU, to stay quick
SHAPES = [(3, 5), (1,), (CHUNK + 7,), (2 * CHUNK,), (4, 3, 3, 3), (0, 4)]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(lars, "CHUNK", CHUNK)


def tensors(seed: int, scale: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = [scale * torch.randn(shape, generator=generator) for shape in SHAPES]
    made[4] = made[4].to(memory_format=torch.channels_last)
    return made


@pytest.mark.parametrize("adapt", [True, False], ids=["adapted", "plain"])
@pytest.mark.parametrize(("form", "lr"), [("vicreg", 0.7), ("emp", 0.7), ("emp", 1e-4)])
def test_three_steps_are_those_of_the_optimizer(form, lr, adapt):
    group = {"lr": lr, "momentum": 0.9, "weight_decay": 1e-2, "eta": 0.02, "adapt": adapt}
    weights = [w.requires_grad_() for w in tensors(0)]
    weights[0].data.zero_()  # is not adapted
    own = [w.detach().clone() for w in weights]
    buffers, momenta = ([torch.zeros_like(w) for w in own] for _ in range(2))
    for step in range(1, 4):
        grads = tensors(step, scale=10.0**-step)
        for w, g in zip(weights, grads, strict=True):
            w.grad = g.clone()
        lars_update(group, form, weights, buffers)
        assert lars.serves(own, grads, momenta)
        lars.lars(own, grads, momenta, **group, emp=form == "emp")
    for name, got, expected in (("weight", own, weights), ("momentum", momenta, buffers)):
        for shape, a, b in zip(SHAPES, got, expected, strict=True):
            torch.testing.assert_close(a, b.detach(), rtol=2e-5, atol=1e-7, msg=f"{name} {shape}")


def test_unaligned_tensors_and_what_is_not_finite():
    """A view one element into its storage; a NaN gradient reaches its own tensor alone."""
    whole = torch.randn(2, 34, generator=torch.Generator().manual_seed(0))
    weights, grads = [whole[0, 1:], torch.ones(3)], [whole[1, 1:], torch.ones(3)]
    before = weights[0].clone()
    grads[1] = torch.tensor([1.0, torch.nan, 1.0])
    momenta = [torch.zeros_like(w) for w in weights]
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.0, "eta": 0.02}
    lars.lars(weights, grads, momenta, **options, adapt=True, emp=False)
    ratio = 0.02 * before.norm() / grads[0].norm()
    torch.testing.assert_close(weights[0], before - 0.1 * ratio * grads[0])
    assert weights[1].isnan().tolist() == [False, True, False]


def test_what_it_does_not_take():
    w = torch.zeros(4, 6)
    assert lars.serves([w], [w], [w])
    assert not lars.serves([w], [w.T.contiguous().T], [w])  # alike in value, not in memory
    assert not lars.serves([w[:, ::2]], [w[:, ::2]], [w[:, ::2]])
    assert not lars.serves([w.half()], [w], [w])
