"""The op benches under pytest-benchmark: `pytest bench --benchmark-only`, one group per case."""

from __future__ import annotations

import pytest

import bench_add_relu
import bench_bag_pool
import bench_conv_bn_relu
import bench_dense
import bench_linear_bn_relu
import bench_patch_embed
import bench_patch_views
import bench_relu_mean
import bench_tcr
import bench_vicreg
from harness.common import OURS
from harness.ops import COMPILED, OpCase

BENCHES = (
    bench_vicreg,
    bench_tcr,
    bench_bag_pool,
    bench_patch_embed,
    bench_patch_views,
    bench_linear_bn_relu,
    bench_conv_bn_relu,
    bench_add_relu,
    bench_relu_mean,
    bench_dense,
)


def runs() -> list:
    return [
        pytest.param(bench.build, case, name, id=f"{bench.__name__[6:]}-{case.id}-{name}")
        for bench in BENCHES
        for case in bench.CASES
        for name in (OURS, *case.providers)
        # The others take minutes: `python bench/bench_<op>.py`.
        if case.quick and name != COMPILED
    ]


@pytest.mark.parametrize(("build", "case", "name"), runs())
def test_op(benchmark, build, case: OpCase, name: str):
    benchmark.group = case.id
    benchmark.pedantic(build(name, case.id), rounds=min(case.rounds, 5), warmup_rounds=1)
