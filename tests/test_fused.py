"""FusedSequential and fuse: torch's layers, names and statistics; PatchNet trains on them."""

import copy

import pytest
import torch
from tolerances import assert_compiles_whole, assert_matches
from torch import Tensor, nn

from bagssl_fast import ops
from bagssl_fast.models.blocks import is_block
from bagssl_fast.models.fused import FusedSequential, fuse
from bagssl_fast.models.patchnet import PatchNet
from bagssl_fast.ops import Deferred


def plain(seed: int = 0) -> nn.Sequential:
    """Two blocks, a layer between them, and a convolution with a bias at the end."""
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 4, 2, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.AvgPool2d(2, 1),
        nn.Conv2d(8, 12, 3, padding=1, bias=False),
        nn.BatchNorm2d(12, momentum=None, eps=1e-3),
        nn.ReLU(),
        nn.Conv2d(12, 5, 1),
    )
    for layer in (net[1], net[5]):
        nn.init.uniform_(layer.weight, 0.5, 1.5)
        nn.init.normal_(layer.bias)
    return net


def pictures(n: int = 6, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 3, 16, 16, generator=generator)
    return x.contiguous(memory_format=torch.channels_last)


def test_a_fused_network_is_the_plain_one():
    net = plain()
    fused = fuse(copy.deepcopy(net))
    assert type(fused) is FusedSequential
    for _ in range(3):  # momentum None: the running statistics are means over all batches
        x = pictures(seed=_)
        expected, actual = net(x), fused(x)
        assert_matches(actual, expected, torch.float32, "y", slack=3)
    expected.square().sum().backward()
    actual.square().sum().backward()
    for (name, p), q in zip(net.named_parameters(), fused.parameters(), strict=True):
        assert_matches(q.grad, p.grad, torch.float32, name, slack=10)
    for (name, p), q in zip(net.named_buffers(), fused.buffers(), strict=True):
        torch.testing.assert_close(q, p, msg=name)
    net.eval()
    fused.eval()
    assert_matches(fused(x), net(x), torch.float32, "eval", slack=3)


def test_state_dicts_fit_both_ways():
    net, other = plain(), fuse(plain(seed=1))
    assert list(net.state_dict()) == list(other.state_dict())
    other.load_state_dict(net.state_dict())
    back = plain(seed=2)
    back.load_state_dict(other.state_dict())
    for name, value in net.state_dict().items():
        assert torch.equal(value, back.state_dict()[name]), name


def test_fusing_is_in_place_and_reaches_inside():
    net = nn.ModuleDict({"a": nn.Sequential(plain(), nn.Flatten()), "b": nn.Linear(3, 3)})
    weight = net["a"][0][0].weight
    assert fuse(net) is net
    assert type(net["a"]) is nn.Sequential and type(net["a"][0]) is FusedSequential
    assert net["a"][0][0].weight is weight
    with pytest.raises(ValueError, match=r"fuse: Sequential has no Sequential with a Conv2d"):
        fuse(nn.Sequential(nn.Linear(3, 3)))


@pytest.mark.parametrize(
    "layers",
    [
        (nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU()),
        (nn.Conv2d(4, 4, 3, groups=2, bias=False), nn.BatchNorm2d(4), nn.ReLU()),
        (nn.Conv2d(4, 4, 3, dilation=2, bias=False), nn.BatchNorm2d(4), nn.ReLU()),
        (nn.Conv2d(4, 4, 3, stride=(1, 2), bias=False), nn.BatchNorm2d(4), nn.ReLU()),
        (nn.Conv2d(4, 4, 3, padding="same", bias=False), nn.BatchNorm2d(4), nn.ReLU()),
        (nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular", bias=False),
         nn.BatchNorm2d(4), nn.ReLU()),
        (nn.Conv2d(4, 4, 3, bias=False), nn.BatchNorm2d(4, affine=False), nn.ReLU()),
        (nn.Conv2d(4, 4, 3, bias=False), nn.BatchNorm2d(4), nn.SiLU()),
        (nn.Conv2d(4, 4, 3, bias=False), nn.ReLU(), nn.BatchNorm2d(4)),
        (nn.Conv2d(4, 4, 3, bias=False), nn.BatchNorm2d(4)),
    ],
)  # fmt: skip
def test_what_does_not_fit_runs_as_it_is(layers):
    assert not is_block(*layers)
    net = nn.Sequential(*layers)
    fused = FusedSequential(*layers)
    x = torch.randn(3, 4, 7, 7)
    assert torch.equal(fused(x), net(x))


def test_hooks_are_called():
    net, seen = fuse(plain()), []
    net[1].register_forward_hook(lambda module, given, out: seen.append(out.shape))
    net(pictures())
    assert len(seen) == 1


def test_statistics_may_be_frozen_or_absent():
    net = plain()
    fused = fuse(copy.deepcopy(net))
    for module in (net, fused):
        module[1].eval()
        module[5].track_running_stats = False
        module[5].running_mean = module[5].running_var = module[5].num_batches_tracked = None
    x = pictures()
    assert_matches(fused(x), net(x), torch.float32, "training", slack=3)
    assert torch.equal(fused[1].running_mean, torch.zeros(8))
    net.eval()
    fused.eval()
    assert_matches(fused(x), net(x), torch.float32, "eval", slack=3)


@pytest.mark.parametrize("hypercolumn", [False, True])
def test_patchnet_trains_as_plain_torch_does(hypercolumn):
    """A short training on either way: the same losses, and a plain forward under the reference."""
    torch.manual_seed(0)
    start = PatchNet(16, width=16, hypercolumn=hypercolumn)
    start = start.to(memory_format=torch.channels_last)
    targets, curves = torch.rand(2, 32, start.head_dim), {}
    for impl in (None, "reference"):
        net = copy.deepcopy(start)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.5, momentum=0.9)
        losses = []
        with ops.use_impl(impl):
            for step in range(12):
                h = net(pictures(32, seed=step % 2))
                loss = (h[:, -net.head_dim :] - targets[step % 2]).square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
        curves[impl] = torch.tensor(losses)
    assert curves[None][-1] < 0.8 * curves[None][0]
    torch.testing.assert_close(curves[None], curves["reference"], rtol=2e-4, atol=0)


def test_patchnet_keeps_no_activation_that_is_normalized():
    net = PatchNet(16, width=16).to(memory_format=torch.channels_last)
    with ops.use_impl("cpu"):
        outs = [x for _, x in net.layers.outputs(pictures())]
    assert all(isinstance(x, Deferred) for x in outs)
    with ops.use_impl("reference"):
        assert all(isinstance(x, Tensor) for _, x in net.layers.outputs(pictures()))


def test_patchnet_compiles_whole():
    net = PatchNet(16, width=16, hypercolumn=True).to(memory_format=torch.channels_last)
    assert_compiles_whole(net, pictures())
