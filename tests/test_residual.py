"""Fused ResNets: equal to torchvision's and timm's, their names kept, misfits refused by name."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from tolerances import assert_compiles_whole, assert_matches
from torch import Tensor, nn

from bagssl_fast.distributed.sync_bn import SharedBatchNorm, share_batch_norm
from bagssl_fast.models.encoders import build_encoder
from bagssl_fast.models.fused import fuse
from bagssl_fast.models.residual import ResidualBlock

torchvision = pytest.importorskip("torchvision")
timm = pytest.importorskip("timm")


def small(net: nn.Module) -> nn.Module:
    """With the stem for small patches."""
    net.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    net.maxpool = nn.Identity()
    return net


NETS: dict[str, Callable[[], nn.Module]] = {
    "torchvision 18, small stem": lambda: small(torchvision.models.resnet18(num_classes=7)),
    "torchvision 18": lambda: torchvision.models.resnet18(num_classes=7),
    "torchvision 50": lambda: torchvision.models.resnet50(num_classes=7),
    "timm 18": lambda: timm.create_model("resnet18", num_classes=0),
    "timm 50": lambda: timm.create_model("resnet50", num_classes=7),
}


def build(name: str) -> nn.Module:
    """A network whose channels are positive throughout or nowhere: no rounding flips a ReLU.

    (A flipped one shows in gradients, up to 1e-2 of them, in plain torch as in ours. So does a
    pixel that another one of its window overtakes: the pool takes means.)
    """
    torch.manual_seed(0)
    net = NETS[name]()
    if not isinstance(net.maxpool, nn.Identity):
        net.maxpool = nn.AvgPool2d(3, 2, 1)
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.0)
                module.bias.copy_(12.0 * torch.randint(0, 2, module.bias.shape) - 6)
    return net.to(memory_format=torch.channels_last)


def pictures(n: int = 8, side: int = 32, seed: int = 1) -> Tensor:
    x = torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(seed))
    return x.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", NETS)
def test_a_fused_resnet_is_the_plain_one(name):
    plain = build(name)
    fused, double = fuse(copy.deepcopy(plain)), copy.deepcopy(plain).double()
    assert sum(isinstance(m, ResidualBlock) for m in fused.modules()) == (16 if "50" in name else 8)
    x = pictures(side=32 if "small" in name else 64)
    dy = torch.randn(plain(x).shape, generator=torch.Generator().manual_seed(2))
    results = []
    for model, dtype in ((double, torch.float64), (plain, None), (fused, None)):
        for key, buffer in build(name).named_buffers():
            model.get_buffer(key).copy_(buffer)
        out = model(x.to(dtype))
        gradients = torch.autograd.grad(out, [*model.parameters()], dy.to(dtype))
        results.append([out.detach(), *gradients, *(b.clone() for b in model.buffers())])
    names = [
        "output",
        *(k for k, _ in double.named_parameters()),
        *(k for k, _ in double.named_buffers()),
    ]
    for key, exact, theirs, ours in zip(names, *results, strict=True):
        # Sums that nearly cancel lose digits in any order: torch's own error is the measure.
        error, their_error = (
            float((v.double() - exact).norm() / exact.double().norm().clamp_min(1e-8))
            for v in (ours, theirs)
        )
        assert error <= 3 * their_error + 5e-6, f"{key}: {error:.1e}, torch's own {their_error:.1e}"
    fused.eval()
    double.eval()
    assert_matches(fused(x), double(x.double()), torch.float32, "eval", slack=5)


@pytest.mark.parametrize("name", ["torchvision 18, small stem", "timm 18"])
def test_state_dicts_copies_and_pickles(name):
    net, x = build(name), pictures()
    fused = fuse(copy.deepcopy(net))
    assert list(fused.state_dict()) == list(net.state_dict())
    assert isinstance(fused, type(net))  # what the library's class can do, it still can
    fused.load_state_dict(net.state_dict())
    net.load_state_dict(fused.state_dict())
    expected = fused.eval()(x)
    for again in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused)), fuse(fused)):
        assert type(again) is type(fused)
        assert torch.equal(again(x), expected)
    copied = copy.deepcopy(fused)
    with torch.no_grad():
        copied.conv1.weight.zero_()
    assert torch.equal(fused(x), expected)


def test_every_block_of_an_encoder_is_fused():
    for name, size, blocks in (("resnet18", 32, 8), ("resnet50", 72, 16), ("resnet34", 64, 16)):
        net = build_encoder(name, size)
        assert sum(isinstance(m, ResidualBlock) for m in net.modules()) == blocks, name
    for name, options in (("resnet50", {"groups": 2}), ("resnet18d", {}), ("seresnet18", {})):
        net = build_encoder(name, 32, options=options)  # runs as it is
        assert not any(isinstance(m, ResidualBlock) for m in net.modules()), name


@pytest.mark.parametrize(
    ("make", "place"),
    [
        (lambda: torchvision.models.resnext50_32x4d(), r"layer1\.0\.conv2 \(Conv2d\)"),
        (lambda: torchvision.models.resnet18(norm_layer=lambda c: nn.GroupNorm(4, c)), "bn1"),
        (lambda: timm.create_model("resnet18d"), r"conv1 \(Sequential\)"),
        (lambda: timm.create_model("seresnet18"), r"layer1\.0\.se \(SEModule\)"),
        (lambda: timm.create_model("resnet18", act_layer=nn.SiLU), r"act1 \(SiLU\)"),
        (lambda: timm.create_model("resnet18", drop_path_rate=0.2), r"layer1\.1\.drop_path"),
        (lambda: nn.Sequential(nn.Linear(3, 3)), r"its first layer is 0 \(Linear\)"),
    ],
)
def test_misfits_are_refused_by_name(make, place):
    net = make()
    classes = [type(m) for m in net.modules()]
    with pytest.raises(ValueError, match=f"fuse: .*{place}"):
        fuse(net)
    assert [type(m) for m in net.modules()] == classes  # nothing was changed


@pytest.mark.parametrize("watched", ["layer1", "layer1.0", "layer2.0.conv1", "bn1", "layer2.0.bn2"])
def test_hooks_are_called_with_tensors(watched):
    net, x = build("torchvision 18, small stem"), pictures()
    fused, seen = fuse(copy.deepcopy(net)), []
    for model in (net, fused):
        model.get_submodule(watched).register_forward_hook(
            lambda module, given, out: seen.append(out)
        )
    expected, actual = net(x), fused(x)
    assert len(seen) == 2
    torch.testing.assert_close(seen[1], seen[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_frozen_statistics_shared_ones_and_replaced_layers():
    net, x = build("torchvision 18, small stem"), pictures()
    fused = fuse(copy.deepcopy(net))
    for model in (net, fused):
        model.layer1[0].bn1.eval()
        model.layer3[1].conv1.padding_mode = "reflect"  # a block that no longer fits
        share_batch_norm(model, None)
    assert isinstance(fused.layer1[0].bn1, SharedBatchNorm)
    torch.testing.assert_close(fused(x), net(x), rtol=1e-4, atol=1e-4)
    for (key, p), q in zip(net.named_buffers(), fused.buffers(), strict=True):
        torch.testing.assert_close(q, p, rtol=1e-4, atol=1e-5, msg=key)


def test_autocast_and_other_dtypes():
    net, x = build("torchvision 18, small stem"), pictures()
    fused = fuse(copy.deepcopy(net))
    with torch.autocast("cpu"):
        torch.testing.assert_close(fused(x), net(x), rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(fused.double()(x.double()), net.double()(x.double()))


def test_timms_other_ways_through_the_network():
    net, x = build("timm 18"), pictures(side=64)
    fused = fuse(copy.deepcopy(net))
    for model in (net, fused):
        model.eval()
    expected, actual = net.forward_intermediates(x), fused.forward_intermediates(x)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    for model in (net, fused):
        model.train()
        model.set_grad_checkpointing()
    torch.testing.assert_close(fused(x), net(x), rtol=1e-4, atol=1e-4)


def test_a_fused_resnet_compiles_whole():
    net = fuse(build("torchvision 18, small stem"))
    assert_compiles_whole(net, pictures())
