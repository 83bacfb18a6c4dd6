"""This process among those that `torchrun` started: rank, small exchanges, signals."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from bagssl_fast import exits
from bagssl_fast.distributed.watch import Watch, failed_collective

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Ranks:
    """This process and its peers; the defaults are a run of one process.

    Args:
        rank: 0 .. world_size - 1.
        world_size: Number of processes.
        device: Device of this process.
        group: The group of all processes, None when there is one.
        watch: Knows what became of the others, None when there is one process.
    """

    rank: int = 0
    world_size: int = 1
    device: torch.device = CPU
    group: ProcessGroup | None = None
    watch: Watch | None = None

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and messages."""
        return self.rank == 0

    def mean(self, values: Sequence[float]) -> list[float]:
        """Each value averaged over the processes."""
        return [v / self.world_size for v in self._reduce(values, dist.ReduceOp.SUM)]

    def total(self, values: Sequence[float]) -> list[float]:
        """Each value summed over the processes."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def maximum(self, values: Sequence[float]) -> list[float]:
        """The largest of each value over the processes."""
        return self._reduce(values, dist.ReduceOp.MAX)

    def _reduce(self, values: Sequence[float], op: dist.ReduceOp.RedOpType) -> list[float]:
        if self.group is None:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, op=op, group=self.group)
        return [float(v) for v in tensor.tolist()]

    def from_main(self, text: str) -> str:
        """The text of rank 0, on every rank."""
        if self.group is None:
            return text
        box = [text]
        dist.broadcast_object_list(box, src=0, group=self.group)
        return box[0]

    def wait(self) -> None:
        """Waits until every process is here."""
        self.total([0.0])

    def end(self, message: str, code: int) -> NoReturn:
        """Ends this process for an error: one line on the screen of the first one.

        Raises:
            SystemExit: With the code.
        """
        if self.watch is None:
            exits.end(message, code)
        self.watch.end(message)
        raise SystemExit(code)

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Around work with collectives.

        Raises:
            PeerLost: For a collective that failed because another process left or hangs.
        """
        try:
            yield
        except Exception as error:
            # Those a user can fix are told by `end`.
            if self.watch is None or isinstance(
                error, ValueError | OSError | exits.Failed | exits.Stopped
            ):
                raise
            if failed_collective(error):
                raise self.watch.lost(error) from None
            self.watch.report(error)
            raise


def pick_device(option: str, local_rank: int = 0) -> torch.device:
    """The device that `--device auto|cpu|cuda` means for one process.

    Raises:
        ValueError: If cuda is asked for and there is none.
    """
    if option == "auto":
        option = "cuda" if torch.cuda.is_available() else "cpu"
    if option == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no CUDA device; use --device cpu or auto")
    if local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"rank {local_rank} of this machine has no GPU of its own: "
            f"{torch.cuda.device_count()} are visible; lower torchrun's --nproc_per_node"
        )
    return torch.device("cuda", local_rank)


def start(device_option: str, timeout: float) -> Ranks:
    """Joins the processes that torchrun started (gloo on the CPU, nccl on CUDA), if any.

    Args:
        device_option: auto, cpu or cuda.
        timeout: Seconds that a process waits for the others.

    Raises:
        ValueError: If the device is not there.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    device = pick_device(device_option, local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # torchrun sets all four; RANK alone is set by some schedulers and means nothing.
    if not {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        return Ranks(device=device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
    if dist.get_world_size() == 1:
        return Ranks(device=device)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    store = dist.distributed_c10d._get_default_store()
    watch = Watch(rank, world_size, store, timeout)
    return Ranks(rank, world_size, device, dist.group.WORLD, watch)


def stop(me: Ranks) -> None:
    """Leaves the group."""
    if me.watch is not None:
        me.watch.close()
        if me.watch.leaving.is_set():
            return  # to take leave of processes that are gone may take for ever
    if dist.is_initialized():
        dist.destroy_process_group()


class StopSignals:
    """Signals that ask the loop to save and stop; a SIGINT after one ends the process at once.

    Args:
        alone: Whether this process trains by itself. Only then can it stop between any two steps;
            several stop together, unless this one waits for data for longer than `PATIENCE`.

    Attributes:
        received: Number of the signal that came, 0 for none.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP, signal.SIGQUIT)
    PATIENCE = 10.0  # seconds

    def __init__(self, alone: bool = True) -> None:
        self.alone = alone
        self.received = 0
        self.leave: Callable[[int], Exception] | None = None  # while waiting
        self.previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        with contextlib.suppress(ValueError):  # only the main thread may set handlers
            for number in self.SIGNALS:
                if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                    continue  # nohup
                self.previous[number] = signal.signal(number, self._take)
            if not self.alone:
                self.previous[signal.SIGALRM] = signal.signal(signal.SIGALRM, self._wake)
        return self

    @contextlib.contextmanager
    def waiting(self, leave: Callable[[int], Exception]) -> Iterator[None]:
        """Around a wait for data, which a signal ends.

        Args:
            leave: Called with the signal, within its handler: what it returns is raised from the
                wait. To leave the wait may itself take for ever, so it has to save first.
        """
        self.leave = leave
        try:
            if self.received:
                self._leave()
            yield
        finally:
            self.leave = None
            if self.received and not self.alone:
                signal.setitimer(signal.ITIMER_REAL, 0)

    def _take(self, number: int, frame: FrameType | None) -> None:
        if not self.received:
            # The kernel's own handler: this one runs between two operations only.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            if number == signal.SIGINT and os.environ.get("LOCAL_RANK", "0") == "0":
                os.write(2, b"stopping after this step; Ctrl-C again stops without saving\n")
        self.received = number
        if self.leave is not None:
            self._leave()

    def _leave(self) -> None:
        if self.alone:
            self._wake(self.received, None)
        else:
            signal.setitimer(signal.ITIMER_REAL, self.PATIENCE)

    def _wake(self, number: int, frame: FrameType | None) -> None:
        leave, self.leave = self.leave, None
        if leave is not None:
            raise leave(self.received)

    def __exit__(self, error: object, *more: object) -> None:
        for number, handler in self.previous.items():
            # Whoever ends first makes torchrun send SIGTERM to the others, which end by themselves.
            ending = error is not None and not self.alone
            signal.signal(number, signal.SIG_IGN if ending else handler)
