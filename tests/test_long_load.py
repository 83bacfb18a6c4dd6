"""The short form of scripts/long_load.py: threads, descriptors and memory stay flat."""

import importlib.util
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "long_load.py"


@pytest.fixture(scope="module")
def long_load():
    spec = importlib.util.spec_from_file_location("long_load", SCRIPT)
    module = sys.modules["long_load"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_nothing_grows_under_load(long_load, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    results = long_load.run(loaders=60, epochs=60, bursts=20, threads=8)
    assert len(results) == 5
    for result in results:
        assert result.batches > 0 and result.is_flat(), result.row()


def test_growth_is_seen(long_load):
    kept, first = [], long_load.Use.now()
    kept.append(bytearray(b"x") * (32 << 20))
    kept.append(open(SCRIPT))  # noqa: SIM115
    grown = long_load.Use.now()
    kept[1].close()
    result = long_load.Result("", 1, 1, first, grown)
    assert grown.descriptors == first.descriptors + 1
    assert grown.memory - first.memory > 30 << 20 and not result.is_flat()
    assert long_load.Result("", 1, 1, first, first).is_flat()
