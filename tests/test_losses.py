"""Losses: each against its formula and, where it agrees, lightly; signs; two ranks; bad input."""

import math
from itertools import permutations

import pytest
import torch
import torch.nn.functional as F
import two_ranks
from tolerances import assert_matches
from torch import Tensor

from bagssl_fast.losses import EMPSSL, LOSSES, BarlowTwins, InfoNCE, Spectral, VICReg, build_loss


def bag(*shape: int, seed: int = 0, dtype=torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def assert_same_loss(loss, expected_loss, z: Tensor, slack: float = 1.0) -> None:
    """Equal value and equal gradient at z."""
    z = z.clone().requires_grad_()
    actual, _ = loss(z)
    expected = expected_loss(z)
    (dz,) = torch.autograd.grad(actual, z)
    (dz_expected,) = torch.autograd.grad(expected, z)
    assert_matches(actual, expected, z.dtype, "loss", slack)
    assert_matches(dz, dz_expected, z.dtype, "dz", slack)


def emp_ssl(z: Tensor) -> Tensor:
    """EMP-SSL's loss as its code adds it up (papers write eps^2 for this eps)."""
    num_slots, batch, dim = z.shape
    mean = sum(z) / num_slots
    similarity = sum(F.cosine_similarity(s, mean, dim=1).mean() for s in z) / num_slots
    rate = 0.0
    for s in z:
        gram = torch.eye(dim, dtype=z.dtype) + dim / (batch * 0.2) * s.T @ s
        rate = rate + torch.logdet(gram) / 2 / num_slots
    return -200 * similarity - rate


def spectral(z: Tensor, w: float = 1.0) -> Tensor:
    """-E over ordered pairs of different slots + w/2 E over patches of different images."""
    num_slots, batch, _ = z.shape
    joint = torch.stack(
        [(z[p] * z[q]).sum(dim=1).mean() for p, q in permutations(range(num_slots), 2)]
    ).mean()
    products = [
        (z[p, b] @ z[q, c]).square()
        for p in range(num_slots)
        for q in range(num_slots)
        for b, c in permutations(range(batch), 2)
    ]
    return -joint + w / 2 * torch.stack(products).mean()


def barlow_twins(z: Tensor) -> Tensor:
    """The original for each pair of successive slots of the ring, averaged."""
    num_slots, batch, dim = z.shape
    total = 0.0
    for p in range(num_slots):
        a, b = (F.batch_norm(z[q % num_slots], None, None, training=True) for q in (p, p + 1))
        c = a.T @ b / batch
        eye = torch.eye(dim, dtype=torch.bool)
        total = total + (c[eye] - 1).square().sum() + 0.005 * c[~eye].square().sum()
    return total / num_slots


def info_nce(z: Tensor, temperature: float = 0.5) -> Tensor:
    num_slots, batch, _ = z.shape
    unit = F.normalize(z, dim=2)
    losses = []
    for p in range(num_slots):
        for b in range(batch):
            scores = (unit @ unit[p, b]) / temperature  # [P, B]
            others = torch.ones(num_slots, batch, dtype=torch.bool)
            others[p, b] = False
            partition = scores[others].logsumexp(dim=0)
            losses += [partition - scores[q, b] for q in range(num_slots) if q != p]
    return torch.stack(losses).mean()


FORMULAS = {
    EMPSSL: emp_ssl,
    Spectral: spectral,
    BarlowTwins: barlow_twins,
    InfoNCE: info_nce,
}


@pytest.mark.parametrize("shape", [(2, 5, 7), (3, 4, 3)], ids=str)
@pytest.mark.parametrize("loss", FORMULAS, ids=lambda loss: loss.__name__)
def test_losses_are_their_formulas(loss, shape):
    assert_same_loss(loss(), FORMULAS[loss], bag(*shape))


def test_vicreg_weighs_its_terms():
    z = bag(3, 6, 4)
    loss, terms = VICReg(2.0, 3.0, 4.0)(z)
    expected = 2 * terms["invariance"] + 3 * terms["variance"] + 4 * terms["covariance"]
    assert_matches(loss, expected, z.dtype, "loss")


@pytest.mark.parametrize(
    ("loss", "theirs"),
    [
        (VICReg(), "VICRegLoss"),
        (BarlowTwins(), "BarlowTwinsLoss"),
        (InfoNCE(temperature=0.5), "NTXentLoss"),
    ],
    ids=["VICReg", "BarlowTwins", "InfoNCE"],
)
def test_two_slots_are_lightlys(loss, theirs):
    lightly = pytest.importorskip("lightly.loss")
    criterion = getattr(lightly, theirs)()
    # Two float32 results, each with its rounding.
    assert_same_loss(loss, lambda z: criterion(z[0], z[1]), bag(2, 16, 8, dtype=torch.float32), 4)


def test_emp_ssl_is_lightly_with_the_sign_of_the_rate_turned():
    """lightly adds the coding rate where EMP-SSL's own code subtracts it."""
    lightly = pytest.importorskip("lightly.loss")
    z = F.normalize(bag(3, 8, 12, dtype=torch.float32), dim=2)
    loss, terms = EMPSSL()(z)
    if not hasattr(lightly, "EMPSSLLoss"):
        pytest.skip("this lightly has no EMPSSLLoss")
    theirs = lightly.EMPSSLLoss()(list(z))
    corrected = theirs - 2 * terms["coding_rate"]
    assert min(abs(loss - theirs), abs(loss - corrected)) < 1e-3


def test_emp_ssl_falls_when_rows_spread():
    tight = F.normalize(bag(1, 1, 12) + 0.05 * bag(1, 16, 12, seed=1), dim=2).expand(4, -1, -1)
    spread = F.normalize(bag(1, 16, 12, seed=1), dim=2).expand(4, -1, -1)
    (loss_tight, terms_tight), (loss_spread, terms_spread) = EMPSSL()(tight), EMPSSL()(spread)
    assert loss_spread < loss_tight < 0
    assert terms_spread["coding_rate"] > terms_tight["coding_rate"] > 0
    assert terms_spread["bag_cosine"].item() == pytest.approx(1.0)


def test_emp_ssl_falls_when_patches_agree():
    z = F.normalize(bag(4, 8, 12), dim=2)
    closer = F.normalize(z + z.mean(dim=0), dim=2)
    assert EMPSSL(tcr=0)(closer)[0] < EMPSSL(tcr=0)(z)[0]


def test_spectral_is_minimal_at_the_co_occurrence():
    """z . z' = p(x, x') / (w p(x) p(x')) on a finite alphabet (2206.08954) is where L_C is 0.

    L_C = 2 w L_S + const, checked here with exact expectations over a random joint.
    """
    generator = torch.Generator().manual_seed(3)
    joint = torch.rand(5, 5, generator=generator, dtype=torch.float64)
    joint = (joint + joint.T) / (joint + joint.T).sum()
    p = joint.sum(dim=0)
    w = 0.7

    def both(z: Tensor) -> tuple[Tensor, Tensor]:
        inner = z @ z.T
        product = p[:, None] * p[None]
        co_occurrence = (product * (w * inner - joint / product).square()).sum()
        return co_occurrence, -(joint * inner).sum() + w / 2 * (product * inner.square()).sum()

    pairs = [both(bag(5, 3, seed=s)) for s in range(4)]
    constants = [float(c - 2 * w * s) for c, s in pairs]
    assert max(constants) - min(constants) < 1e-12 * max(1.0, abs(constants[0])) * 100


def test_info_nce_of_equal_patches_is_the_log_of_the_negatives():
    z = torch.ones(2, 4, 3)
    loss, terms = InfoNCE()(z)
    assert loss.item() == pytest.approx(math.log(7), rel=1e-6)
    assert terms["alignment"].item() == pytest.approx(1.0)


@pytest.mark.parametrize("name", LOSSES)
def test_terms_are_detached_scalars_and_losses_float32(name):
    z = bag(2, 6, 4, dtype=torch.float16).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, terms = build_loss(name)(z)
    assert loss.dtype == torch.float32
    assert loss.shape == ()
    assert terms
    assert all(t.shape == () and not t.requires_grad for t in terms.values())
    (dz,) = torch.autograd.grad(loss, z)
    assert dz.dtype == torch.float16
    assert dz.isfinite().all()


@pytest.mark.parametrize("name", LOSSES)
def test_losses_repeat_bitwise_and_leave_z_alone(name):
    z = bag(3, 17, 12, dtype=torch.float32)
    before = z.clone()
    grads = []
    for _ in range(2):
        leaf = z.clone().requires_grad_()
        build_loss(name)(leaf)[0].backward()
        grads.append(leaf.grad)
    assert torch.equal(*grads)
    assert torch.equal(z, before)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(
    ("shape", "message"),
    [((1, 4, 3), "P >= 2|at least 2"), ((4, 3), r"\[P, B, D\]")],
    ids=["one slot", "rank 2"],
)
def test_bags_without_pairs_are_refused(name, shape, message):
    with pytest.raises(ValueError, match=message):
        build_loss(name)(torch.zeros(shape))


@pytest.mark.parametrize("name", sorted(set(LOSSES) - {"emp_ssl", "byol"}))
def test_one_image_is_refused(name):
    with pytest.raises(ValueError, match="drop_last"):
        build_loss(name)(torch.zeros(2, 1, 3))


def test_unknown_names_and_options_are_refused():
    with pytest.raises(ValueError, match="'simclr'; expected one of vicreg, emp_ssl"):
        build_loss("simclr")
    with pytest.raises(ValueError, match="sim_coef"):
        build_loss("vicreg", sim_coef=1)
    with pytest.raises(ValueError, match="convention 'x'"):
        build_loss("vicreg", convention="x")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    folder = str(tmp_path_factory.mktemp("ranks"))
    torch.multiprocessing.spawn(two_ranks.main, args=(folder,), nprocs=two_ranks.WORLD)
    return [torch.load(f"{folder}/rank{rank}.pt") for rank in range(two_ranks.WORLD)]


@pytest.mark.parametrize("case", two_ranks.LOSSES)
def test_two_ranks_are_one_device_with_the_global_batch(ranks, case):
    name, options = two_ranks.LOSSES[case]
    z = two_ranks.make_bag(options.get("wide", False))
    expected = two_ranks.evaluate(name, options, z, None)
    for rank, result in enumerate(ranks):
        actual = result[case]
        assert_matches(actual["loss"], expected["loss"], z.dtype, "loss")
        for term, value in expected["terms"].items():
            assert_matches(actual["terms"][term], value, z.dtype, term)
        # What DDP's averaging divides by.
        dz = actual["dz"] / two_ranks.WORLD
        assert_matches(dz, expected["dz"].chunk(two_ranks.WORLD, dim=1)[rank], z.dtype, "dz")


def test_two_ranks_normalize_as_one(ranks):
    x = two_ranks.make_bag()
    expected = two_ranks.linear_bn_relu(x, None)
    results = [result["linear_bn_relu"] for result in ranks]
    assert_matches(torch.cat([r["y"] for r in results], dim=1), expected["y"], x.dtype, "y")
    dx = torch.cat([r["grads"]["x"] for r in results], dim=1)
    assert_matches(dx, expected["grads"]["x"], x.dtype, "dx")
    for name in ("weight", "gamma", "beta"):
        total = sum(r["grads"][name] for r in results)
        assert_matches(total, expected["grads"][name], x.dtype, f"d{name}")
    for result in results:
        for actual, needed in zip(result["running"], expected["running"], strict=True):
            assert_matches(actual, needed, x.dtype, "running statistics")


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_two_ranks_convolve_as_one(ranks, impl):
    expected = two_ranks.conv_bn_relu(two_ranks.make_maps().double(), None, "reference")
    results = [result[f"conv_bn_relu {impl}"] for result in ranks]
    y = torch.cat([r["y"] for r in results])
    assert_matches(y, expected["y"], torch.float32, "y")
    for name, needed in expected["grads"].items():
        join = torch.cat if name == "x" else sum
        actual = join([r["grads"][name] for r in results])
        assert_matches(actual, needed, torch.float32, f"d{name}", slack=3)
    for result in results:
        for actual, needed in zip(result["running"], expected["running"], strict=True):
            assert_matches(actual, needed, torch.float32, "running statistics")
