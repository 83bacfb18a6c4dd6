"""Pieces put into other codebases: value, gradient and state as the host's own; there and back."""

import copy
import importlib
import logging
import pickle
import sys
from collections.abc import Callable
from types import ModuleType

import hosts
import pytest
import torch
import torch.nn.functional as F
from lightly import loss as lightly_loss
from lightly.models.modules import heads as lightly_heads
from tolerances import assert_matches
from torch import Tensor, nn

from bagssl_fast.integrations import (
    apply_to_emp_ssl,
    apply_to_lightly,
    apply_to_solo_learn,
    apply_to_vicreg,
    emp_ssl,
    lightly,
    solo_learn,
    vicreg,
)

PAIRS = {"B < D": (6, 17), "B = D": (8, 8), "B > D": (33, 5), "two images": (2, 7)}
# Of two images Barlow Twins' gradient is a difference of equals, rounding in float32.
FLOAT32_PAIRS = {name: shape for name, shape in PAIRS.items() if shape[0] > 2}
KINDS = ("stand-in", "real")


def views(*shape: int, count: int = 2, dtype=torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(sum(shape))
    return [torch.randn(shape, generator=generator, dtype=dtype) for _ in range(count)]


def value_and_gradients(loss: Callable, zs: list[Tensor]) -> list[Tensor]:
    zs = [z.clone().requires_grad_() for z in zs]
    value = loss(*zs)
    return [value.detach(), *torch.autograd.grad(value, zs)]


def assert_same(actual: list[Tensor], expected: list[Tensor], slack: float = 1.0) -> None:
    assert len(actual) == len(expected)
    for i, (a, b) in enumerate(zip(actual, expected, strict=True)):
        if b.abs().max() < 1e-12:  # of a bias before a batch norm the host has rounding error
            assert a.abs().max() < 1e-12
            continue
        assert_matches(a, b, b.dtype, "value" if i == 0 else f"gradient {i}", slack)


def is_ours(function: Callable) -> bool:
    return function.__module__.startswith("bagssl_fast.")


def head_results(head: nn.Module, x: Tensor, grads: bool = True) -> list[Tensor]:
    """Output, gradients of input and parameters, and buffers after one pass."""
    x = x.clone().requires_grad_()
    y = head(x)
    needed = [x, *head.parameters()]
    gradients = torch.autograd.grad(y.square().sum(), needed) if grads else []
    return [y.detach(), *gradients, *(b.double() for b in head.buffers())]


# ---------------------------------------------------------------------------------------- lightly

LIGHTLY_LOSSES = {
    "VICReg": ("VICRegLoss", {}),
    "VICReg, other weights": ("VICRegLoss", {"lambda_param": 3.0, "mu_param": 7.0, "eps": 1e-2}),
    "Barlow Twins": ("BarlowTwinsLoss", {}),
    "Barlow Twins, other weight": ("BarlowTwinsLoss", {"lambda_param": 0.3}),
}


@pytest.mark.parametrize("shape", PAIRS.values(), ids=PAIRS)
@pytest.mark.parametrize("case", LIGHTLY_LOSSES)
def test_lightly_losses_are_lightlys(case, shape):
    name, options = LIGHTLY_LOSSES[case]
    host = getattr(lightly_loss, name)(**options)
    zs = views(*shape)
    expected = value_and_gradients(host, zs)
    assert_same(value_and_gradients(getattr(lightly, name)(**options), zs), expected)
    with apply_to_lightly():
        assert_same(value_and_gradients(host, zs), expected)
    again = value_and_gradients(host, zs)
    assert all(torch.equal(a, b) for a, b in zip(again, expected, strict=True))


def test_lightly_vicreg_takes_statistics_per_position():
    zs = views(8, 3, 2, 5)
    expected = value_and_gradients(lightly_loss.VICRegLoss(), zs)
    assert_same(value_and_gradients(lightly.VICRegLoss(), zs), expected)


def test_lightly_vicregl_goes_through_the_patched_loss():
    pairs = views(4, 6, count=2) + views(4, 7, 7, 6, count=2)
    grid = torch.rand(2, 4, 7, 7, 2, dtype=torch.float64)
    loss = lightly_loss.VICRegLLoss()

    def run(a: Tensor, b: Tensor, local_a: Tensor, local_b: Tensor) -> Tensor:
        return loss([(a, local_a), (b, local_b)], [grid[0], grid[1]])

    expected = value_and_gradients(run, pairs)
    with apply_to_lightly(barlow_twins=False, emp_ssl=False):
        assert_same(value_and_gradients(run, pairs), expected)


@pytest.mark.parametrize("shape", [(3, 6, 17), (4, 9, 5)], ids=str)
def test_lightly_emp_ssl_has_the_authors_sign_or_lightlys_on_request(shape, caplog):
    zs = [F.normalize(z, dim=1) for z in views(*shape[1:], count=shape[0])]
    host = lightly_loss.EMPSSLLoss()
    rate = sum(hosts.coding_rate(z, 0.2) for z in zs) / len(zs)
    host_value = host(zs)
    corrected = host_value - 2 * rate
    assert_matches(lightly.EMPSSLLoss()(zs), corrected, torch.float64, "loss")
    caplog.set_level(logging.INFO, "bagssl_fast")
    with apply_to_lightly():
        assert_matches(host(zs), corrected, torch.float64, "loss")
    assert "the authors' sign" in caplog.text
    expected = value_and_gradients(lambda *z: host(list(z)), zs)
    with apply_to_lightly(emp_ssl_host_sign=True):
        assert_same(value_and_gradients(lambda *z: host(list(z)), zs), expected)
    assert "reversed sign, as asked" in caplog.text
    ours = lightly.EMPSSLLoss(host_sign=True)
    assert_same(value_and_gradients(lambda *z: ours(list(z)), zs), expected)


def test_lightly_emp_ssl_prefers_spread_patches():
    spread = [F.normalize(z, dim=1) for z in views(16, 8, count=1)] * 3
    collapsed = [F.normalize(z + 20, dim=1) for z in views(16, 8, count=1)] * 3
    assert lightly.EMPSSLLoss()(spread) < lightly.EMPSSLLoss()(collapsed)
    assert lightly_loss.EMPSSLLoss()(spread) > lightly_loss.EMPSSLLoss()(collapsed)  # the bug


HEADS = {
    "VICReg": ("VICRegProjectionHead", (6, 10, 7)),
    "VICReg, two layers": ("VICRegProjectionHead", (6, 10, 7, 2)),
    "Barlow Twins": ("BarlowTwinsProjectionHead", (6, 10, 7)),
}


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("case", HEADS)
def test_lightly_heads_load_save_and_compute_lightlys(case, training):
    name, sizes = HEADS[case]
    torch.manual_seed(0)
    host = getattr(lightly_heads, name)(*sizes).double()
    ours = getattr(lightly, name)(*sizes).double()
    ours.load_state_dict(host.state_dict())
    patched = copy.deepcopy(host)
    (x,) = views(9, 6, count=1)
    for head in (host, ours, patched):  # move the running statistics first
        head(x + 1)
        head.train(training)
    expected = head_results(host, x)
    assert_same(head_results(ours, x), expected)
    with apply_to_lightly(projection_head=True, model=patched, vicreg=False):
        assert_same(head_results(patched, x), expected)
    host.load_state_dict(ours.state_dict())


def test_lightly_heads_under_autocast_are_as_near_as_lightlys():
    torch.manual_seed(0)
    host = lightly_heads.VICRegProjectionHead(16, 32, 24)
    ours = lightly.VICRegProjectionHead(16, 32, 24)
    ours.load_state_dict(host.state_dict())
    (x,) = views(64, 16, count=1, dtype=torch.float32)
    truth = copy.deepcopy(host)(x)
    with torch.autocast("cpu", torch.bfloat16):
        theirs, mine = host(x), ours(x)
    assert theirs.dtype == mine.dtype == torch.bfloat16
    assert (mine - truth).norm() <= 1.2 * (theirs - truth).norm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_projections_are_computed_in_float32(dtype):
    zs = [z.to(dtype) for z in views(8, 300)]
    value = lightly.VICRegLoss()(*zs)
    assert value.dtype == torch.float32
    expected = lightly_loss.VICRegLoss()(*(z.double() for z in zs))
    assert_matches(value, expected, torch.float32, "loss")


class LightningLike(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Linear(5, 6)
        self.head = lightly_heads.VICRegProjectionHead(6, 10, 7)
        self.criterion = lightly_loss.VICRegLoss()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.criterion(*(self.head(self.backbone(z)) for z in (x, y)))


def test_an_instance_is_patched_and_others_are_not():
    torch.manual_seed(0)
    model = LightningLike().double()
    other = copy.deepcopy(model)
    keys = list(model.state_dict())
    expected = value_and_gradients(other, views(9, 5))
    handle = apply_to_lightly(projection_head=True, model=model)
    assert handle.replaced == ["VICRegLoss", "ProjectionHead"]
    assert "forward" in vars(model.criterion) and "forward" not in vars(other.criterion)
    assert list(model.state_dict()) == keys
    assert_same(value_and_gradients(model, views(9, 5)), expected)
    copied = copy.deepcopy(model)
    assert vars(copied.criterion)["forward"].__self__ is copied.criterion
    pickle.loads(pickle.dumps(model.head))
    handle.revert()
    assert "forward" not in vars(model.criterion) and "forward" not in vars(model.head)


# ----------------------------------------------------------------------------- handles, bad input


def test_nothing_happens_at_import_and_a_handle_reverts_once(caplog):
    forward = lightly_loss.VICRegLoss.forward
    assert not forward.__module__.startswith("bagssl_fast")
    inherited = "forward" in vars(lightly_heads.VICRegProjectionHead)
    caplog.set_level(logging.INFO, "bagssl_fast")
    handle = apply_to_lightly(projection_head=True)
    assert lightly_loss.VICRegLoss.forward is not forward
    assert "VICRegLoss, BarlowTwinsLoss, EMPSSLLoss, ProjectionHead" in caplog.text
    assert "VICRegLoss" in repr(handle)
    handle.revert()
    handle.revert()
    assert lightly_loss.VICRegLoss.forward is forward
    assert ("forward" in vars(lightly_heads.VICRegProjectionHead)) == inherited
    assert "nothing replaced" in repr(handle)


def test_a_second_apply_is_refused_and_changes_nothing():
    with apply_to_lightly(vicreg=False, emp_ssl=False):
        with pytest.raises(
            ValueError,
            match=r"BarlowTwinsLoss has already been replaced by bagssl_fast; call revert",
        ):
            apply_to_lightly()
        assert not lightly_loss.VICRegLoss.forward.__module__.startswith("bagssl_fast")


def test_revert_refuses_what_somebody_else_replaced(monkeypatch):
    handle = apply_to_lightly(barlow_twins=False, emp_ssl=False)
    with monkeypatch.context() as patch:
        patch.setattr(lightly_loss.VICRegLoss, "forward", lambda *_: 0)
        with pytest.raises(RuntimeError, match="VICRegLoss was replaced again"):
            handle.revert()
    handle.revert()


def test_an_exception_in_the_block_reverts():
    forward = lightly_loss.VICRegLoss.forward
    with pytest.raises(KeyError), apply_to_lightly():
        raise KeyError
    assert lightly_loss.VICRegLoss.forward is forward


def test_what_cannot_be_replaced_is_named(monkeypatch):
    with pytest.raises(ValueError, match="every piece is switched off"):
        apply_to_lightly(vicreg=False, barlow_twins=False, emp_ssl=False)
    with pytest.raises(ValueError, match="the model has none"):
        apply_to_lightly(model=nn.Linear(2, 2))
    with monkeypatch.context() as patch:
        patch.setattr(lightly_loss.VICRegLoss, "forward", lambda self, z: z)
        with pytest.raises(ValueError, match=r"arguments \(self, z\), expected \(self, z_a, z_b\)"):
            apply_to_lightly()
    with monkeypatch.context() as patch:
        patch.delattr(lightly_loss, "VICRegLoss")
        with pytest.raises(ValueError, match="no class VICRegLoss"):
            apply_to_lightly()
    plain = lightly_heads.ProjectionHead([(4, 4, None, nn.ReLU())])
    with pytest.raises(ValueError, match="no Linear followed by a BatchNorm1d"):
        apply_to_lightly(projection_head=True, model=plain)


def test_a_missing_host_is_an_import_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "lightly.loss", None)
    with pytest.raises(ImportError, match=r"cannot import lightly\.loss .*pip install lightly"):
        apply_to_lightly()


def test_bad_views_are_named():
    for error in (ValueError, AssertionError):  # lightly asserts
        with pytest.raises(error, match="at least 2 images"):
            lightly.VICRegLoss()(*views(1, 4))
    with pytest.raises(ValueError, match=r"\[4, 3\] and \[4, 2\]"):
        lightly.BarlowTwinsLoss()(torch.randn(4, 3), torch.randn(4, 2))
    with pytest.raises(ValueError, match="expected P views"):
        lightly.EMPSSLLoss()([torch.randn(4)])
    with pytest.raises(ValueError, match="eps is 0"):
        lightly.VICRegLoss(eps=0)(*views(4, 3))
    with pytest.raises(ValueError, match="num_layers is 1"):
        lightly.VICRegProjectionHead(num_layers=1)
    with pytest.raises(ValueError, match="all first patches"):
        emp_ssl.chunk_avg(torch.randn(7, 3), 2)
    with pytest.raises(ValueError, match=r"\[4\], expected \[B, D\]"):
        emp_ssl.TotalCodingRate()(torch.randn(4))


# ----------------------------------------------------------------------------------------- vicreg


@pytest.fixture(params=KINDS)
def main_vicreg(request):
    return hosts.load("vicreg", request.param)


def one_rank(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The authors' code gathers always: it needs a process group."""
    if not torch.distributed.is_initialized():
        store = tmp_path_factory.mktemp("store") / "store"
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{store}", rank=0, world_size=1
        )


@pytest.fixture
def process_group(tmp_path_factory):
    one_rank(tmp_path_factory)
    yield
    torch.distributed.destroy_process_group()


class Identity(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


def vicreg_model(module, batch_size: int = 16) -> nn.Module:
    """The host's model with its projector alone: embeddings in."""
    args = copy.copy(hosts.VICREG_ARGS)
    args.batch_size = batch_size
    torch.manual_seed(0)
    model = module.VICReg(args)
    model.backbone = Identity()
    model.projector = module.Projector(args, 8)
    return model.double()


@pytest.mark.parametrize("batch", [16, 11], ids=["full batch", "smaller last batch"])
@pytest.mark.parametrize("projector", [False, True], ids=["loss", "loss and projector"])
def test_vicreg_model_is_the_authors(main_vicreg, process_group, projector, batch):
    model = vicreg_model(main_vicreg)
    xs = views(batch, 8)
    expected = [*value_and_gradients(model, xs), *head_results(model.projector, xs[0])]
    with apply_to_vicreg(main_vicreg, projector=projector) as handle:
        swapped = vicreg_model(main_vicreg)
        actual = [*value_and_gradients(swapped, xs), *head_results(swapped.projector, xs[0])]
        assert ("Projector" in handle.replaced) == projector
    assert_same(actual, expected)
    assert list(swapped.state_dict()) == list(model.state_dict())
    model.load_state_dict(swapped.state_dict())


def test_vicreg_instance(main_vicreg, process_group):
    model = vicreg_model(main_vicreg)
    reference = copy.deepcopy(model)
    xs = views(16, 8)
    expected = value_and_gradients(reference, xs)
    with apply_to_vicreg(main_vicreg, projector=True, model=nn.ModuleList([model])) as handle:
        assert handle.replaced == ["VICReg.forward", "projector"]
        assert_same(value_and_gradients(model, xs), expected)
    assert "forward" not in vars(model) and "forward" not in vars(model.projector)


def test_vicreg_projector_with_synchronized_norms_runs_on_one_device():
    torch.manual_seed(0)
    ours = vicreg.Projector(hosts.VICREG_ARGS, 8).double()
    reference = copy.deepcopy(ours)
    ours = nn.SyncBatchNorm.convert_sync_batchnorm(ours)
    assert type(ours[1]) is nn.SyncBatchNorm
    (x,) = views(9, 8, count=1)
    assert_same(head_results(ours, x), head_results(reference, x))


def test_vicreg_lars_steps_as_the_authors(main_vicreg):
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    with torch.no_grad():
        for model in models:
            model[2].weight.zero_()  # no norm, no ratio
    inputs = torch.randn(6, 8, 4)

    def train(model: nn.Module) -> torch.optim.Optimizer:
        def is_vector(p: Tensor) -> bool:
            return p.ndim == 1

        optimizer = main_vicreg.LARS(model.parameters(), 0.5, 1e-2, 0.9, 0.02, is_vector, is_vector)
        for x in inputs:
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
        return optimizer

    theirs = train(models[0])
    with apply_to_vicreg(main_vicreg, loss=False) as handle:
        assert handle.replaced == ["LARS.step"]
        mine = train(models[1])
    for p, q in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(q, p, rtol=1e-5, atol=1e-6)
    mine.load_state_dict(theirs.state_dict())


def test_vicreg_bad_input(main_vicreg):
    with pytest.raises(ValueError, match="no class VICReg"):
        apply_to_vicreg(nn)
    with pytest.raises(ValueError, match="8192-8192"):
        vicreg.Projector(type("Args", (), {"mlp": "a-b"}), 8)
    with pytest.raises(ValueError, match="the model has none"):
        apply_to_vicreg(main_vicreg, model=nn.Linear(2, 2))


# ------------------------------------------------------------------------------------- solo-learn


@pytest.fixture(params=KINDS)
def solo(request):
    losses = hosts.load("solo-learn", request.param)
    yield losses
    if request.param == "stand-in":
        for name in [name for name in sys.modules if name.split(".")[0] == "solo"]:
            del sys.modules[name]


@pytest.mark.parametrize("shape", FLOAT32_PAIRS.values(), ids=FLOAT32_PAIRS)
@pytest.mark.parametrize("name", ["vicreg_loss_func", "barlow_loss_func"])
def test_solo_losses_are_solo_learns(solo, name, shape):
    # The real Barlow Twins is float32 alone: then both sides round.
    zs = [z.float() for z in views(*shape)]
    expected = value_and_gradients(getattr(solo, name), zs)
    assert_same(value_and_gradients(getattr(solo_learn, name), zs), expected, slack=5)
    with apply_to_solo_learn():
        assert is_ours(getattr(solo, name))
        assert_same(value_and_gradients(getattr(solo, name), zs), expected, slack=5)
    assert not is_ours(getattr(solo, name))


def test_solo_functions_are_replaced_wherever_they_were_imported(solo):
    methods = importlib.import_module("solo.methods.vicreg")
    with apply_to_solo_learn(barlow=False) as handle:
        assert handle.replaced == ["vicreg_loss_func"]
        for module in (methods, importlib.import_module("solo.losses.vicreg"), solo):
            assert is_ours(module.vicreg_loss_func)
        late = sys.modules["late"] = ModuleType("late")
        late.vicreg_loss_func = solo.vicreg_loss_func  # from solo.losses import ...
    assert methods.vicreg_loss_func is late.vicreg_loss_func is solo.vicreg_loss_func
    assert not is_ours(solo.vicreg_loss_func)
    del sys.modules["late"]


def solo_method(kind: str) -> nn.Module:
    """A method of solo-learn's; the real ones want a configuration."""
    module = importlib.import_module(f"solo.methods.{kind}")
    cls = module.VICReg if kind == "vicreg" else module.BarlowTwins
    torch.manual_seed(0)
    if hasattr(module, "Base"):
        return cls().double()
    model = cls.__new__(cls)
    nn.Module.__init__(model)
    model.projector = hosts.mlp([8, 16, 16, 12], last_bias=True)
    return model.double()


@pytest.mark.parametrize("kind", ["vicreg", "barlow_twins"])
def test_solo_instance(solo, kind):
    model = solo_method(kind)
    if not hasattr(sys.modules[f"solo.methods.{kind}"], "Base"):
        with apply_to_solo_learn(projector=True, model=model) as handle:
            assert len(handle.replaced) == 2
        return
    reference = copy.deepcopy(model)
    xs = views(9, 8)
    batch = (None, xs, None)
    expected = reference.training_step(batch, 0)
    function = vars(type(model))["training_step"].__globals__
    before = dict(function)
    with apply_to_solo_learn(projector=True, model=model) as handle:
        name = "vicreg_loss_func" if kind == "vicreg" else "barlow_loss_func"
        assert handle.replaced == [name, "projector"]
        assert_matches(model.training_step(batch, 0), expected, torch.float64, "loss")
        assert function[name] is before[name]  # other models keep theirs
    assert "training_step" not in vars(model)


def test_solo_class_projector(solo):
    model = solo_method("vicreg")
    if not hasattr(sys.modules["solo.methods.vicreg"], "Base"):
        pytest.skip("the real class needs a configuration: bench/bench_swap.py runs it")
    reference = copy.deepcopy(model)
    (x,) = views(9, 8, count=1)
    expected = reference(x)["z"]
    with apply_to_solo_learn(projector=True) as handle:
        assert "VICReg.projector" in handle.replaced
        assert_matches(model(x)["z"], expected, torch.float64, "z")


# ---------------------------------------------------------------------------------------- EMP-SSL


@pytest.fixture(params=KINDS)
def emp_main(request):
    return hosts.load("EMP-SSL", request.param)


@pytest.mark.parametrize("shape", [(3, 6, 17), (4, 9, 5), (1, 4, 4)], ids=str)
def test_emp_ssl_losses_are_its_own(emp_main, shape):
    num_patches, batch, dim = shape
    (z,) = views(num_patches * batch, dim, count=1)
    z = F.normalize(z, dim=1).float()
    criterion = emp_main.TotalCodingRate(eps=0.2)
    similarity = emp_main.Similarity_Loss()

    def run(z: Tensor) -> Tensor:
        z_list, z_avg = z.chunk(num_patches), emp_main.chunk_avg(z, num_patches)
        agreement, _ = similarity(z_list, z_avg)
        one = criterion(z_list[0])
        return 200 * agreement + emp_main.cal_TCR(z, criterion, num_patches) + one

    expected = value_and_gradients(run, [z])
    with apply_to_emp_ssl(emp_main) as handle:
        assert handle.replaced == ["TotalCodingRate", "Similarity_Loss", "cal_TCR", "chunk_avg"]
        assert is_ours(emp_main.cal_TCR)
        # Their logdet of a D x D matrix loses digits in float32 where D > B.
        assert_same(value_and_gradients(run, [z]), expected, slack=50)
    for normalize in (False, True):
        mean = emp_main.chunk_avg(z, num_patches, normalize)
        assert_matches(emp_ssl.chunk_avg(z, num_patches, normalize), mean, torch.float32, "mean")


def test_emp_ssl_other_criteria_are_called_patch_by_patch():
    z = torch.randn(6, 4)
    assert torch.equal(
        emp_ssl.cal_TCR(z, torch.sum, 3), torch.stack([s.sum() for s in z.chunk(3)]).mean()
    )


def test_emp_ssl_head(emp_main):
    torch.manual_seed(0)
    model = emp_main.encoder(z_dim=12, hidden_dim=16).double()
    model.backbone = Identity()
    if model.pre_feature[0].in_features != 8:
        model.pre_feature = hosts.mlp([8, 16, 1], last_bias=True)[:3].double()
    reference = copy.deepcopy(model)
    (x,) = views(9, 8, count=1)
    expected = reference(x, is_test=True)
    for owner in (None, model):
        swapped = copy.deepcopy(model) if owner is None else model
        with apply_to_emp_ssl(emp_main, head=True, model=owner) as handle:
            assert "encoder" in handle.replaced
            actual = swapped(x, is_test=True)
        for a, b, name in zip(actual, expected, ("z", "feature"), strict=True):
            assert_matches(a, b, torch.float64, name)


def test_emp_ssl_wants_one_of_its_modules():
    with pytest.raises(ValueError, match="nothing to replace"):
        apply_to_emp_ssl(nn)
