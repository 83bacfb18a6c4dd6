"""What the documents promise is what the project does."""

import ast
import re
from pathlib import Path

import pytest

from bagssl_fast import ops

ROOT = Path(__file__).resolve().parent.parent


def documented_table() -> dict[str, tuple[str | None, ...]]:
    text = (ROOT / "ARCHITECTURE.md").read_text()
    block = re.search(r"<!-- dispatch -->\n(.*?)<!-- /dispatch -->", text, re.S)
    assert block, "ARCHITECTURE.md has lost its dispatch table"
    rows = [line.strip("|").split("|") for line in block[1].splitlines()[2:]]
    cells = [[cell.strip().strip("`") for cell in row] for row in rows]
    return {row[0]: tuple(None if c == "None" else c for c in row[1:]) for row in cells}


def test_architecture_shows_the_dispatch_table_that_runs() -> None:
    assert documented_table() == ops.DISPATCH


@pytest.mark.parametrize("op", sorted(ops.DISPATCH))
def test_every_filled_cell_has_its_file_test_and_bench(op: str) -> None:
    for cell in filter(None, ops.DISPATCH[op]):
        folder = ROOT / "kernels" if cell == "kernels" else ROOT / "bagssl_fast" / "ops" / cell
        assert (folder / f"{op}.py").is_file(), f"{op}: {folder} has no {op}.py"
    assert (ROOT / "tests" / f"test_{op}.py").is_file()
    assert (ROOT / "bench" / f"bench_{op}.py").is_file()


def test_ci_runs_the_test_command_of_the_readme() -> None:
    command = re.search(r"```bash\n(pip install [^\n]*pytest)\n", (ROOT / "README.md").read_text())
    assert command, "README.md has lost its test command"
    assert command[1] in (ROOT / ".ci" / "run").read_text().splitlines()


def test_package_does_not_import_from_bench_or_tests() -> None:
    for path in [*(ROOT / "bagssl_fast").rglob("*.py"), *(ROOT / "kernels").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            assert not {n.split(".")[0] for n in names} & {"bench", "tests"}, path


def test_kernels_import_torch_and_triton_only() -> None:
    allowed = {"torch", "triton", "__future__", "math", "typing", "collections", "dataclasses"}
    allowed |= {"contextlib", "functools", "os"}
    for path in (ROOT / "kernels").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            assert {n.split(".")[0] for n in names} <= allowed, path
