"""The kernel under test: this project's own build, on a GPU or in Triton's interpreter."""

import importlib.util
import json
import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


def load(variant):
    """Imports one build under the name it gives itself, as the `kernels` package does."""
    name = json.loads((variant / "metadata.json").read_text())["id"]
    spec = importlib.util.spec_from_file_location(name, variant / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def kernel():
    try:
        from kernels import get_local_kernel
    except ImportError:
        return load(ROOT / "build" / ("torch-rocm" if torch.version.hip else "torch-cuda"))
    return get_local_kernel(ROOT)


@pytest.fixture(scope="session")
def other_kernel():
    """A build of the same functions under another name."""
    return load(ROOT / "build" / ("torch-cuda" if torch.version.hip else "torch-rocm"))


@pytest.fixture(scope="session")
def device():
    if torch.cuda.is_available():
        return "cuda"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "cpu"
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1")
