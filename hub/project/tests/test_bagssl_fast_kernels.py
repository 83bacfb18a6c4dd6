"""Each function against the same formula in plain torch, value and gradients."""

import pytest
import torch
import torch.nn.functional as F

pytestmark = pytest.mark.kernels_ci


def draw(device, *shape, seed=0):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return x.to(device).requires_grad_()


def same(got, want, inputs):
    """Values, and gradients under one random weighting of them."""
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    weights = draw(got.device, *got.shape, seed=9).detach()
    pairs = zip(
        torch.autograd.grad(got, inputs, weights),
        torch.autograd.grad(want, inputs, weights),
        strict=True,
    )
    for mine, theirs in pairs:
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)


def test_linear_bn_relu(kernel, device):
    x, w = draw(device, 2, 9, 5), draw(device, 7, 5, seed=1)
    gamma, beta = draw(device, 7, seed=2), draw(device, 7, seed=3)
    stats = [torch.zeros(7, device=device), torch.ones(7, device=device)]
    other = [s.clone() for s in stats]
    got = kernel.linear_bn_relu(x, w, gamma, beta, *stats, training=True)
    want = F.batch_norm(F.linear(x, w).flatten(0, 1), *other, gamma, beta, training=True)
    same(got, want.relu().view_as(got), (x, w, gamma, beta))
    torch.testing.assert_close(stats, other)
    layer = kernel.layers.LinearBNReLU()
    layer.__dict__.update(
        weight=w, gamma=gamma, beta=beta, running_mean=stats[0], running_var=stats[1]
    )
    layer.__dict__.update(momentum=0.1, eps=1e-5)
    torch.testing.assert_close(layer(x), got)


def official(z, eps=1e-4):
    """Bardes et al.'s code for two views."""
    a, b = z
    terms = [F.mse_loss(a, b), 0, 0]
    for x in (a - a.mean(0), b - b.mean(0)):
        terms[1] = terms[1] + F.relu(1 - (x.var(0) + eps).sqrt()).mean() / 2
        cov = x.T @ x / (len(x) - 1)
        terms[2] = terms[2] + (cov.square().sum() - cov.diagonal().square().sum()) / x.shape[1]
    return torch.stack(terms)


@pytest.mark.parametrize("shape", [(2, 6, 10), (2, 12, 5)], ids=str)
def test_vicreg(kernel, device, shape):
    z = draw(device, *shape)
    same(torch.stack(kernel.vicreg(z)), official(z), (z,))
    layer = kernel.layers.VICRegLoss()
    layer.lambda_param, layer.mu_param, layer.nu_param, layer.eps = 25.0, 25.0, 1.0, 1e-4
    layer.gather_distributed = False
    want = (official(z) * torch.tensor([25.0, 25.0, 1.0], device=device)).sum()
    torch.testing.assert_close(layer(*z), want, rtol=1e-4, atol=1e-4)


def test_tcr(kernel, device):
    z = draw(device, 3, 6, 10)
    gram = z.mT @ z * (10 / (6 * 0.2))
    want = 0.5 * torch.logdet(torch.eye(10, device=device) + gram)
    same(kernel.tcr(z, eps=0.2), want, (z,))


def test_bag_pool(kernel, device):
    x = draw(device, 4, 3, 10)
    mean = x.mean(0)
    pooled, _, _ = kernel.bag_pool(x, deviation=True, cosine=True)
    same(pooled, mean, (x,))
    _, deviation, _ = kernel.bag_pool(x, deviation=True, cosine=True)
    same(deviation, (x - mean).square().mean((0, 2)), (x,))
    _, nothing, cosine = kernel.bag_pool(x, cosine=True)
    same(cosine, F.cosine_similarity(x, x.mean(0)[None], dim=2).mean(0), (x,))
    assert nothing is None


def test_patch_embed(kernel, device):
    generator = torch.Generator().manual_seed(4)
    images = torch.randint(256, (2, 9, 8, 3), generator=generator, dtype=torch.uint8).to(device)
    w, bias = draw(device, 6, 3, 4, 4), draw(device, 6, seed=1)
    positions = torch.tensor([[0, 0], [5, 4], [2, 1]], device=device)
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    got = kernel.patch_embed(images, w, bias, positions, mean=mean, std=std, relu=True)
    x = images.permute(0, 3, 1, 2).float() / 255
    x = (x - x.new_tensor(mean).view(3, 1, 1)) / x.new_tensor(std).view(3, 1, 1)
    cut = [x[:, :, i : i + 4, j : j + 4] for i, j in positions.tolist()]
    want = torch.stack([F.conv2d(c, w, bias).flatten(1) for c in cut]).relu()
    same(got, want, (w, bias))


def test_patch_views(kernel, device):
    generator = torch.Generator().manual_seed(4)
    images = [
        torch.randint(256, (h, w, 3), generator=generator, dtype=torch.uint8).to(device)
        for h, w in ((20, 24), (17, 31))
    ]
    params = torch.zeros(1, 2, 16)
    params[..., :4] = torch.tensor([3.0, 5.0, 14.0, 12.0])
    params[0, 1, 4] = 1  # the second one flipped
    params[..., 5:8], params[..., 9], params[..., 12] = 1, -1, 256
    got = kernel.patch_views(images, params, size=8, mean=(0.0,) * 3, std=(1.0,) * 3)
    for b, image in enumerate(images):
        crop = image[3:17, 5:17].permute(2, 0, 1)[None].float()
        want = F.interpolate(crop, size=(8, 8), mode="bilinear", antialias=True)[0] / 255
        want = want.flip(2) if b else want
        torch.testing.assert_close(got[0, b], want, rtol=0, atol=1.01 / 255)


def test_refuses_in_words(kernel, device):
    with pytest.raises(ValueError, match=r"vicreg: got z of shape \[3, 4\].*torch"):
        kernel.vicreg(torch.zeros(3, 4, device=device))


def test_two_builds_in_one_process(kernel, other_kernel, device):
    z = draw(device, 2, 4, 3)
    assert torch.stack(kernel.vicreg(z)).equal(torch.stack(other_kernel.vicreg(z)))
    assert kernel.layers.VICRegLoss is not other_kernel.layers.VICRegLoss
