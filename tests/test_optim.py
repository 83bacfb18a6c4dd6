"""Optimizers against their formulas, one tensor at a time; the schedule; the moving average."""

import itertools
import math

import pytest
import torch
from torch import nn

from bagssl_fast.config import OptimConfig
from bagssl_fast.training.optim import LARS, WeightAverage, build_optimizer, learning_rate
from bagssl_fast.training.step import tune_device


def gradients(shape, steps, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for _ in range(steps)]


def run(form, adapt, p, grads, lr, momentum, wd, eta):
    parameter = nn.Parameter(p.clone())
    group = {"params": [parameter], "adapt": adapt}
    optimizer = LARS([group], lr=lr, momentum=momentum, weight_decay=wd, eta=eta, form=form)
    for g in grads:
        parameter.grad = g.clone()
        optimizer.step()
    return parameter.detach()


class TestLARS:
    """As VICReg's and EMP-SSL's optimizers define a step, written out for one tensor."""

    p = torch.linspace(-1, 1, 12).reshape(3, 4)
    grads = gradients((3, 4), steps=4)
    lr, momentum, wd, eta = 0.7, 0.9, 1e-2, 0.02

    def test_vicreg(self):
        p, buffer = self.p.clone(), torch.zeros(3, 4)
        for g in self.grads:
            update = g + self.wd * p
            update = update * (self.eta * p.norm() / update.norm())
            buffer = self.momentum * buffer + update
            p = p - self.lr * buffer
        got = run("vicreg", True, self.p, self.grads, self.lr, self.momentum, self.wd, self.eta)
        torch.testing.assert_close(got, p)

    @pytest.mark.parametrize("lr", [0.7, 1e-4], ids=["adapted", "clipped"])
    def test_emp(self, lr):
        p, buffer, ratios = self.p.clone(), None, []
        for g in self.grads:
            ratio = self.eta * p.norm() / (g.norm() + self.wd * p.norm() + 1e-8) / lr
            ratios.append(float(ratio))
            update = (g + self.wd * p) * min(ratios[-1], 1.0)
            buffer = update if buffer is None else self.momentum * buffer + update
            p = p - lr * (update + self.momentum * buffer)
        assert all((r > 1) == (lr == 1e-4) for r in ratios)
        got = run("emp", True, self.p, self.grads, lr, self.momentum, self.wd, self.eta)
        torch.testing.assert_close(got, p)

    @pytest.mark.parametrize(("form", "nesterov"), [("vicreg", False), ("emp", True)])
    def test_vectors_take_plain_sgd(self, form, nesterov):
        reference = nn.Parameter(self.p.clone())
        sgd = torch.optim.SGD([reference], lr=0.1, momentum=0.9, nesterov=nesterov)
        for g in self.grads:
            reference.grad = g.clone()
            sgd.step()
        got = run(form, False, self.p, self.grads, 0.1, 0.9, 0.0, self.eta)
        torch.testing.assert_close(got, reference.detach())

    @pytest.mark.parametrize("form", ["vicreg", "emp"])
    def test_zeros_stay_finite(self, form):
        zeros = torch.zeros(3, 4)
        assert run(form, True, zeros, [zeros, zeros], 0.1, 0.9, 0.0, 0.01).isfinite().all()
        moved = run(form, True, zeros, self.grads, 0.1, 0.9, 0.0, 0.01)
        assert moved.isfinite().all() and moved.abs().sum() > 0
        assert run(form, True, self.p, self.grads, 0.0, 0.9, 0.0, 0.01).equal(self.p)

    def test_unknown_form(self):
        with pytest.raises(ValueError, match="'vicreg', 'emp'"):
            LARS([nn.Parameter(self.p)], lr=0.1, form="other")


