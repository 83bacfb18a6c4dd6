"""The captured step, with something in the GPU's place; what cannot be captured is refused."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from bagssl_fast.training.cuda_graph import WARM_UP, Computed, GraphedStep


class FakeCuda:
    """Runs what is captured, and again, in place, what is replayed; writes down where."""

    def __init__(self, weight: Tensor) -> None:
        self.log: list[str] = []
        self.weight = weight

    def step(self, patches: Tensor) -> Computed:
        """loss = sum(w x)."""
        self.weight.grad = None
        loss = (self.weight * patches).sum()
        loss.backward()
        self.log.append("step")
        result = Computed(loss.detach(), {"term": 2 * loss.detach()}, patches + 1, patches + 2)
        self.captured = patches, result, self.weight.grad
        return result

    def current_stream(self) -> "FakeCuda":
        return self

    Stream = CUDAGraph = current_stream

    def wait_stream(self, stream: "FakeCuda") -> None:
        self.log.append("wait")

    @contextlib.contextmanager
    def stream(self, stream: "FakeCuda") -> Iterator[None]:
        yield

    @contextlib.contextmanager
    def graph(self, graph: "FakeCuda") -> Iterator[None]:
        self.log.append("capture")
        yield
        for x in (self.captured[1].loss, self.captured[1].h, self.captured[2]):
            x.fill_(torch.nan)  # a capture computes nothing

    def replay(self) -> None:
        patches, (loss, terms, h, z), grad = self.captured
        loss.copy_((self.weight * patches).detach().sum())
        terms["term"].copy_(2 * loss)
        h.copy_(patches + 1)
        z.copy_(patches + 2)
        grad.copy_(patches)
        self.log.append("replay")


def test_steps_before_and_after_the_capture_are_the_same():
    weight = torch.randn(5, requires_grad=True)
    cuda = FakeCuda(weight)
    step = GraphedStep(cuda.step, cuda)
    kept = []
    for i in range(WARM_UP + 3):
        patches = torch.full((5,), float(i))
        computed = step(patches)
        assert torch.equal(computed.h, patches + 1) and torch.equal(computed.z, patches + 2)
        assert torch.equal(weight.grad, patches)
        with torch.no_grad():
            kept.append((computed, (weight * i).sum()))
            weight -= 0.1 * weight.grad
    for computed, loss in kept:  # the numbers of a step survive the steps after it
        assert torch.equal(computed.loss, loss)
        assert torch.equal(computed.terms["term"], 2 * loss)
    beside = ["wait", "step", "wait"] * WARM_UP
    assert cuda.log == [*beside, "capture", "step", *["replay"] * 3]
