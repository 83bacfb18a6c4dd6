"""What a run reports: metrics.jsonl, the progress line, TensorBoard."""

from __future__ import annotations

import errno
import json
import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from bagssl_fast.files import write_atomic
from bagssl_fast.terminal import say


class Writer(Protocol):
    """The part of TensorBoard's SummaryWriter that is used."""

    def add_scalar(self, tag: str, value: float, step: int) -> None: ...

    def close(self) -> None: ...


class Reporter:
    """Writes each record to metrics.jsonl and shows it: a bar on a terminal, lines in a pipe.

    Args:
        run_dir: Where metrics.jsonl goes; None (every rank but the first) reports nothing.
        total_steps: Steps of the whole run.
        step: Steps done before, when resuming; later records of the old file are dropped.
        tensorboard: Write events too.
    """

    def __init__(
        self, run_dir: Path | None, total_steps: int, step: int = 0, tensorboard: bool = False
    ) -> None:
        self.total_steps = total_steps
        self.started = time.monotonic()
        self.first_step = step
        self.path: Path | None = None
        self.unwritten = b""  # lines that could not be written yet
        self.bar: Any = None
        self.writer: Writer | None = None
        if run_dir is None:
            return
        self.path = run_dir / "metrics.jsonl"
        _keep_until(self.path, step)
        if tensorboard:
            try:
                self.writer = _tensorboard(run_dir)
            except OSError as error:
                self._without_tensorboard(error)
        # A terminal that does not know its width (a pseudo one, say) gets lines too.
        if sys.stderr.isatty() and os.get_terminal_size(sys.stderr.fileno()).columns > 0:
            from tqdm import tqdm

            self.bar = tqdm(total=total_steps, initial=step, unit="step", dynamic_ncols=True)

    def advance(self) -> None:
        """Moves the bar by one step."""
        if self.bar is not None:
            self.bar.update(1)

    def report(self, step: int, record: Mapping[str, float]) -> None:
        """Takes one record: named numbers at a step (1 = after the first)."""
        if self.path is None:
            return
        line = json.dumps({"step": step, **{k: _short(v) for k, v in record.items()}})
        self._write(self.path, line.encode() + b"\n")
        try:
            if self.writer is not None:
                for name, value in record.items():
                    self.writer.add_scalar(name, value, step)
        except OSError as error:  # of a file that its own thread writes
            self._without_tensorboard(error)
        if self.bar is not None:
            self.bar.set_postfix_str(self.line(record), refresh=True)
        else:
            say(f"step {step}/{self.total_steps}  {self.line(record)}  eta {self.eta(step)}")

    def _write(self, path: Path, line: bytes) -> None:
        """Appends a line whole or keeps it for the next time: a full disk does not stop a run."""
        before, self.unwritten = self.unwritten, self.unwritten + line
        try:
            with open(path, "ab", buffering=0) as file:
                size = file.tell()
                try:
                    if file.write(self.unwritten) < len(self.unwritten):
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
                except OSError:
                    file.truncate(size)
                    raise
            self.unwritten = b""
        except OSError as error:
            if not before:
                say(f"warning  {path} cannot be written, its lines are kept for later: {error}")

    def _without_tensorboard(self, error: OSError) -> None:
        """Goes on without events: their writer ends with its first error."""
        self.writer = None
        say(
            f"warning  TensorBoard's events cannot be written and end here, {self.path} goes on: "
            f"{error}"
        )

    def eta(self, step: int) -> str:
        """Time to the end of the run at the pace so far."""
        pace = (time.monotonic() - self.started) / max(step - self.first_step, 1)
        seconds = round(pace * (self.total_steps - step))
        return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"

    @staticmethod
    def line(record: Mapping[str, float]) -> str:
        """The progress line of one record."""
        shown = [f"loss {record['loss']:.4g}"]
        shown += [f"{k[5:]} {v:.4g}" for k, v in record.items() if k.startswith("term/")]
        shown += [
            f"lr {record['lr']:.3g}",
            f"{record['images_per_s']:.0f} img/s",
            f"{record['patches_per_s']:.0f} patches/s",
            f"wait {record['data_wait']:.0%}",
            f"std {record['std_h']:.2f}/{record['std_z']:.2f}",
            f"rank {record['rank_h']:.0f}/{record['rank_z']:.0f}",
            f"mem {record['memory_mb']:.0f}M",
        ]
        return "  ".join(shown)

    def close(self) -> None:
        """Flushes and closes everything."""
        if self.bar is not None:
            self.bar.close()
        try:
            if self.writer is not None:
                self.writer.close()
        except OSError as error:
            self._without_tensorboard(error)
        self.bar = self.writer = None


def _short(value: float) -> float | None:
    return float(f"{value:.6g}") if math.isfinite(value) else None  # JSON has no nan


def _keep_until(path: Path, step: int) -> None:
    """Drops the records after `step`: the resumed run writes them again."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue  # the last line of a killed run may be torn
    write_atomic(path, b"".join(kept))


def _tensorboard(run_dir: Path) -> Writer:
    from torch.utils.tensorboard import SummaryWriter

    writer: Writer = SummaryWriter(str(run_dir / "tensorboard"))
    return writer