@pytest.mark.parametrize("name", ["adamw", "sgd", "lars", "sgd_lars"])
def test_vectors_get_no_decay(name):
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    optimizer = build_optimizer(model, OptimConfig(name=name, weight_decay=0.3))
    matrices, vectors = optimizer.param_groups
    assert [p.ndim for p in matrices["params"]] == [2] and matrices["weight_decay"] == 0.3
    assert [p.ndim for p in vectors["params"]] == [1, 1, 1] and vectors["weight_decay"] == 0.0
    assert vectors.get("adapt", False) is False
    model(torch.randn(8, 4)).square().mean().backward()
    optimizer.step()


def test_published_trust_coefficients():
    model = nn.Linear(2, 2)
    eta = {
        n: build_optimizer(model, OptimConfig(name=n)).param_groups[0]["eta"]
        for n in ("lars", "sgd_lars")
    }
    assert eta == {"lars": 0.001, "sgd_lars": 0.005}


class TestSchedule:
    def rate(self, step, total=100, per_epoch=10, batch=256, **options):
        return learning_rate(OptimConfig(lr=2.0, **options), step, total, per_epoch, batch)

    def test_cosine_moves_every_step_down_to_zero(self):
        rates = [self.rate(s) for s in range(101)]
        assert rates[0] == 2.0 and rates[100] == 0.0
        assert all(a > b for a, b in itertools.pairwise(rates))
        assert rates[50] == pytest.approx(1.0)

    def test_warmup_is_linear_and_reaches_the_peak(self):
        rates = [self.rate(s, warmup_epochs=1.5) for s in range(16)]
        assert rates[:15] == pytest.approx([2.0 * (s + 1) / 15 for s in range(15)])
        assert rates[15] == 2.0

    def test_final_fraction_constant_and_batch_rule(self):
        assert self.rate(100, final_lr=0.001) == pytest.approx(0.002)
        assert self.rate(77, schedule="constant") == 2.0
        assert self.rate(0, lr_batch=128) == 4.0

    def test_a_warmup_longer_than_the_run(self):
        assert math.isfinite(self.rate(99, warmup_epochs=50.0))


def test_weight_average():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    average = WeightAverage(model, 0.75)
    start = model[0].weight.detach().clone()
    with torch.no_grad():
        model[0].weight.add_(1.0)
    model(torch.randn(4, 2))
    average.update(model)
    torch.testing.assert_close(average.weights["0.weight"], start + 0.25)
    assert average.weights["1.running_mean"].equal(model[1].running_mean)
    assert int(average.weights["1.num_batches_tracked"]) == 1


def test_weight_average_of_several_types():
    """Each type of number is copied by itself: one copy of all would cast or take the slow way."""
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.BatchNorm1d(2).double())
    average = WeightAverage(model, 0.5)
    with torch.no_grad():
        for i, buffer in enumerate(model.buffers()):
            buffer.fill_(i + 2)
    average.update(model)
    for name, buffer in model.named_buffers():
        assert average.weights[name].dtype == buffer.dtype and average.weights[name].equal(buffer)


def test_cudnn_looks_for_the_fastest_algorithms_on_cuda_alone(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    tune_device(torch.device("cpu"))
    assert not torch.backends.cudnn.benchmark
    tune_device(torch.device("cuda"))
    assert torch.backends.cudnn.benchmark


@pytest.mark.gpu
@pytest.mark.parametrize("form", ["vicreg", "emp"])
def test_lars_on_a_gpu_is_that_of_a_cpu(form):
    shapes = [(512, 512, 3, 3), (64, 3, 7, 7), (8192, 2048), (1000, 7)]
    results = []
    for device in ("cpu", "cuda"):
        weights = [nn.Parameter(gradients(s, 1)[0].to(device)) for s in shapes]
        weights[0].data = weights[0].data.to(memory_format=torch.channels_last)
        optimizer = LARS(weights, lr=0.3, weight_decay=1e-4, eta=0.02, form=form)
        for step in range(3):
            for w, s in zip(weights, shapes, strict=True):
                w.grad = torch.empty_like(w).copy_(gradients(s, 1, seed=step + 1)[0])
            optimizer.step()
        results.append([w.detach().cpu() for w in weights])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-6)
