"""The training loop. Under torchrun every process runs the same, on its own share of each batch."""

from __future__ import annotations

import contextlib
import itertools
import math
import signal
from collections.abc import Callable, Iterator
from functools import partial

from torch import Tensor

from bagssl_fast.data import Batch, ImageBatch
from bagssl_fast.data.feed import prefetch
from bagssl_fast.distributed.ranks import StopSignals
from bagssl_fast.distributed.watch import PeerLost
from bagssl_fast.exits import FAILED, Failed, Stopped, end_soon
from bagssl_fast.terminal import say
from bagssl_fast.training import checkpoint
from bagssl_fast.training.cuda_graph import Computed, GraphedStep
from bagssl_fast.training.guard import CollapseWatch, Diverged, Guard, gradient_norm
from bagssl_fast.training.meter import Meter
from bagssl_fast.training.optim import learning_rate
from bagssl_fast.training.reporter import Reporter
from bagssl_fast.training.run import Run, save
from bagssl_fast.training.step import objective


def train(run: Run) -> None:
    """Trains to the end.

    Raises:
        Stopped: When a signal asked for it; the state is on disk.
        Diverged: When numbers are not finite; the last good state is on disk.
        ImageError: For a broken image, under on_error="raise"; the state is on disk.
        Failed: If the last checkpoint cannot be written; the one before it is on disk. Or if
            another process left; the state is on disk.
    """
    guard = Guard(run)
    reporter = Reporter(
        run.run_dir if run.ranks.is_main else None,
        run.total_steps,
        run.step,
        run.config.tensorboard,
    )
    run.forward.train()
    with StopSignals(alone=run.ranks.group is None) as stop, contextlib.closing(reporter):
        try:
            with run.ranks.together():
                steps(run, guard, reporter, stop)
                run.ranks.wait()  # for the first one to have saved
        except Diverged as error:
            message = f"{error}; last good state: {save_if_good(run, guard)}"
            run.ranks.wait()
            if not run.ranks.is_main:  # all processes stop for this, and the first one says so
                raise SystemExit(FAILED) from None
            raise Diverged(message) from None
        except PeerLost:
            if not run.ranks.is_main:
                raise
            guard.restore()
            raise PeerLost(
                f"the training ends at step {run.step} of {run.total_steps}; last good "
                f"state: {save_if_good(run, guard)}; to resume, with any number of processes, give "
                f"--run_dir {run.run_dir} --resume auto with the same options"
            ) from None


def steps(run: Run, guard: Guard, reporter: Reporter, stop: StopSignals) -> None:
    """The remaining steps; as `train`, with nothing saved yet when a step was not finite."""
    config = run.config
    # Looking at a number makes a GPU wait: there the loss is looked at every few steps only.
    check_every = 1 if guard.on_host else min(config.log_every, 20)
    save_every = math.ceil(config.checkpoint_every * run.steps_per_epoch)
    meter, watch = Meter(run), CollapseWatch(run)
    compute: Callable[[Tensor], Computed] = partial(step, run)
    if config.cuda_graph:
        compute = GraphedStep(compute)
    feed = bags(run)
    while run.step < run.total_steps:
        try:
            with stop.waiting(partial(leave, run, guard)):
                patches = next(feed)
        except (ValueError, OSError):
            save_if_good(run, guard)
            raise
        guard.keep()
        computed = compute(patches)
        norm = gradient_norm(run)
        meter.add(computed.h)
        good = guard.judge(patches, computed, norm)
        meter.count(computed.loss, computed.terms, guard.bad)
        if good:
            update(run)
            guard.undo()
        run.step += 1

        last = run.step == run.total_steps
        record = None
        if run.step % config.log_every == 0 or last:
            record = meter.record(computed.h, computed.z) | guard.record()
            reporter.report(run.step, record)
        if watch.is_due():
            watch.look(patches, computed.z, record)
        reporter.advance()
        due = last or (save_every > 0 and run.step % save_every == 0)
        asked = 0
        if run.step % check_every == 0:
            asked = int(run.ranks.maximum([stop.received])[0])
        if due or asked or run.step % check_every == 0:
            guard.check(patches, weights=bool(due or asked))
        if asked and not last:
            end = stopped(run, asked)
            run.ranks.wait()  # whoever ends first makes torchrun end the others
            raise end
        if due:
            save_or_say(run, last, save_every)


