"""Fixtures shared by all tests: the real data of `BAGSSL_DATA`, and skips for what is not here."""

import functools
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from runs import start, tiny_images  # noqa: F401

from bagssl_fast import _C

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real images that `BAGSSL_DATA` names; tests skip where it is absent."""
    folder = os.environ.get("BAGSSL_DATA")
    if not folder:
        pytest.skip("BAGSSL_DATA is not set: no real images to test on")
    path = Path(folder) if Path(folder).is_absolute() else ROOT / folder
    if not path.is_dir():
        pytest.skip(f"BAGSSL_DATA={folder} is not a folder")
    return path.resolve()


@pytest.fixture(scope="session")
def cifar_tar(data_dir: Path) -> Path:
    return data_dir / "cifar10-test.tar"


@pytest.fixture(scope="session")
def imagenet_tar(data_dir: Path) -> Path:
    return data_dir / "imagenet-sample.tar"


def _in_force(level: str) -> Iterator[str]:
    _C.force_simd_level(level)
    yield level
    _C.force_simd_level(None)


@pytest.fixture(params=_C.simd_levels()[:3])
def simd_level(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each SIMD level that this machine can run, in force while the test runs.

    Those above avx512 differ from it for bfloat16 alone.
    """
    yield from _in_force(request.param)


@pytest.fixture(params=_C.simd_levels())
def bf16_level(request: pytest.FixtureRequest) -> Iterator[str]:
    """The same for loops over bfloat16."""
    yield from _in_force(request.param)


@pytest.fixture
def aot(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torch.compile without its code generation: what is traced runs in torch's own ops."""
    compiled = functools.partial(torch.compile, backend="aot_eager")
    monkeypatch.setattr(torch, "compile", compiled)
    yield
    torch.compiler.reset()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA device")
        for item in items:
            if item.get_closest_marker("gpu"):  # keywords hold the names of folders, too
                item.add_marker(skip)
