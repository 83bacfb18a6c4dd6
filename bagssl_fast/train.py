"""Train a bag-of-patches model: `python -m bagssl_fast.train [--config RECIPE] [--data PATH]`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from bagssl_fast import cli
from bagssl_fast.terminal import say

if __name__ == "__main__" and "torch" not in sys.modules:
    # Read once, when torch loads its OpenMP: threads that wait for work must not spin, since the
    # loader's threads want the cores meanwhile.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def evaluate_run(run_dir: Path) -> int:
    """Evaluates a finished run; what is wrong with the data for it takes nothing from the run."""
    from bagssl_fast.evaluation.measure import evaluate

    try:
        evaluate(run_dir)
    except (ValueError, OSError) as error:
        sys.stderr.write(
            f"error: {error}\n"
            f"The run itself is complete; later: python -m bagssl_fast.evaluate {run_dir}\n"
        )
        return 2
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """The program. Returns 0 for a finished or asked-to-stop run, 1 diverged, 2 wrong usage."""
    config = cli.parse(sys.argv[1:] if argv is None else argv)

    from bagssl_fast.distributed import ranks
    from bagssl_fast.training.loop import train
    from bagssl_fast.training.meter import Diverged
    from bagssl_fast.training.run import prepare

    try:
        me = ranks.start(config.device)
        run = prepare(config, me)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        ranks.stop()
        return 2
    try:
        finished = train(run)
    except Diverged as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    finally:
        run.loader.close()
        ranks.stop()
    if me.is_main:
        state = "finished" if finished else "stopped on request; --resume auto goes on"
        say(f"{state}: {run.run_dir}, step {run.step} of {run.total_steps}")
        if run.loader.skipped:
            say(f"{len(run.loader.skipped)} broken images were replaced: {run.run_dir}/skipped.txt")
    if finished and config.eval.enabled and me.is_main:
        return evaluate_run(run.run_dir)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