def update(run: Run) -> None:
    """Changes the weights by the gradients."""
    config = run.config
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate(
            config.optim, run.step, run.total_steps, run.steps_per_epoch, config.batch_size
        )
    run.scaler.step(run.optimizer)
    run.scaler.update()
    if run.average is not None:
        run.average.update(run.model)


def save_or_say(run: Run, last: bool, save_every: int) -> None:
    """Saves; what keeps a checkpoint from being written does not stop a run that can try again.

    Raises:
        Failed: If it was the last one.
    """
    try:
        save(run)
    except OSError as error:
        kept = f"last good checkpoint: {checkpoint.latest(run.run_dir) or 'none'}"
        if last:
            raise Failed(
                f"the last checkpoint cannot be written: {error}; {kept}; make room for it or make "
                "the directory writable, then resume with --resume auto"
            ) from error
        say(
            f"warning  the checkpoint of step {run.step} cannot be written: {error}; {kept}; the "
            f"training continues and tries again at step "
            f"{min(run.step + save_every, run.total_steps)}"
        )


def save_if_good(run: Run, guard: Guard) -> str:
    """Saves after an error if all weights are finite; returns what the newest checkpoint is."""
    newest = checkpoint.latest(run.run_dir)
    # On a device, steps that are not finite are found when they have changed the weights.
    good = guard.on_host or int(guard.first) < 0
    if run.step > 0 and good and not guard.bad_weight():
        try:
            save(run)
            newest = checkpoint.latest(run.run_dir)
        except OSError as error:
            say(f"warning  the state of step {run.step} cannot be saved: {error}")
    return str(newest or "none was saved yet")


def leave(run: Run, guard: Guard, number: int) -> Stopped:
    """Saves for a signal that came while the training waited for data, which may never come."""
    guard.check_weights()
    stop = stopped(run, number)
    run.ending = end_soon(stop)
    return stop


def stopped(run: Run, number: int) -> Stopped:
    """Saves for a signal, and says how to resume.

    Raises:
        Failed: If the state cannot be saved.
    """
    name = signal.Signals(number).name
    try:
        save(run)
    except OSError as error:
        raise Failed(
            f"stopped by {name} at step {run.step}, which cannot be saved: {error}; last good "
            f"checkpoint: {checkpoint.latest(run.run_dir) or 'none'}"
        ) from error
    return Stopped(
        number,
        f"stopped by {name}: {run.run_dir}, step {run.step} of {run.total_steps}; to resume, give "
        f"--run_dir {run.run_dir} --resume auto with the same options",
    )


def step(run: Run, patches: Tensor) -> Computed:
    """One step up to the optimizer: forward, loss, backward."""
    loss, terms, h, z = objective(run.forward, run.loss, patches, run.precision)
    run.optimizer.zero_grad(set_to_none=True)
    run.scaler.scale(loss).backward()
    return Computed(loss.detach(), terms, h, z)


def bags(run: Run) -> Iterator[Tensor]:
    """The patches of each remaining step [P, B, C, h, w], on the device."""
    device = run.ranks.device
    if device.type == "cuda":
        yield from prefetch(batches(run), device)
    else:
        for batch in batches(run):
            yield batch.patches


def batches(run: Run) -> Iterator[Batch | ImageBatch]:
    """The batches of the remaining steps, epoch after epoch."""
    first, offset = divmod(run.step, run.steps_per_epoch)
    left = run.total_steps - run.step
    for epoch in itertools.count(first):
        if left == 0:
            return
        run.loader.seek(epoch, offset if epoch == first else 0)
        for batch in itertools.islice(run.loader, left):
            left -= 1
            yield batch
