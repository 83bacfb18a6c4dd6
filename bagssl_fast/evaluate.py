"""Evaluate a run: `bagssl evaluate RUN [--patches 1,4,16,64,256] ...`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from bagssl_fast import cli, locate, machine
from bagssl_fast.arguments import Parser
from bagssl_fast.config import Config, EvalConfig, check_eval
from bagssl_fast.exits import FAILED, WRONG_USAGE, errors_end, program

SKIP = "--on_error skip"
TOP = ("data", "test_data", "labels", "device", "threads", "impl")  # fields of Config


@dataclass(frozen=True)
class Evaluate(EvalConfig):
    """Measures a trained run; options that are left out are as the run has them.

    For each number of patches the embeddings of a grid of unaugmented patches are averaged, and a
    weighted kNN and a linear probe read the class from the bag: for the trained network and for
    the same network at its random initialization, for embedding h and projection z. Beside them
    stands the central crop: the whole central square, shrunk to the size of one patch.

    The mean of h, read by cosines, is the paper's way. It is always there; beside it a second kNN
    reads h in another space (knn_space), and a grid of regions keeps a part of the layout (grid).

    Args:
        run: Run directory, or a folder that `bagssl export` wrote.
        data: Training images of the probes.
        test_data: Test images.
        labels: auto takes the classes that the data has, none ignores them.
        device: auto, cpu or cuda.
        threads: CPU threads of torch; 0 takes every core this process may use.
        impl: Implementation of the ops: auto, reference, cpu or cuda.
        on_error: What a broken image does: raise stops, skip leaves it out.
        out: Directory for evaluations/, eval.json and eval.png; by default the run's, where the
            last two are the latest evaluation on the run's own images.
    """

    run: Path = field(kw_only=True)
    data: str = "demo"
    test_data: str | None = None
    labels: Literal["auto", "none"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int = 0
    impl: Literal["auto", "reference", "cpu", "cuda"] = "auto"
    on_error: Literal["raise", "skip"] = "raise"
    out: Path | None = None


def load_config(run: Path) -> Config:
    """The configuration of a run or an exported model.

    Raises:
        ValueError: If it is damaged.
    """
    if (run / "config.yaml").is_file():
        return cli.load(run / "config.yaml")  # without torch
    from bagssl_fast.models import saved

    return saved.load_config(run)


def override(config: Config, given: Mapping[str, Any]) -> Config:
    """The run's configuration with the options of a command line over it."""
    names = {f.name for f in fields(EvalConfig)}
    top = {name: given[name] for name in TOP if name in given}
    options = {name: value for name, value in given.items() if name in names}
    loader = replace(config.loader, on_error=given.get("on_error", config.loader.on_error))
    return replace(config, **top, loader=loader, eval=replace(config.eval, **options))


@program
def main(argv: Sequence[str]) -> None:
    """The program."""
    with errors_end(WRONG_USAGE):
        parser = Parser(Evaluate, "evaluate", defaults=False, skip=("enabled",))
        given = parser.read(argv)
        run = given["run"]
        locate.check_run(run)
        config = override(load_config(run), given)
        check_eval(config.eval, prefix="")
        for data in filter(None, (config.data, config.test_data)):
            locate.check_data(data)
    machine.tune_process()

    from bagssl_fast import ops
    from bagssl_fast.evaluation.measure import carry_out, prepare

    ops.set_impl(None if config.impl == "auto" else config.impl)
    with errors_end(WRONG_USAGE, SKIP):
        evaluation = prepare(run, config, given.get("out"))
    with errors_end(FAILED, SKIP):
        carry_out(evaluation)


if __name__ == "__main__":
    raise SystemExit(main())
