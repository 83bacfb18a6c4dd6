"""Test the paper's claims on your images: `bagssl analyze --data PATH --out DIR`."""

from __future__ import annotations

import signal
from collections.abc import Sequence

from bagssl_fast import arguments, machine
from bagssl_fast.analyze.options import Analyze, check
from bagssl_fast.exits import FAILED, WRONG_USAGE, Stopped, errors_end, program


@program
def main(argv: Sequence[str]) -> None:
    """The program."""
    with errors_end(WRONG_USAGE):
        options = arguments.read(Analyze, argv, "analyze")
        check(options)
    machine.tune_process()

    from bagssl_fast.analyze.analysis import describe, examine, make_context, studies, write
    from bagssl_fast.analyze.models import prepare_threads

    with errors_end(WRONG_USAGE):
        context = make_context(options)
        _ = context.device, context.images  # to fail now
        options.out.mkdir(parents=True, exist_ok=True)
    prepare_threads(context.base)
    try:
        with errors_end(FAILED):
            results = [examine(study, context) for study in studies(options.claims)]
            write(context, results, describe(options, context, results))
    except KeyboardInterrupt:
        raise Stopped(signal.SIGINT, "interrupted; the same command resumes it") from None


if __name__ == "__main__":
    raise SystemExit(main())
