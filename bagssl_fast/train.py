"""Train a bag-of-patches model: `bagssl train [--config RECIPE] [--data PATH]`.

`python -m bagssl_fast.train` is the same, and what torchrun starts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

from bagssl_fast import cli, locate, machine
from bagssl_fast.config import Config, check
from bagssl_fast.exits import FAILED, WRONG_USAGE, Failed, errors_end, program
from bagssl_fast.terminal import say

SKIP = "--loader.on_error skip"


def check_paths(config: Config) -> None:
    """Refuses paths that name nothing, or what nobody asked to touch.

    Raises:
        ValueError, OSError: Naming the path.
    """
    locate.check_data(config.data)
    if config.test_data is not None:
        locate.check_data(config.test_data)
    locate.check_resume(config.resume)
    if config.run_dir is not None:
        locate.check_run_dir(Path(config.run_dir), config.resume, config.overwrite)


def evaluate_run(run_dir: Path) -> None:
    """Evaluates a finished run.

    Raises:
        Failed: If that cannot be done; it takes nothing from the run.
    """
    from bagssl_fast.evaluation.measure import evaluate

    try:
        evaluate(run_dir)
    except (ValueError, OSError) as error:
        raise Failed(
            f"{error}; the run itself is complete, evaluate it later with bagssl evaluate {run_dir}"
        ) from error


@program
def main(argv: Sequence[str]) -> None:
    """The program."""
    with errors_end(WRONG_USAGE):
        config = cli.parse(argv)
        check(config)
        check_paths(config)
    machine.tune_process()

    from bagssl_fast.distributed import ranks
    from bagssl_fast.training.loop import train
    from bagssl_fast.training.run import prepare

    with errors_end(WRONG_USAGE, SKIP):
        me = ranks.start(config.device, 60 * config.ranks_timeout)
    try:
        with errors_end(FAILED, SKIP, me.end), me.together():
            with errors_end(WRONG_USAGE, SKIP, me.end):
                run = prepare(config, me)
            with contextlib.closing(run):
                train(run)
    finally:
        ranks.stop(me)
    if not me.is_main:
        return
    say(f"finished: {run.run_dir}, step {run.step} of {run.total_steps}")
    if run.loader.skipped:
        say(f"{len(run.loader.skipped)} broken images were replaced: {run.run_dir}/skipped.txt")
    if config.eval.enabled:
        say("the run is complete, its evaluation follows (--eval.enabled false leaves it out)")
        evaluate_run(run.run_dir)


if __name__ == "__main__":
    raise SystemExit(main())
