"""How a command ends: its exit code, and errors as one line. Without torch.

0 finished; 1 failed at work (a broken image, a loss that diverged); 2 wrong usage, refused before
any work; 128 + n stopped by signal n, its state saved: `bagssl train && next` is safe.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NoReturn, Protocol

FAILED, WRONG_USAGE = 1, 2
# Under torchrun most errors are the same in all processes: the first of each machine speaks at
# once, and torchrun ends the others before they do, unless theirs was the only one.
PATIENCE = 5.0  # seconds


class Failed(RuntimeError):
    """The work failed; the message is for the user."""


class Stopped(RuntimeError):
    """A signal asked the work to stop; its state is saved.

    Args:
        number: The signal.
        message: Where the work stands and how to resume it.
    """

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.number = number


class Main(Protocol):
    """A command: takes its arguments, or those of the process, and returns its exit code."""

    def __call__(self, argv: Sequence[str] | None = None) -> int: ...


def program(body: Callable[[Sequence[str]], None]) -> Main:
    """Makes a command's `main`: runs `body` on the arguments and returns the exit code."""

    @functools.wraps(body)
    def main(argv: Sequence[str] | None = None) -> int:
        try:
            with errors_end(FAILED):
                body(sys.argv[1:] if argv is None else argv)
        except SystemExit as end:  # of `end` or of --help
            return int(end.code or 0)
        except Stopped as stop:
            if _speaks():
                sys.stderr.write(f"{stop}\n")
            return 128 + stop.number
        except KeyboardInterrupt:
            sys.stderr.write("interrupted\n")
            return 130
        return 0

    return main


def end_soon(stop: Stopped) -> threading.Timer:
    """Ends the process in `PATIENCE` seconds, unless the timer is canceled before.

    A thread that reads from a dead disk cannot be joined, and would hold up the end for ever.
    """

    def leave() -> None:
        if _speaks():
            os.write(2, f"{stop}\n".encode())
        os._exit(128 + stop.number)

    timer = threading.Timer(PATIENCE, leave)
    timer.daemon = True
    timer.start()
    return timer


def one_line(message: str) -> str:
    """A message without line breaks."""
    return re.sub(r"\s*\n\s*", " ", message)


def end(message: str, code: int) -> NoReturn:
    """Prints an error and ends the program.

    Raises:
        SystemExit: With the code.
    """
    if not _speaks():
        time.sleep(PATIENCE)
    sys.stderr.write(f"error: {one_line(message)}\n")
    sys.stderr.flush()
    raise SystemExit(code)


@contextlib.contextmanager
def errors_end(
    code: int, skip: str = "", end: Callable[[str, int], NoReturn] = end
) -> Iterator[None]:
    """Errors that a user can fix end the program with this code and one line.

    Args:
        code: The exit code.
        skip: What a command calls the library's `on_error="skip"`.
        end: Prints the line and ends the program.
    """
    try:
        yield
    except (ValueError, OSError, Failed) as error:
        end(str(error).replace('on_error="skip"', skip or 'on_error="skip"'), code)


def _speaks() -> bool:
    """Whether this is the first (or only) process of its machine."""
    return os.environ.get("LOCAL_RANK", "0") == "0"
