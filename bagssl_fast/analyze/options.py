"""The command line of an analysis, without torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from bagssl_fast import cli, locate
from bagssl_fast.analyze.study import CLAIMS


@dataclass(frozen=True)
class Analyze:
    """Tests the paper's claims on your images.

    Trains what the chosen claims need, measures, and writes report.html, one PNG per figure and
    results.json into the output directory. The same command resumes after an interruption.

    Args:
        data: Training images, as for train.
        test_data: Test images; by default found by the name of the data.
        out: Output directory.
        claims: Which claims.
        quick: A look in minutes instead of a measurement.
        seeds: Trainings per setting.
        config: Recipe of the models, a yaml file or a bare name.
        device: auto (CUDA where there is one), cpu or cuda.
        threads: CPU threads; 0 takes every core this process may use.
    """

    data: str = "demo"
    test_data: str | None = None
    out: Path = Path("analysis")
    claims: tuple[int, ...] = CLAIMS
    quick: bool = False
    seeds: int = 2
    config: str = "analysis"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int = 0


def check(options: Analyze) -> None:
    """Refuses what cannot work, before anything heavy starts.

    Raises:
        ValueError, OSError: Naming the option and how to fix it.
    """
    if not options.claims or not set(options.claims) <= set(CLAIMS):
        shown = ",".join(map(str, options.claims))
        raise ValueError(f"--claims {shown}: there are claims 1 to {len(CLAIMS)}, such as 1,3")
    if options.seeds < 1:
        raise ValueError(f"--seeds {options.seeds}: must be 1 or more")
    for data in filter(None, (options.data, options.test_data)):
        locate.check_data(data)
    cli.load(cli.find_recipe(options.config))
    if options.out.exists() and not options.out.is_dir():
        raise ValueError(f"--out {options.out} is a file; name a directory")
