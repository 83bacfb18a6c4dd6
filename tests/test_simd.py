"""SIMD levels: names, the switch, BAGSSL_SIMD, and what has the same bits at every level."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from bagssl_fast import _C

LEVELS = _C.simd_levels()


def results(dtype: str) -> list[np.ndarray]:
    """All that bag_pool, its gradient and patch_rows write; odd sizes leave ragged ends."""
    generator = np.random.default_rng(0)
    P, B, D = 3, 2, 1061
    x = generator.standard_normal((P, B, D)).astype(dtype)
    mean, distance = np.empty((B, D), dtype), np.empty(B, dtype)
    norm, dot, dx = np.empty((P, B), dtype), np.empty((P, B), dtype), np.empty_like(x)
    _C.bag_pool(x, mean=mean, distance=distance, norm=norm, dot=dot, num_threads=1)
    factors = dict.fromkeys(("of_x", "of_mean", "weight"), norm)
    factors |= {"direction": distance, "unit_scale": distance, "dmean": mean, "mean": mean}
    _C.bag_pool_backward(x, dx=dx, **factors, num_threads=1)
    pixels = generator.integers(0, 256, 4000, dtype=np.uint8)
    rows = np.empty((5, 3, 67), dtype)
    offsets = np.array([0, 1, 13, 700, 3000])
    options = {"offsets": offsets, "lines": 3, "stride": 99, "center": 128, "num_threads": 1}
    _C.patch_rows(pixels, out=rows, **options)
    return [mean, distance, norm, dot, dx, rows]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_plain_loops_agree_bitwise(dtype, simd_level):
    actual = results(dtype)
    _C.force_simd_level("baseline")
    for x, expected in zip(actual, results(dtype), strict=True):
        assert np.array_equal(x, expected)


def test_the_level_in_force_is_the_one_that_was_forced(simd_level):
    assert _C.simd_level() == simd_level


def test_none_puts_the_first_level_back():
    before = _C.simd_level()
    _C.force_simd_level("baseline")
    assert _C.simd_level() == "baseline"
    _C.force_simd_level(None)
    assert _C.simd_level() == before


@pytest.mark.parametrize("name", ["sse9", "AVX2", ""])
def test_an_unknown_level_is_refused_and_changes_nothing(name):
    before = _C.simd_level()
    with pytest.raises(ValueError, match=f'"{name}"; expected .*: {", ".join(LEVELS)}$'):
        _C.force_simd_level(name)
    assert _C.simd_level() == before


def run(code: str, level: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "BAGSSL_SIMD": level}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("level", LEVELS)
def test_the_variable_chooses_the_level(level):
    code = "import json; from bagssl_fast import machine; print(json.dumps(machine.report()))"
    report = json.loads(run(code, level).stdout)
    assert report["simd"] == level


def test_an_unset_or_empty_variable_means_the_highest():
    code = "from bagssl_fast import _C; print(_C.simd_level())"
    assert run(code, "").stdout.strip() == LEVELS[-1]


def test_an_unknown_level_in_the_variable_is_refused_at_import():
    done = run("import bagssl_fast.data", "sse9")
    message = f'BAGSSL_SIMD is "sse9"; expected a level that this machine can run: {LEVELS[0]}'
    assert done.returncode != 0
    assert "ValueError" in done.stderr and message in done.stderr
