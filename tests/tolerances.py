"""How far from the float64 reference an implementation may be, and the comparisons themselves.

A result passes if every element is within `rtol * |expected| + floor * max|expected|` and the whole
is within `vector` in relative L2. `rtol` is the rounding of the result's own dtype, `floor` and
`vector` are float32 arithmetic (all ops compute in it), so they are the same for half inputs.
Loosening an entry is a change of its own.
"""

import copy
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Tolerance(NamedTuple):
    rtol: float  # of each element
    floor: float  # of the largest element
    vector: float  # relative L2


NOTHING = 1e-8  # results are of order 1: what should be less than this may be rounding

TOLERANCES: dict[torch.dtype, Tolerance] = {
    torch.float64: Tolerance(1e-10, 1e-11, 1e-11),
    torch.float32: Tolerance(1e-5, 2e-6, 2e-6),
    torch.float16: Tolerance(1e-3, 2e-6, 6e-4),
    torch.bfloat16: Tolerance(8e-3, 2e-6, 5e-3),
}


def assert_matches(
    actual: Tensor, expected: Tensor, dtype: torch.dtype, name: str, slack: float = 1.0
) -> None:
    """Compare by the tolerances of `dtype`, `slack` times as wide where a test states a reason."""
    assert actual.shape == expected.shape, f"{name}: {actual.shape} instead of {expected.shape}"
    rtol, floor, vector = (slack * tolerance for tolerance in TOLERANCES[dtype])
    actual, expected = actual.detach().double(), expected.detach().double()
    if expected.numel() == 0:
        return
    assert actual.isfinite().all(), f"{name}: not finite"
    largest = expected.abs().max().clamp_min(NOTHING)
    error = (actual - expected).abs()
    excess = error - (rtol * expected.abs() + floor * largest)
    worst = int(excess.argmax())
    assert excess.max() <= 0, (
        f"{name}[{worst}]: {actual.flatten()[worst]:.9g} instead of "
        f"{expected.flatten()[worst]:.9g} (largest {largest:.3g})"
    )
    relative = float((actual - expected).norm() / expected.norm().clamp_min(NOTHING))
    assert relative <= vector, f"{name}: relative L2 error {relative:.2e} > {vector:.2e}"


def assert_compiles_whole(net: nn.Module, x: Tensor) -> None:
    """Without a graph break, and with the values and gradients of the network as it is."""
    compiled = torch.compile(copy.deepcopy(net), fullgraph=True, backend="aot_eager")
    expected, actual = net(x), compiled(x)
    torch.testing.assert_close(actual, expected)
    expected.sum().backward()
    actual.sum().backward()
    for (name, p), q in zip(net.named_parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, msg=name)
