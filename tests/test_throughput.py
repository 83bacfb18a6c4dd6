"""The throughput bench: its rows, its refusals, its clocks. Tiny images, two systems."""

import csv
import dataclasses
import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("torchvision")

from PIL import Image
from torch import Tensor

import throughput
from bagssl_fast.config import OptimConfig
from baselines.emp_ssl import EMPSSL
from baselines.step import Setup
from harness.cases import TRAINING, Case, Images
from harness.clock import PHASES, CudaClock, Laps
from harness.common import Row, against_the_best, best_plain
from harness.ours import OursCompiled, OursDense, OursOnDevice, initial_weights
from harness.parity import check, model_flops
from harness.photographs import TARS, data_folder

CASE: Case = dataclasses.replace(
    TRAINING["cifar-tcr"],
    batch=4,
    patches=4,
    stride=16,
    width=8,
    head={"name": "projector", "hidden": 32, "out": 16, "num_layers": 2},
)


@pytest.fixture(autouse=True)
def small_case(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(TRAINING, "cifar-tcr", CASE)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tar as the bench wants it, of 8 noisy images."""
    folder = tmp_path_factory.mktemp("data")
    generator = np.random.default_rng(0)
    with tarfile.open(folder / "cifar10-train.tar", "w") as tar:
        for i in range(8):
            buffer = io.BytesIO()
            pixels = generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(buffer, "PNG")
            member = tarfile.TarInfo(f"class/{i}.png")
            member.size = buffer.tell()
            buffer.seek(0)
            tar.addfile(member, buffer)
    return folder


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Setup:
    path = tmp_path_factory.mktemp("images") / "images.npy"
    pixels = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), dtype=np.uint8)
    np.save(path, pixels)
    return Setup(CASE, Images(str(path), pixels, ()), initial_weights(CASE), steps=2)


class WrongLoss(EMPSSL):
    """One per cent too much."""

    name = "wrong"

    def loss(self, z: Tensor) -> Tensor:
        return 1.01 * super().loss(z)


class WrongGradient(EMPSSL):
    """The right value, of which nothing is learned."""

    def loss(self, z: Tensor) -> Tensor:
        return super().loss(z.detach()) + 0 * z.sum()


def run(folder: Path, *more: str, systems: dict[str, Any] | None = None) -> int:
    words = "--quick --cases cifar-tcr --batch 4 --steps 1 --rounds 2 --seconds 0.1 --threads 1"
    return throughput.main([*words.split(), "--data", str(folder), *more], systems)


def test_quick_run_has_the_schema_and_a_split_that_adds_up(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [tmp_path / "rows.json", tmp_path / "rows.csv", tmp_path / "steps.png"]
    flags = [
        word
        for pair in zip(("--json", "--csv", "--plot"), map(str, paths), strict=True)
        for word in pair
    ]
    assert run(folder, *flags, "--systems", "emp_ssl", "bagssl_fast_dense") == 0
    rows = json.loads(paths[0].read_text())
    assert all(list(row) == [f.name for f in dataclasses.fields(Row)] for row in rows)
    with paths[1].open() as file:
        assert len(list(csv.DictReader(file))) == len(rows)
    assert paths[2].stat().st_size > 1000

    values = {(r["provider"], r["metric"]): r["value"] for r in rows if r["case"] == "cifar-tcr"}
    for provider in ("emp_ssl", "bagssl_fast_dense"):
        split = sum(values[provider, phase] for phase in PHASES)
        assert split == pytest.approx(values[provider, "step"])  # two rounds: medians are means
        rate = values[provider, "images per second"]
        assert values[provider, "patches per second"] == pytest.approx(4 * rate)
        assert values[provider, "parity of the loss"] < 1e-4
        assert values[provider, "model FLOP/s"] > 0
    assert ("bagssl_fast_dense", "images per second, ratio to emp_ssl") in values
    assert "parity" not in capsys.readouterr().err


def test_a_system_that_does_other_work_is_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    systems = {
        "wrong": (WrongLoss, ""),
        "bagssl_fast_dense": throughput.SYSTEMS["bagssl_fast_dense"],
    }
    path = tmp_path / "rows.json"
    flags = ["--synthetic", "--json", str(path), "--systems", *systems]
    assert run(folder, *flags, systems=systems) == 1
    assert "wrong is REFUSED" in capsys.readouterr().out
    metrics = {r["metric"] for r in json.loads(path.read_text()) if r["provider"] == "wrong"}
    assert metrics == {"parity of the loss", "parity of the gradient"}


def test_parity_sees_the_gradient_too(setup: Setup) -> None:
    good, bad = check(EMPSSL(setup)), check(WrongGradient(setup))
    assert good.green
    assert not bad.green and bad.loss < 1e-4 and bad.gradient == pytest.approx(1)


def test_bfloat16_is_checked_in_float32_first(setup: Setup) -> None:
    """What bfloat16 may be off hides a formula that is nearly right: a tenth of the gradient."""

    class NearlyRight(EMPSSL):
        def loss(self, z: torch.Tensor) -> torch.Tensor:
            loss = super().loss(z)
            return loss.detach() + 0.9 * (loss - loss.detach())

    half = dataclasses.replace(setup, precision="bf16")
    good, bad = EMPSSL(half), NearlyRight(half)
    parity, other = check(good), check(bad)
    assert parity.green and parity.gradient > 1e-3 and good.setup.precision == "bf16"
    assert not other.green and other.gradient == pytest.approx(0.1, abs=0.01)
    options = throughput.parse(["--precision", "bf16"])
    assert options.cases == [*throughput.TRAINING]  # evaluation is timed in float32 alone


@pytest.mark.parametrize("name", ["torch_kornia", "torch_kornia_compile"])
def test_plain_pytorch_with_kornia_does_the_same_work(setup: Setup, aot: None, name: str) -> None:
    pytest.importorskip("kornia")
    system = throughput.import_system(throughput.SYSTEMS[name][0])(setup)
    parity = check(system)
    assert system.name == name and system.compiled == name.endswith("compile")
    assert parity.green and parity.seconds > 0
    (batch,) = (b for i, b in enumerate(system.batches()) if i == 0)
    assert batch.shape == (16, 3, 16, 16) and torch.isfinite(system.encode(batch)).all()


def test_ours_compiled_does_the_same_work(setup: Setup, aot: None) -> None:
    system = OursCompiled(setup)
    assert system.compiled and check(system).green
    system.close()


def test_the_best_plain_pytorch_may_be_compiled(capsys: pytest.CaptureFixture[str]) -> None:
    steps = {"emp_ssl": 1.0, "torch": 4.0, "torch_kornia": 3.0, "bagssl_fast": 1.0}
    assert best_plain(steps) == "torch_kornia"
    steps["torch_kornia_compile"] = 2.0
    assert best_plain(steps) == "torch_kornia_compile"
    assert best_plain(steps, larger_is_better=True) == "torch"
    assert best_plain({"emp_ssl": 1.0, "bagssl_fast": 1.0}) is None
    against_the_best(steps)
    assert "bagssl_fast is 2.00 times as fast as the best plain PyTorch, torch_kornia_compile" in (
        capsys.readouterr().out
    )


def test_floors_refer_to_the_best_plain_pytorch() -> None:
    class Options:
        synthetic, device = False, "cpu"

    bench = object.__new__(throughput.Bench)
    bench.options = Options()
    steps = {"emp_ssl": 0.5, "torch": 4.0, "torch_kornia_compile": 2.0, "bagssl_fast": 1.0}
    assert bench.floors("cifar-tcr", steps) == {"emp_ssl": 6.0, "torch_kornia_compile": 2.5}


def test_a_fresh_clone_needs_no_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("skimage")
    monkeypatch.delenv("BAGSSL_DATA", raising=False)
    words = "--quick --cases cifar-tcr --batch 4 --steps 1 --rounds 2 --seconds 0.1 --threads 1"
    assert throughput.main([*words.split(), "--systems", "bagssl_fast"]) == 0
    assert capsys.readouterr().out.count("scikit-image's photographs stand in") == 1
    made = data_folder(None, tmp_path)
    for name, (count, _, size) in TARS.items():
        with tarfile.open(made / name) as tar:
            members = tar.getmembers()
            assert len(members) == count and len({m.name.split("/")[0] for m in members}) == 16
            assert Image.open(tar.extractfile(members[1])).size == size  # type: ignore[arg-type]
    assert data_folder(tmp_path, tmp_path) == tmp_path


def test_a_tar_that_is_not_there(folder: Path) -> None:
    with pytest.raises(SystemExit, match=r"imagenet-sample.tar is not there: make it with"):
        throughput.main(["--cases", "imagenet-tcr", "--data", str(folder), "--steps", "1"])


def test_parity_leaves_the_model_as_it_was(setup: Setup) -> None:
    system = EMPSSL(setup)
    before = {k: v.clone() for k, v in system.model.state_dict().items()}
    check(system)
    assert all(torch.equal(v, before[k]) for k, v in system.model.state_dict().items())
    assert all(p.grad is None for p in system.model.parameters())


def test_dense_work_is_smaller_and_counted_as_it_is(setup: Setup) -> None:
    published = dataclasses.replace(setup, case=dataclasses.replace(CASE, patches=25, stride=4))
    assert model_flops(OursDense(published)) < 0.5 * model_flops(EMPSSL(published))


def test_patches_cut_on_the_device_are_those_of_the_loader(setup: Setup) -> None:
    system = OursOnDevice(setup)
    batches = list(system.batches())
    system.close()
    assert [tuple(b.shape) for b in batches] == [(4, 4, 3, 16, 16)] * 2
    assert batches[0].abs().max() <= 1.01
    assert not torch.equal(batches[0], batches[1])


class FakeCuda:
    """A GPU whose clock goes on by 1, 2, 3, ... ms from mark to mark."""

    def __init__(self) -> None:
        self.marks, self.waits = 0, 0

    def Event(self, enable_timing: bool) -> "FakeEvent":
        assert enable_timing
        return FakeEvent(self)

    def synchronize(self) -> None:
        self.waits += 1


class FakeEvent:
    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda, self.time = cuda, 0.0

    def record(self) -> None:
        self.cuda.marks += 1
        self.time = self.cuda.marks * (self.cuda.marks + 1) / 2

    def elapsed_time(self, end: "FakeEvent") -> float:
        assert self.cuda.waits >= 2, "read before the GPU had come so far"
        return end.time - self.time


def test_laps_on_a_gpu_are_between_events_and_wait_once() -> None:
    cuda = FakeCuda()
    laps = Laps(CudaClock(cuda))
    laps.start()
    for _ in range(2):
        for phase in PHASES:
            laps.lap(phase)
    assert cuda.waits == 1
    seconds = laps.seconds()
    assert cuda.waits == 2
    # The marks are 2, 3, ..., 11 ms apart; each phase has two laps, five marks from each other.
    assert [round(seconds[phase] * 1e3) for phase in PHASES] == [9, 11, 13, 15, 17]
    assert sum(seconds.values()) == pytest.approx(65e-3)


@pytest.fixture
def short_training(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, aot: None
) -> list[str]:
    """Arguments of a time_to_accuracy of seconds: one step of tiny networks."""
    import time_to_accuracy

    case = dataclasses.replace(CASE, patches=8, view=24, stride=8, views=2, optim=OptimConfig())
    monkeypatch.setattr(time_to_accuracy, "CASE", case)
    monkeypatch.setattr(time_to_accuracy, "EVAL_PATCHES", 4)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    (tmp_path / "cifar10-test.tar").symlink_to(folder / "cifar10-train.tar")
    (tmp_path / "cifar10-train.tar").symlink_to(folder / "cifar10-train.tar")
    words = [
        "--seeds",
        "1",
        "--images",
        "8",
        "--bank",
        "8",
        "--evaluations",
        "1",
        "--threads",
        "1",
        "--json",
    ]
    return ["--data", str(tmp_path), *words, str(tmp_path / "rows.json")]


def test_time_to_accuracy_counts_compilation_and_keeps_what_is_done(
    short_training: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("kornia")
    import time_to_accuracy

    systems = ["--systems", "torch_kornia_compile", "bagssl_fast"]
    time_to_accuracy.main([*short_training, *systems])
    said = capsys.readouterr().out
    rows = {(r["provider"], r["metric"]): r["value"] for r in read_rows(short_training[-1])}
    compilation = rows["torch_kornia_compile", "compilation"]
    assert compilation > 0 == rows["bagssl_fast", "compilation"]
    assert f"compiled in {compilation:.1f} s, which count" in said
    curve = [(0.0, 0.4, 0.5), (12.0, 0.6, 0.6)]
    training = time_to_accuracy.Training(2.0, curve, (0.3, 0.2))
    report = throughput.Report("time_to_accuracy", 1)
    time_to_accuracy.record(report, {"torch_kornia_compile": [training]})
    seconds = {row.metric: row.value for row in report.rows}
    assert seconds["seconds to 50% kNN"] == pytest.approx(6.0) and seconds["compilation"] == 2

    run = time_to_accuracy.run

    def interrupted(system: Any, *args: Any) -> Any:
        if system.name == "bagssl_fast":
            raise KeyboardInterrupt
        return run(system, *args)

    monkeypatch.setattr(time_to_accuracy, "run", interrupted)
    Path(short_training[-1]).unlink()
    with pytest.raises(KeyboardInterrupt):
        time_to_accuracy.main([*short_training, *systems])
    assert {row["provider"] for row in read_rows(short_training[-1])} == {"torch_kornia_compile"}


def test_time_to_accuracy_looks_at_the_test_images_once(
    short_training: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A curve on test images would choose recipes by them, one on trained images would flatter."""
    import time_to_accuracy

    embedded: list[Images] = []
    trained: list[Images] = []
    bags, run = time_to_accuracy.bags, time_to_accuracy.run

    def embed(system: Any, images: Images) -> Any:
        embedded.append(images)
        return bags(system, images)

    def watched(system: Any, *args: Any) -> Any:
        trained.append(system.setup.images)
        return run(system, *args)

    monkeypatch.setattr(time_to_accuracy, "bags", embed)
    monkeypatch.setattr(time_to_accuracy, "run", watched)
    time_to_accuracy.main([*short_training, "--systems", "bagssl_fast", "--evaluations", "2"])
    bank, held_out, test = embedded[0], embedded[1], embedded[-1]
    assert embedded == [bank, held_out] * (len(embedded) // 2) + [test]
    assert len(test) == 8  # all of cifar10-test.tar

    def pixels(images: Images) -> set[bytes]:
        assert images.array is not None
        return {picture.tobytes() for picture in images.array}

    assert pixels(bank) == pixels(trained[0])
    assert not pixels(held_out) & pixels(trained[0])
    assert pixels(held_out) | pixels(trained[0]) == pixels(test)  # the same tar, here
    metrics = {row["metric"] for row in read_rows(short_training[-1])}
    assert {"best kNN", "test kNN", "test linear"} <= metrics


def read_rows(path: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(Path(path).read_text())
    return rows


def test_time_to_accuracy_refuses_other_work(
    short_training: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import time_to_accuracy

    monkeypatch.setattr(throughput, "import_system", lambda where: WrongLoss)
    with pytest.raises(SystemExit, match="wrong does not do the same work"):
        time_to_accuracy.main([*short_training, "--systems", "emp_ssl"])


def test_time_to_accuracy_needs_cifar(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import time_to_accuracy

    monkeypatch.delenv("BAGSSL_DATA", raising=False)
    with pytest.raises(SystemExit):
        time_to_accuracy.parse([])
    assert "bagssl pack FOLDER:train cifar10-train.tar" in capsys.readouterr().err


def test_time_to_accuracy_has_a_short_form(folder: Path) -> None:
    import time_to_accuracy

    short = time_to_accuracy.parse(["--data", str(folder), "--short", "--bank", "7"])
    assert (short.seeds, short.bank) == (1, 7)
    assert short.systems == ["bagssl_fast", "torch_kornia", "torch_kornia_compile"]
    full = time_to_accuracy.parse(["--data", str(folder)])
    assert full.seeds == 3 and {*short.systems} < {*full.systems}


def test_time_to_accuracy_is_read_between_two_evaluations() -> None:
    import time_to_accuracy

    curve = [(0.0, 0.40, 0.55), (10.0, 0.50, 0.58), (20.0, 0.55, 0.57)]
    needed = {(0.45, 1): 5.0, (0.50, 1): 10.0, (0.54, 1): 18.0, (0.56, 1): float("inf")}
    needed |= {(0.55, 2): 0.0, (0.565, 2): 5.0}  # the initialization has it; before a fall
    for (target, probe), seconds in needed.items():
        assert time_to_accuracy.seconds_to(target, curve, probe) == pytest.approx(seconds)


def test_time_to_accuracy_warms_up_and_ends_at_zero() -> None:
    import time_to_accuracy

    factors = [time_to_accuracy.lr_factor(100, step) for step in range(101)]
    assert factors[0] == pytest.approx(1 / 6) and max(factors) == 1 and factors[100] < 1e-9
    assert factors.index(1) == 5 and sorted(factors[6:], reverse=True) == factors[6:]
