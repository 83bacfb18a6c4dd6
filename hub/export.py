"""Export `kernels/` as a package for the Hugging Face Kernel Hub: `python hub/export.py OUT`.

OUT is then a project of kernel-builder's (a copy of `project/`, and the kernels under
`torch-ext/`), together with its builds (kernels that are compiled at run time need no compiler):
one folder per backend under `build/`, which `kernels.get_local_kernel(OUT)` loads.

The kernels come along with two changes: their operators are registered under a namespace of the
package's own, so that it can be loaded next to bagssl_fast and other versions of itself, and
errors do not name a fix that is not in the package.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROJECT = Path(__file__).resolve().parent / "project"
NAME = "bagssl-fast-kernels"
MODULE = NAME.replace("-", "_")
VERSION = 1  # of the interface, as in build.toml
BACKENDS = ("cuda", "rocm")

_OP = re.compile(r'"bagssl_triton::(\w+)"')
# The next import in their order, or the blank line before the first operator.
_FIRST_AFTER_OPS = re.compile(r"^(?=from \._(?:patch_ops|tuning) import|\n_\w+ = )", re.M)
_HOW_TO_FIX = 'impl="reference"'
_OPS_PY = '''"""The namespace of this build's operators; written by hub/export.py."""

import torch

ops = torch.ops.{id}


def add_op_namespace_prefix(op_name: str) -> str:
    """The full name of an operator."""
    return f"{id}::{{op_name}}"
'''


def export(out: Path) -> None:
    """Writes the project and its builds.

    Args:
        out: A folder that is empty or does not exist.

    Raises:
        ValueError: If it is not empty, or the kernels are not what this script expects.
    """
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty: name a new folder")
    shutil.copytree(PROJECT, out, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)
    shutil.copy(ROOT / "LICENSE", out / "LICENSE")
    sources = out / "torch-ext" / MODULE
    for path in sorted((ROOT / "kernels").glob("*.py")):
        if path.name != "__init__.py":
            (sources / path.name).write_text(rewrite(path), encoding="utf-8")
    for backend in BACKENDS:
        build(sources, out / "build" / f"torch-{backend}", backend)


def rewrite(path: Path) -> str:
    """The text of a kernel file as the package has it."""
    text = path.read_text(encoding="utf-8")
    if path.name == "_common.py":
        if _HOW_TO_FIX not in text:
            raise ValueError(f"{path} does not contain {_HOW_TO_FIX!r}: adapt hub/export.py to it")
        text = text.replace(_HOW_TO_FIX, "plain torch")
    text, found = _OP.subn(r'add_op_namespace_prefix("\1")', text)
    if found:
        first = _FIRST_AFTER_OPS.search(text)
        if first is None:
            raise ValueError(
                f"{path} has no line before which to import its namespace: adapt {__file__} to it"
            )
        line = "from ._ops import add_op_namespace_prefix\n"
        text = text[: first.start()] + line + text[first.start() :]
    return text


def build(sources: Path, variant: Path, backend: str) -> None:
    """What kernel-builder makes of Python sources: these, a namespace, and a description."""
    shutil.copytree(sources, variant)
    content = hashlib.sha256()
    for path in sorted(variant.rglob("*.py")):
        content.update(path.name.encode() + path.read_bytes())
    # Its content names a build: no two can meet in one process and be different.
    name = f"_{MODULE}_{backend}_{content.hexdigest()[:7]}"
    (variant / "_ops.py").write_text(_OPS_PY.format(id=name), encoding="utf-8")
    files = {
        path.relative_to(variant).as_posix(): base64.b64encode(
            hashlib.sha256(path.read_bytes()).digest()
        ).decode()
        for path in sorted(variant.rglob("*.py"))
    }
    metadata = {
        "name": NAME,
        "id": name,
        "version": VERSION,
        "license": "mit",
        "python-depends": [],
        "backend": {"type": backend},
        "digest": {"algorithm": "sha256", "files": files},
    }
    (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """The program. Returns 0, or 2 for wrong usage."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="an empty folder, or one to make")
    out = parser.parse_args(argv).out
    try:
        export(out)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    sys.stdout.write(f"written {out}: build.toml, torch-ext/{MODULE}, build/\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
