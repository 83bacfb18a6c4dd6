"""A steady step never makes the host wait for the device: no number is read, nothing is copied.

On a CPU such reads cost nothing, so the loop is run as on a GPU (the guard counts on the device)
with the reference ops, and everything that would wait there is counted. `-m gpu` lets CUDA itself
find them, the kernels included.
"""

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import yaml
from runs import DENSE, PATCHES
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bagssl_fast import cli, ops
from bagssl_fast.distributed.ranks import Ranks, StopSignals
from bagssl_fast.training.guard import Guard
from bagssl_fast.training.loop import steps
from bagssl_fast.training.reporter import Reporter
from bagssl_fast.training.run import Run, prepare

STEPS = 6  # the first one looks for a collapse, the last one reports and saves
# aten operators whose result, or its size, is needed on the host.
READS = ("_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select", "_unique2")
METHODS = ("tolist", "numpy", "cpu", "new_tensor")
FUNCTIONS = ("tensor", "as_tensor")  # a pageable copy waits for the device
SMALL_HEAD = {"hidden": 16, "out": 8, "num_layers": 2}
CASES: dict[str, dict[str, Any]] = {
    "vicreg, lars": {**DENSE, "optim": {"name": "lars", "lr": 0.1}},
    "vicreg, skip": {**DENSE, "on_nonfinite": "skip"},
    "emp_ssl, sgd_lars": PATCHES,
    "spectral, sgd": {**DENSE, "loss": {"name": "spectral"}, "optim": {"name": "sgd", "lr": 0.01}},
    "barlow_twins, clipped": {
        **DENSE,
        "loss": {"name": "barlow_twins"},
        "optim": {"name": "adamw", "lr": 1e-3, "clip_grad": 1.0},
    },
    "info_nce": {**DENSE, "loss": {"name": "info_nce"}},
    "byol": {**DENSE, "loss": {"name": "byol"}, "head": {**SMALL_HEAD, "momentum": 0.9}},
    "sigreg, shared norms": {
        **DENSE,
        "loss": {"name": "sigreg", "options": {"num_directions": 16}},
        "sync_bn": True,
    },
}


class HostReads(TorchDispatchMode):
    """Calls `found(name)` for every operator that would make the host wait."""

    def __init__(self, found: Callable[[str], None]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name in ("index", "index_put", "index_put_") and any(
            i is not None and i.dtype == torch.bool for i in args[1]
        )
        if name in READS or by_mask:
            self.found(name)
        return func(*args, **(kwargs or {}))


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch, found: Callable[[str], None]) -> Iterator[None]:
    def reporting(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def report(*args: Any, **kwargs: Any) -> Any:
            found(name)
            return call(*args, **kwargs)

        return report

    with monkeypatch.context() as patch, HostReads(found):
        for owner, names in ((Tensor, METHODS), (torch, FUNCTIONS)):
            for name in names:
                patch.setattr(owner, name, reporting(name, getattr(owner, name)))
        yield


@pytest.fixture
def make_run(tiny_images, tmp_path) -> Iterator[Callable[..., Run]]:
    runs: list[Run] = []

    def make(recipe: dict[str, Any], **more: Any) -> Run:
        path = tmp_path / "recipe.yaml"
        common = {"data": str(tiny_images), "run_dir": str(tmp_path / "run"), "log_every": 100}
        common |= {"max_steps": STEPS, "checkpoint_every": 0, "precision": "fp32"}
        path.write_text(yaml.safe_dump({**recipe, **common, **more}))
        config = cli.load(path)
        runs.append(prepare(config, Ranks(device=torch.device(config.device))))
        return runs[-1]

    before = ops._state["impl"]
    yield make
    ops.set_impl(before)
    for run in runs:
        run.close()


def train(run: Run, guard: Guard) -> None:
    run.forward.train()
    with StopSignals(alone=True) as stop:
        steps(run, guard, Reporter(None, STEPS, 0, False), stop)


@pytest.mark.parametrize("case", CASES)
def test_a_steady_step_reads_nothing_from_the_device(make_run, monkeypatch, case):
    run = make_run(CASES[case], impl="reference")
    guard = Guard(run)
    guard.on_host = False  # as on a GPU
    found: list[str] = []

    def note(name: str) -> None:
        if 2 <= run.step < STEPS - 1:
            where = next(
                f for f in reversed(traceback.extract_stack()) if "bagssl_fast/" in f.filename
            )
            found.append(f"{name} in {where.filename}:{where.lineno}")

    with counted(monkeypatch, note):
        train(run, guard)
    assert run.step == STEPS and not found, sorted(set(found))


def test_reads_are_seen(monkeypatch):
    """The test above can fail: each way to read is counted."""
    x, found = torch.arange(3.0), []
    with counted(monkeypatch, found.append):
        for read in (
            lambda: x[0].item(),
            lambda: float(x[0]),
            lambda: bool(x[0] < 1),
            lambda: x.tolist(),
            lambda: x.cpu(),
            lambda: x[x > 1],
            lambda: x.new_tensor([1.0]),
            lambda: torch.tensor(1.0, device=x.device),
        ):
            before = len(found)
            read()
            assert len(found) > before


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_cuda_finds_no_synchronization_in_a_steady_step(make_run, monkeypatch, case, compiled):
    run = make_run(CASES[case], device="cuda", compile=compiled)
    keep = Guard.keep

    def keep_and_watch(guard: Guard) -> None:
        steady = 2 <= run.step < STEPS - 1
        torch.cuda.set_sync_debug_mode("error" if steady else "default")
        keep(guard)

    monkeypatch.setattr(Guard, "keep", keep_and_watch)
    try:
        train(run, Guard(run))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert run.step == STEPS
