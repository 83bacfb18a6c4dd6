"""The import graph, drawn from the code, against the layers that ARCHITECTURE.md lists."""

from __future__ import annotations

import ast
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "bagssl_fast"


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name, kernels/ among them."""
    found = {}
    for folder, prefix in ((ROOT / PACKAGE, PACKAGE), (ROOT / "kernels", f"{PACKAGE}.kernels")):
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            name = ".".join((prefix, *parts)).removesuffix(".__init__")
            found[name] = path
    return found


def imports(name: str, path: Path, known: dict[str, Path]) -> set[str]:
    """The modules of the package that a module imports, wherever in it the import stands."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join(filter(None, [*above, base]))
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                found.add(inner if inner in known else base)
    return (found & known.keys()) - {name}


def room(name: str) -> str:
    """What stands directly in the package: a file, or a folder with all that is in it."""
    return name.split(".")[1] if "." in name else "__init__"


def layers() -> dict[str, int]:
    """The layer of each room, 0 the topmost, as ARCHITECTURE.md lists them."""
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    block = re.search(r"<!-- layers -->\n(.*?)<!-- /layers -->", text, re.S)
    assert block, "ARCHITECTURE.md has lost its list of layers"
    listed: dict[str, int] = {}
    for number, line in enumerate(re.findall(r"^\d+\. .*$", block[1], re.M)):
        for name in re.findall(r"`([\w/]+?)/?`", line):
            assert name not in listed, f"{name} is in two layers"
            listed[name] = number
    return listed


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    known = modules()
    return {name: imports(name, path, known) for name, path in known.items()}


def test_every_room_has_a_layer(graph: dict[str, set[str]]) -> None:
    assert {room(name) for name in graph} - {"__init__"} == layers().keys()


def test_no_module_imports_in_a_circle(graph: dict[str, set[str]]) -> None:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail("import circle: " + " -> ".join(error.args[1]))


def test_no_room_imports_in_a_circle(graph: dict[str, set[str]]) -> None:
    rooms: dict[str, set[str]] = {}
    for name, targets in graph.items():
        rooms.setdefault(room(name), set()).update({room(t) for t in targets} - {room(name)})
    try:
        TopologicalSorter(rooms).prepare()
    except CycleError as error:
        pytest.fail("import circle: " + " -> ".join(error.args[1]))


def test_no_import_goes_up(graph: dict[str, set[str]]) -> None:
    layer = layers()
    wrong = [
        f"{name} (layer {layer[room(name)] + 1}) imports {target} (layer {layer[room(target)] + 1})"
        for name, targets in graph.items()
        for target in targets
        if room(name) != "__init__" and room(target) not in ("__init__", room(name))
        if layer[room(name)] > layer[room(target)]
    ]
    assert not wrong, "\n".join(wrong)


def test_the_graph_is_really_read(graph: dict[str, set[str]]) -> None:
    """An empty graph would pass everything above."""
    assert "bagssl_fast.config" in graph["bagssl_fast.cli"]
    assert "bagssl_fast.losses.vicreg" in graph["bagssl_fast.losses"]
    assert sum(map(len, graph.values())) > 100
