"""linear_bn_relu: torch's Linear + BatchNorm1d + ReLU, running statistics included, bad input."""

import pytest
import torch
from tolerances import assert_matches
from torch import Tensor, nn

from bagssl_fast import ops
from bagssl_fast.ops.reference.linear_bn_relu import linear_bn_relu as reference

IMPLS = ("reference", "cpu")


def module(in_dim: int, out_dim: int, dtype=torch.float64) -> tuple[nn.Linear, nn.BatchNorm1d]:
    torch.manual_seed(0)
    linear = nn.Linear(in_dim, out_dim, bias=False, dtype=dtype)
    norm = nn.BatchNorm1d(out_dim, dtype=dtype)
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    nn.init.normal_(norm.bias)
    return linear, norm


def ours(x: Tensor, linear: nn.Linear, norm: nn.BatchNorm1d, **options) -> Tensor:
    return ops.linear_bn_relu(
        x,
        linear.weight,
        norm.weight,
        norm.bias,
        norm.running_mean,
        norm.running_var,
        training=norm.training,
        **options,
    )


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("relu", [True, False], ids=["relu", "linear"])
def test_training_and_evaluation_are_torchs(relu, impl):
    linear, norm = module(6, 4)
    _, mine = module(6, 4)
    x = torch.randn(3, 7, 6, dtype=torch.float64)
    for _ in range(2):  # the running statistics move twice
        expected = norm(linear(x).flatten(0, 1)).view(3, 7, 4)
        actual = ours(x, linear, mine, relu=relu, impl=impl)
        assert_matches(actual, expected.relu() if relu else expected, torch.float64, "y")
    assert_matches(mine.running_mean, norm.running_mean, torch.float64, "running_mean")
    assert_matches(mine.running_var, norm.running_var, torch.float64, "running_var")
    norm.eval()
    mine.eval()
    before = mine.running_var.clone()
    expected = norm(linear(x).flatten(0, 1)).view(3, 7, 4)
    actual = ours(x, linear, mine, relu=relu, impl=impl)
    assert_matches(actual, expected.relu() if relu else expected, torch.float64, "y, eval")
    assert torch.equal(mine.running_var, before)


@pytest.mark.parametrize("impl", IMPLS)
def test_running_statistics_are_optional_in_training(impl):
    linear, norm = module(6, 4)
    x = torch.randn(5, 6, dtype=torch.float64)
    y = ops.linear_bn_relu(
        x, linear.weight, norm.weight, norm.bias, None, None, training=True, impl=impl
    )
    assert torch.equal(y, ours(x, linear, norm, impl=impl))


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_gradcheck_of_the_reference(training):
    linear, norm = module(3, 4)
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor, weight: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        running = (None, None) if training else (norm.running_mean, norm.running_var)
        return reference(x, weight, gamma, beta, *running, training=training)

    assert torch.autograd.gradcheck(run, (x, linear.weight, norm.weight, norm.bias))


@pytest.mark.parametrize("impl", IMPLS)
def test_half_precision_statistics_do_not_overflow(impl):
    linear, norm = module(8, 4, torch.float32)
    x = (300 * torch.randn(64, 8)).half()  # sums of squares far beyond 65504
    y = ours(x, linear, norm, relu=False, impl=impl)
    assert y.dtype == torch.float16
    assert y.isfinite().all()
    assert norm.running_var.isfinite().all()


@pytest.mark.parametrize("impl", IMPLS)
def test_a_constant_feature_becomes_beta(impl):
    linear, norm = module(3, 2)
    with torch.no_grad():
        linear.weight[0] = 0
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    y = ours(x, linear, norm, relu=False, impl=impl)
    assert_matches(y[:, 0], norm.bias[0].expand(5), torch.float64, "y")
    (dx,) = torch.autograd.grad(y.square().sum(), x)
    assert dx.isfinite().all()


@pytest.mark.parametrize("impl", IMPLS)
def test_no_rows_are_fine_in_evaluation_only(impl):
    linear, norm = module(6, 4)
    x = torch.zeros(3, 0, 6, dtype=torch.float64)
    with pytest.raises(ValueError, match="0 rows in training"):
        ours(x, linear, norm, impl=impl)
    norm.eval()
    assert ours(x, linear, norm, impl=impl).shape == (3, 0, 4)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(6)}, r"x is \[6\], expected \[..., 6\]"),
        ({"x": torch.zeros(5, 7)}, r"x is \[5, 7\], expected \[..., 6\]"),
        ({"x": torch.zeros(5, 6, dtype=torch.int64)}, "torch.int64, supported are float64"),
        ({"x": torch.zeros(1, 6)}, "1 rows in training"),
        ({"weight": torch.zeros(4, 6, 1)}, r"expected \[M, F\]"),
        ({"gamma": torch.ones(3)}, r"gamma is \[3\], expected \[4\]"),
        ({"running_var": torch.ones(4, 1)}, r"running_var is \[4, 1\]"),
        ({"training": False, "running_mean": None}, "evaluation needs running_mean"),
        ({"beta": torch.zeros(4, device="meta")}, "several devices .*beta on meta"),
    ],
)
def test_bad_input_is_named(change, message, impl):
    call = {
        "x": torch.zeros(5, 6),
        "weight": torch.zeros(4, 6),
        "gamma": torch.ones(4),
        "beta": torch.zeros(4),
        "running_mean": torch.zeros(4),
        "running_var": torch.ones(4),
        "training": True,
        **change,
    }
    with pytest.raises(ValueError, match=f"linear_bn_relu: .*{message}"):
        ops.linear_bn_relu(**call, impl=impl)
