"""The package for the Kernel Hub: complete, self-contained, and working without bagssl_fast."""

import ast
import base64
import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FUNCTIONS = {"bag_pool", "linear_bn_relu", "patch_embed", "patch_views", "tcr", "vicreg"}
# Runs the package's own tests where bagssl_fast cannot be imported.
ALONE = """
import sys
sys.modules["bagssl_fast"] = None
import pytest
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "-W", "ignore", "tests"]))
"""


def run(code, folder):
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    out = tmp_path_factory.mktemp("hub") / "package"
    command = [sys.executable, str(ROOT / "hub" / "export.py"), str(out)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return out


def modules(package):
    files = [*package.glob("torch-ext/**/*.py"), *package.glob("build/**/*.py")]
    assert len(files) > 30
    return files


def test_imports_are_relative_or_torch_and_triton(package):
    allowed = {"torch", "triton", *sys.stdlib_module_names}
    for path in modules(package):
        text = path.read_text()
        assert "bagssl_triton" not in text and "impl=" not in text, path
        for node in ast.walk(ast.parse(text)):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            assert {name.split(".")[0] for name in names} <= allowed, path


def test_every_kernel_is_exported(package):
    init = ast.parse((package / "torch-ext/bagssl_fast_kernels/__init__.py").read_text())
    (names,) = (ast.literal_eval(n.value) for n in init.body if isinstance(n, ast.Assign))
    kernels = {p.stem for p in (ROOT / "kernels").glob("[a-z]*.py")}
    assert set(names) == kernels | {"layers"} == FUNCTIONS | {"layers"}


def test_operators_have_the_namespace_of_the_build(package):
    seen = set()
    for variant in sorted((package / "build").iterdir()):
        described = json.loads((variant / "metadata.json").read_text())
        assert described["name"] == "bagssl-fast-kernels" and described["version"] == 1
        assert variant.name == f"torch-{described['backend']['type']}"
        assert f'"{described["id"]}::' in (variant / "_ops.py").read_text()
        for path in variant.glob("[a-z]*.py"):
            if path.stem in FUNCTIONS:
                assert len(re.findall(r'add_op_namespace_prefix\("', path.read_text())) >= 1, path
        digests = {
            p.relative_to(variant).as_posix(): base64.b64encode(
                hashlib.sha256(p.read_bytes()).digest()
            ).decode()
            for p in variant.rglob("*.py")
        }
        assert described["digest"] == {"algorithm": "sha256", "files": digests}
        seen.add(described["id"])
    assert len(seen) == 2


def test_build_toml(package):
    tomllib = pytest.importorskip("tomllib", reason="tomllib is Python 3.11's")
    build = tomllib.loads((package / "build.toml").read_text())
    assert build.keys() == {"general", "torch-noarch"}
    general = build["general"]
    assert general["name"].replace("-", "_") == next((package / "torch-ext").iterdir()).name
    assert general["backends"] == ["cuda", "rocm"]
    for name in ("flake.nix", "CARD.md", "LICENSE", "example.py", "tests/__init__.py"):
        assert (package / name).is_file()


def test_the_tools_of_the_hub_read_it(package):
    kernels = pytest.importorskip("kernels._rust", reason="the package kernels is not installed")
    backends = [str(b).lower() for b in kernels.Build.open(package).general.backends]
    assert backends == ["cuda", "rocm"]
    for variant in (package / "build").iterdir():
        metadata = kernels.Metadata.read_from_file(variant / "metadata.json")
        sha256 = kernels.DigestAlgorithm.SHA256
        metadata.digest.validate(kernels.Digest.hash_variant(sha256, variant))


def test_works_alone(package):
    """Values and gradients against plain torch, in the interpreter, in a process of its own."""
    pytest.importorskip("triton")
    result = run(ALONE, package)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert re.search(r"\b9 passed", result.stdout), result.stdout[-2000:]


def test_refuses_a_folder_with_something_in_it(package):
    command = [sys.executable, str(ROOT / "hub" / "export.py"), str(package)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2 and "not empty" in result.stderr
