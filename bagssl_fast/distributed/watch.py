"""What became of the other processes: signs of life and errors, over torch's key-value store."""

from __future__ import annotations

import contextlib
import itertools
import os
import sys
import threading
import time

import torch.distributed as dist

from bagssl_fast.exits import FAILED, Failed, one_line

BEAT = 1.0  # seconds between two signs of life
SILENT = 5.0  # seconds without one after which a process counts as gone, once a collective failed
QUIET = 30.0  # seconds without one after which that is said, though nothing failed yet
GRACE = 20.0  # seconds that a process has to end by itself once the job has failed
# A collective that fails because another process left is a plain RuntimeError under gloo.
SYMPTOMS = ("gloo", "closed by peer", "reset by peer", "pair closure", "Timed out waiting")


class PeerLost(Failed):
    """A collective failed because another process ended or does not respond."""


def failed_collective(error: BaseException) -> bool:
    """Whether an error is what the end or silence of another process looks like from here."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in SYMPTOMS)


class Watch:
    """Lets the first process say why a job ends, and ends those that cannot end by themselves.

    A thread leaves a sign of life every second. The one of the first process reads those of the
    others and, when a process reports an error or a collective fails, finds out whose fault it is
    and says so at once: its main thread may wait for ever in a collective.

    Args:
        rank: Of this process.
        world_size: Number of processes.
        store: Through which all processes exchange keys.
        timeout: Seconds that a collective waits, for the message.
    """

    def __init__(self, rank: int, world_size: int, store: dist.Store, timeout: float) -> None:
        self.rank, self.world_size, self.timeout = rank, world_size, timeout
        self.store = store.clone()  # of the main thread; a client serves one call at a time
        self.beats = [f"beat/{r}" for r in range(world_size)]
        self.seen: dict[int, tuple[bytes, float]] = {}
        self.quiet: set[int] = set()
        self.first_lost = 0.0  # when a failed collective was first heard of
        self.saying = threading.Lock()
        self.said = ""  # by the first process
        self.known = ""  # the same, as this process has heard it
        self.orphaned = False  # the first process is gone
        self.leaving = threading.Event()
        self.closed = threading.Event()
        self.thread = threading.Thread(target=self._run, args=(store.clone(),), daemon=True)
        self.thread.start()

    def close(self) -> None:
        """Ends the thread."""
        self.closed.set()
        self.thread.join()

    def end(self, message: str) -> None:
        """Says an error of this process, or has the first one say it; it leaves next."""
        self.leaving.set()
        text = one_line(message)
        if self.rank == 0:
            self._say(self.store, text)
            self._linger()
        elif (self.orphaned or not self._report(text)) and self.rank == 1:
            sys.stderr.write(f"error: {text}\n")

    def report(self, error: BaseException) -> None:
        """Tells the others of an error that this process itself shows with its traceback."""
        self.leaving.set()
        text = one_line(f"{type(error).__name__}: {error}")
        if self.rank == 0:
            self.said = text
            self._set("cause", text)
            self._linger()
        else:
            self._report(text)

    def _linger(self) -> None:
        """Lets the others hear it: without torchrun the store ends with the first process."""
        if not self.known:
            time.sleep(2 * BEAT)

    def lost(self, error: BaseException) -> PeerLost:
        """What the first process finds out about a collective that failed."""
        self.leaving.set()
        if not self.known:
            self._set(f"lost/{self.rank}", one_line(str(error)))
            self._set("lost", one_line(str(error)))
        cause = self._cause(3 * SILENT)
        self.orphaned = cause == ""
        return PeerLost(
            cause
            or f"rank 0 of {self.world_size} is gone or does not respond; resume the run "
            "from its last checkpoint with --resume auto"
        )

    def _report(self, text: str) -> bool:
        """Leaves an error for the first process; whether it was said."""
        if not self._cause(0):
            self._set("failed", f"rank {self.rank} of {self.world_size}: {text}")
        return bool(self._cause(SILENT))

    def _cause(self, seconds: float) -> str:
        """What the first process has said, "" if it says nothing within some seconds."""
        deadline = time.monotonic() + seconds
        with contextlib.suppress(dist.DistError):  # the store ends with the process that holds it
            while not self.known:
                if self.store.check(["cause"]):
                    return self.store.get("cause").decode()
                if time.monotonic() >= deadline:
                    break
                time.sleep(0.1)
        return self.known

    def _set(self, key: str, value: str) -> None:
        with contextlib.suppress(dist.DistError):
            self.store.set(key, value)

    def _say(self, store: dist.Store, text: str) -> None:
        with self.saying:
            # All may meet the same error, each before or after the others have told theirs.
            known = self.said and (self.said.endswith(text) or text.endswith(self.said))
            if not known:
                os.write(2, f"error: {text}\n".encode())
            self.said = text
            with contextlib.suppress(dist.DistError):
                store.set("cause", text)

    def _run(self, store: dist.Store) -> None:
        """The thread."""
        # When the store is gone, so is the process that held it, and the job has failed.
        with contextlib.suppress(dist.DistError):
            for count in itertools.count():
                store.set(self.beats[self.rank], str(count))
                if self.rank == 0 and not self.said and store.check(self.beats):
                    self._listen(store)
                if self.closed.wait(BEAT):
                    return
                if store.check(["cause"]):
                    self.known = store.get("cause").decode()
                    break
        if not self.closed.wait(GRACE) and not self.leaving.is_set():
            os._exit(FAILED)  # the main thread waits for a collective, or for data

    def _listen(self, store: dist.Store) -> None:
        """One look of the first process at the others."""
        now = time.monotonic()
        for rank, value in enumerate(store.multi_get(self.beats)):
            if rank not in self.seen or self.seen[rank][0] != value:
                self.seen[rank] = (value, now)
                self.quiet.discard(rank)
        if store.check(["failed"]):
            self._say(store, store.get("failed").decode())
        elif store.check(["lost"]):
            self.first_lost = self.first_lost or now
            gone = self._silent_for(SILENT)
            if gone:
                self._say(store, self._why(gone, store.get("lost").decode()))
            elif now - self.first_lost > 2 * SILENT:
                idle = [r for r in range(self.world_size) if not store.check([f"lost/{r}"])]
                self._say(store, self._why(idle, store.get("lost").decode(), alive=True))
        else:
            for rank in set(self._silent_for(QUIET)) - self.quiet:
                self.quiet.add(rank)
                text = f"rank {rank} of {self.world_size} has not been heard for {QUIET:.0f} s"
                os.write(2, f"warning  {text}; --ranks_timeout ends the job\n".encode())

    def _silent_for(self, seconds: float) -> list[int]:
        now = time.monotonic()
        return [rank for rank, (_, when) in self.seen.items() if now - when > seconds]

    def _why(self, ranks: list[int], error: str, alive: bool = False) -> str:
        """The sentence about processes that keep the others waiting."""
        some = ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")
        who = f"rank {some} of {self.world_size}"
        if alive:
            return (
                f"{who} is alive but did not take part in a step within --ranks_timeout "
                f"({self.timeout:.0f} s): does its data stall? ({error[:120]})"
            )
        if "Timed out" in error or "timeout" in error:
            return (
                f"{who} did not respond for --ranks_timeout ({self.timeout:.0f} s): it is stopped, "
                "or its machine cannot be reached"
            )
        return (
            f"{who} is gone without an error of its own: killed (out of memory?), or its machine "
            "is lost"
        )
