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


def documented_tree() -> set[str]:
    """The paths of "Where things are": a line each, two spaces deeper within a folder."""
    text = (ROOT / "ARCHITECTURE.md").read_text()
    block = re.search(r"## Where things are\n\n```\n(.*?)```", text, re.S)
    assert block, "ARCHITECTURE.md has lost its tree"
    found: set[str] = set()
    above: list[str] = []
    for line in block[1].splitlines():
        name, purpose = line.split(maxsplit=1)
        assert purpose, f"{name}: no line of purpose"
        depth = (len(line) - len(line.lstrip())) // 2
        path = "".join(above[:depth]) + name
        assert path not in found, f"{path} is there twice"
        found.add(path)
        above[depth:] = [name]
    return found


def test_architecture_names_every_file() -> None:
    listed = documented_tree()
    files = [*(ROOT / "bagssl_fast").rglob("*.py"), *(ROOT / "kernels").glob("*.py")]
    paths = {p.relative_to(ROOT).as_posix() for p in files if p.name != "__init__.py"}
    missing = paths - listed
    gone = {path for path in listed if path.endswith(".py")} - paths - {"setup.py"}
    assert not missing and not gone, f"missing: {sorted(missing)}; gone: {sorted(gone)}"
    stems = {f"csrc/{p.stem}" for p in (ROOT / "csrc").iterdir() if p.suffix in (".h", ".cpp")}
    listed_stems = {path for path in listed if path.startswith("csrc/") and path != "csrc/"}
    # The parts of a file, as foo_body.h of foo, are named in its line.
    parts = {s for s in stems if any(s.startswith(f"{whole}_") for whole in listed_stems)}
    assert listed_stems <= stems, f"gone: {sorted(listed_stems - stems)}"
    assert stems - parts <= listed_stems, f"missing: {sorted(stems - parts - listed_stems)}"


def test_architecture_fits_a_screen() -> None:
    long = [
        n
        for n, x in enumerate((ROOT / "ARCHITECTURE.md").read_text().splitlines(), 1)
        if len(x) >= 120
    ]
    assert not long, f"ARCHITECTURE.md has lines of 120 characters and more: {long}"


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
    outside = {"bench", "harness", "baselines", "tests"}
    for path in [*(ROOT / "bagssl_fast").rglob("*.py"), *(ROOT / "kernels").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            assert not {n.split(".")[0] for n in names} & outside, path


def test_kernels_import_torch_and_triton_only() -> None:
    allowed = {"torch", "triton", "__future__", "math", "typing", "collections", "dataclasses"}
    allowed |= {"contextlib", "functools", "os"}
    for path in (ROOT / "kernels").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            assert {n.split(".")[0] for n in names} <= allowed, path
