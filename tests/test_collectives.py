"""Collectives leave the tensors that they are given alone."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from bagssl_fast.distributed import collectives


@pytest.mark.parametrize("function", [collectives._Gather, collectives._AllReduceSum])
def test_a_backward_does_not_change_the_gradient_of_its_caller(monkeypatch, function):
    """The gradient was summed over the ranks in place, and autograd may use it again."""
    monkeypatch.setattr(dist, "all_reduce", lambda x, group: x.mul_(2))
    monkeypatch.setattr(dist, "get_world_size", lambda group: 2)
    monkeypatch.setattr(dist, "get_rank", lambda group: 1)
    grad = torch.arange(8.0).reshape(4, 2)
    before = grad.clone()
    result = function.backward(SimpleNamespace(dim=0, group=None, alike=False), grad)[0]
    assert grad.equal(before)
    assert result.equal(2 * before[2:] if function is collectives._Gather else 2 * before)
