"""Encoders and the bag model: dense equals patch by patch, shapes, and what wrong input says."""

import builtins
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bagssl_fast.models.bag_model import BagModel
from bagssl_fast.models.encoders import build_encoder
from bagssl_fast.models.heads import EMPHead, Projector
from bagssl_fast.models.patchnet import PatchMLP, PatchNet


def images(n: int, height: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(n, 3, height, width, generator=torch.Generator().manual_seed(seed))


def cut(x: Tensor, size: int, stride: int) -> Tensor:
    """All patches on the grid, one by one: `[P, N, C, size, size]`, row-major."""
    tops = range(0, x.shape[2] - size + 1, stride)
    lefts = range(0, x.shape[3] - size + 1, stride)
    return torch.stack([x[:, :, i : i + size, j : j + size] for i in tops for j in lefts])


def shake(net: nn.Module, seed: int = 0) -> nn.Module:
    """Gives every norm statistics and an affine of its own, so that eval mode is not trivial."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*net.named_parameters(), *net.named_buffers()]:
            if "var" in name or name.endswith("gamma"):
                tensor.copy_(torch.rand(tensor.shape, generator=g) + 0.5)
            elif tensor.dim() == 1:
                tensor.copy_(torch.randn(tensor.shape, generator=g) * 0.3)
    return net


def assert_dense_is_patchwise(net: Any, x: Tensor, stride: int) -> None:
    shake(net).eval()
    with torch.no_grad():
        patches = cut(x, net.patch_size, stride)
        want = net(patches.flatten(0, 1)).unflatten(0, patches.shape[:2])
        got = net.dense(x, stride)
    assert got.shape == want.shape
    assert want.std() > 1e-2
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("stride", [1, 2, 3, 4, 5, 6, 8, 12, 16, 40])
def test_patchnet_dense_is_patch_by_patch(stride: int) -> None:
    assert_dense_is_patchwise(PatchNet(16, width=8), images(2, 32, 32), stride)


@pytest.mark.parametrize("patch_size", [8, 12, 16, 20, 24, 32, 64])
@pytest.mark.parametrize("stride", [1, 3, 4, 8])
def test_patchnet_dense_of_every_patch_size(patch_size: int, stride: int) -> None:
    x = images(2, patch_size + 9, patch_size + 4)
    assert_dense_is_patchwise(PatchNet(patch_size, width=4, depth=1), x, stride)


def test_patchnet_encodes_all_289_positions() -> None:
    net, x = PatchNet(16, width=16), images(2, 32, 32)
    assert_dense_is_patchwise(net, x, 1)
    assert net.dense(x, 1).shape == (289, 2, net.feature_dim)


def test_patchnet_dense_of_channels_last_input() -> None:
    net = PatchNet(16, width=8).to(memory_format=torch.channels_last)
    assert_dense_is_patchwise(net, images(3, 40, 33).to(memory_format=torch.channels_last), 4)


def test_patchnet_dense_gradient_is_patch_by_patch() -> None:
    net, x = PatchNet(16, width=8).double(), images(2, 28, 24).double()
    shake(net).eval()  # running statistics: the two graphs compute the same function
    patches = cut(x, 16, 4)
    probe = torch.randn(len(patches), 2, net.feature_dim, dtype=torch.float64)
    params = list(net.parameters())
    want = torch.autograd.grad((net(patches.flatten(0, 1)).view_as(probe) * probe).sum(), params)
    got = torch.autograd.grad((net.dense(x, 4) * probe).sum(), params)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-9, atol=1e-9)


def test_patchnet_training_statistics_agree_where_patches_do_not_overlap() -> None:
    x = images(4, 32, 32)
    net = PatchNet(16, width=8)
    # A patch's first map covers all its pixels, but those between the maps of neighboring
    # patches belong to none: only an image of one patch has equal statistics throughout.
    one = x[:, :, :16, :16]
    torch.testing.assert_close(net.train().dense(one, 16)[0], net(one), rtol=1e-5, atol=1e-5)


def test_patchnet_receptive_field_is_exactly_the_patch() -> None:
    net = PatchNet(16, width=8).eval()
    x = images(1, 32, 32).requires_grad_()
    (grad,) = torch.autograd.grad(net.dense(x, 4)[6].sum(), x)  # row 1, column 1
    seen = grad[0].abs().sum(0) > 0
    inside = torch.zeros(32, 32, dtype=torch.bool)
    inside[4:20, 4:20] = True
    assert not (seen & ~inside).any()
    assert seen[4].any() and seen[19].any() and seen[:, 4].any() and seen[:, 19].any()


@pytest.mark.parametrize("stem", [6, 96, 100])
def test_patchnet_stem_starts_at_the_cosine_basis(stem: int) -> None:
    weight = PatchNet(16, width=8, stem=stem).layers[0].weight.detach()
    n = min(stem // 2, 48)
    filters = weight[:n].flatten(1)
    torch.testing.assert_close(filters @ filters.T, torch.eye(n), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(weight[n : 2 * n], -weight[:n])
    assert weight[0].std() < 1e-6  # the mean of all pixels
    assert PatchNet(16, width=8, in_channels=1)(torch.randn(2, 1, 16, 16)).shape == (2, 64)


@pytest.mark.parametrize(("patch_size", "stride"), [(6, 1), (6, 4), (8, 3), (16, 4)])
def test_patchmlp_dense_is_patch_by_patch(patch_size: int, stride: int) -> None:
    assert_dense_is_patchwise(PatchMLP(patch_size, width=24), images(2, 21, 18), stride)


def test_patchmlp_reads_uint8_images_at_positions() -> None:
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    net = PatchMLP(6, width=32, mean=mean, std=std)
    shake(net).eval()
    raw = torch.randint(0, 256, (3, 20, 18, 3), dtype=torch.uint8)
    x = ((raw / 255 - torch.tensor(mean)) / torch.tensor(std)).permute(0, 3, 1, 2)
    positions = torch.tensor([[0, 0], [3, 5], [14, 12]])
    want = torch.stack([net(x[:, :, i : i + 6, j : j + 6]) for i, j in positions.tolist()])
    torch.testing.assert_close(net(raw, positions), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["patchnet", "patchmlp"])
def test_build_encoder_ours(name: str) -> None:
    net = build_encoder(name, 8, 16, options={"depth": 2})
    assert net(images(3, 8, 8)).shape == (3, net.feature_dim)
    assert net.patch_size == 8


@pytest.mark.parametrize(
    ("name", "patch_size", "dim"), [("resnet18", 32, 512), ("resnet50", 72, 2048)]
)
def test_build_encoder_torchvision(name: str, patch_size: int, dim: int) -> None:
    pytest.importorskip("torchvision")
    net = build_encoder(name, patch_size=patch_size)
    assert net.feature_dim == dim
    small = patch_size <= 64
    assert net.net.conv1.kernel_size == ((3, 3) if small else (7, 7))
    assert isinstance(net.net.maxpool, nn.Identity) == small
    assert net(images(2, patch_size, patch_size)).shape == (2, dim)


@pytest.mark.parametrize(("name", "patch_size"), [("resnet10t", 32), ("vit_tiny_patch16_224", 48)])
def test_build_encoder_timm(name: str, patch_size: int) -> None:
    pytest.importorskip("timm")
    net = build_encoder(name, patch_size=patch_size)
    assert net.training
    assert net(images(2, patch_size, patch_size)).shape == (2, net.feature_dim)


def test_projector_is_vicregs() -> None:
    head = Projector(12, hidden=32, out=20)
    assert head(torch.randn(3, 5, 12)).shape == (3, 5, 20)
    assert head.last.bias is None
    assert len(head.hidden) == 2
    assert Projector(12, num_layers=1)(torch.randn(4, 12)).shape == (4, 2048)
    z = Projector(12, hidden=64, normalize=True)(torch.randn(5, 12))
    torch.testing.assert_close(z.norm(dim=1), torch.ones(5))


def test_projector_equals_torch_layers() -> None:
    head = Projector(6, hidden=8, out=4, num_layers=2)
    linear, norm = nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8)
    linear.weight.data.copy_(head.hidden[0].weight)
    want = nn.Sequential(linear, norm, nn.ReLU(), head.last)
    x = torch.randn(10, 6)
    torch.testing.assert_close(head(x), want(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(head.hidden[0].running_var, norm.running_var)
    torch.testing.assert_close(head.eval()(x), want.eval()(x), rtol=1e-5, atol=1e-5)


def test_emp_head_embeds_with_pre_feature() -> None:
    net = BagModel(build_encoder("patchmlp", 8, width=16), EMPHead(16, 48, 40, 24))
    assert (net.embedding_dim, net.projection_dim) == (48, 24)
    h, z = net(torch.randn(3, 4, 3, 8, 8))
    assert h.shape == (3, 4, 48) and z.shape == (3, 4, 24)
    assert (h >= 0).all()
    torch.testing.assert_close(z.norm(dim=-1), torch.ones(3, 4))
    default = EMPHead(8)
    assert (default.embedding_dim, default.out_dim) == (4096, 1024)


def test_bag_model_dense_is_slot_major() -> None:
    net = PatchNet(16, width=8)
    model = BagModel(net, Projector(net.feature_dim, 16), dense=True, stride=8)
    shake(model).eval()
    views = torch.randn(2, 3, 3, 32, 32)
    h, z = model(views)
    assert h.shape == (2 * 9, 3, net.feature_dim) and z.shape == (2 * 9, 3, 16)
    patches = torch.cat([cut(views[0], 16, 8), cut(views[1], 16, 8)])
    want, _ = BagModel(net, model.head).eval()(patches)
    torch.testing.assert_close(h, want, rtol=1e-5, atol=1e-5)


WRONG = {
    "unknown encoder": (lambda: build_encoder("resnet19"), "unknown encoder 'resnet19'.*resnet18"),
    "no such weights": (lambda: build_encoder("patchnet", pretrained=True), "no published weights"),
    "weights of the 7x7 stem": (
        lambda: build_encoder("resnet18", 32, pretrained=True),
        "CIFAR stem",
    ),
    "width of a resnet": (lambda: build_encoder("resnet18", width=8), "leave it out"),
    "patch size 0": (lambda: build_encoder("patchmlp", 0), "at least 1 pixel"),
    "odd patchnet": (lambda: PatchNet(18), "multiple of 4.*patchmlp"),
    "stem 0": (lambda: PatchNet(16, 8, stem=0), "at least 1"),
    "depth of too few stages": (lambda: PatchNet(16, depth=(1,)), "2 of them"),
    "patch larger than image": (lambda: PatchNet(16, 4).dense(images(1, 32, 12)), "smaller than"),
    "stride 0": (lambda: PatchNet(16, 4).dense(images(1, 32, 32), 0), "stride 0.*at least 1"),
    "patches of another size": (lambda: PatchNet(16, 4)(images(1, 32, 32)), r"\.dense\(images"),
    "uint8 patches": (lambda: PatchMLP(8)(images(1, 8, 8).byte()), "normalized float"),
    "gray images": (lambda: PatchNet(16, 4).dense(torch.zeros(1, 1, 32, 32)), r"\[N, 3, H, W\]"),
    "empty projector": (lambda: Projector(8, num_layers=0), "at least 1"),
    "empty emp head": (lambda: EMPHead(8, out=0), "at least 1"),
    "dense without a dense form": (
        lambda: BagModel(nn.Identity(), Projector(8), dense=True),
        "cannot encode whole images.*patchnet",
    ),
    "stride 0 of a model": (
        lambda: BagModel(PatchNet(16, 4), Projector(32), dense=True, stride=0),
        "stride 0",
    ),
    "a bag without slots": (
        lambda: BagModel(PatchNet(16, 4), Projector(32))(images(1, 16, 16)),
        r"bags \[P, B, C, h, w\]",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_names_the_how_to_fix(case: str) -> None:
    call, text = WRONG[case]
    with pytest.raises(ValueError, match=text):
        call()


@pytest.mark.parametrize(("name", "package"), [("resnet18", "torchvision"), ("vit_tiny", "timm")])
def test_missing_package_says_what_to_install(
    name: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without(module: str, *args: Any, **kwargs: Any) -> Any:
        if module.split(".")[0] == package:
            raise ImportError(module)
        return real(module, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ValueError, match=f"pip install {package}"):
        build_encoder(name, patch_size=32)


@pytest.mark.parametrize("stride", [1, 3, 4, 8])
def test_hypercolumn_dense_equals_patch_by_patch(stride: int) -> None:
    net = PatchNet(16, width=8, stem=12, feature_dim=20, hypercolumn=True).eval()
    assert net.feature_dim == 12 + 8 + 16 + 16 + 20
    x = images(2, 24, 24)
    cut = x.unfold(2, 16, stride).unfold(3, 16, stride).permute(2, 3, 0, 1, 4, 5)
    expected = net(cut.flatten(0, 2)).unflatten(0, (-1, 2))
    torch.testing.assert_close(net.dense(x, stride), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("stride", [1, 3, 4, 8])
@pytest.mark.parametrize("name", ["patchnet", "patchmlp"])
def test_dense_maps_give_chosen_patches_and_their_mean(name: str, stride: int) -> None:
    """An evaluation's grid and its bag, without the embeddings of all other positions."""
    options = {"stem": 12, "feature_dim": 20, "hypercolumn": True} if name == "patchnet" else {}
    net = shake(build_encoder(name, 16, width=8, options=options)).eval()
    x = images(2, 32, 32)
    positions = 16 // stride + 1
    picked = [0, positions // 2, positions - 1]
    with torch.no_grad():
        maps = net.dense_maps(x, stride)
        want = net.dense(x, stride).unflatten(0, (positions, positions))
    want = want[picked][:, picked].flatten(0, 1)
    torch.testing.assert_close(maps.patches(picked), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(maps.means([picked])[0], want.mean(0), rtol=1e-5, atol=1e-5)
    first, rest = picked[:1], picked[1:]
    regions = want.unflatten(0, (3, 3))
    regions = [
        regions[rows][:, columns].mean((0, 1))
        for rows in ([0], [1, 2])
        for columns in ([0], [1, 2])
    ]
    torch.testing.assert_close(
        maps.means([first, rest]), torch.stack(regions), rtol=1e-5, atol=1e-5
    )


def test_a_bag_under_autocast_is_averaged_in_float32() -> None:
    net = PatchNet(16, width=8).eval()
    x = images(2, 32, 32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        maps = net.dense_maps(x, 4)
        (bag,) = maps.means([range(5)])
    assert maps.maps[-1].dtype == torch.bfloat16 and bag.dtype == torch.float32
    exact = maps.maps[-1].double().flatten(1, 2)  # 7 x 7 entries, of which a patch has 3 x 3
    weights = torch.tensor([1, 2, 3, 3, 3, 2, 1], dtype=torch.float64) / 15
    weights = torch.outer(weights, weights).flatten()
    torch.testing.assert_close(bag.double(), weights @ exact, rtol=1e-6, atol=1e-6)


def test_hypercolumn_adds_to_the_embedding_and_leaves_training_as_it_was() -> None:
    """The lower layers' means are read, not trained through: same top, same z, same gradients."""
    results = []
    for hypercolumn in (False, True):
        torch.manual_seed(0)
        net = PatchNet(16, width=8, stem=12, feature_dim=20, hypercolumn=hypercolumn)
        model = BagModel(net, Projector(net.head_dim, 16), dense=True, stride=8)
        h, z = model(images(2 * 3, 24, 24).unflatten(0, (2, 3)))
        assert h.shape[-1] == model.embedding_dim == net.feature_dim
        z.square().sum().backward()
        results.append((h[..., -20:], z, [p.grad for p in model.parameters()]))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
