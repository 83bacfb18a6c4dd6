"""The training loop. Under torchrun every process runs the same, on its own share of each batch."""

from __future__ import annotations

import contextlib
import itertools
import math
import signal
from collections.abc import Callable, Iterator
from functools import partial

from torch import Tensor, nn

from bagssl_fast.data import Batch, ImageBatch
from bagssl_fast.data.feed import prefetch
from bagssl_fast.distributed.ranks import StopSignals
from bagssl_fast.exits import Stopped
from bagssl_fast.training.cuda_graph import Computed, GraphedStep
from bagssl_fast.training.meter import Meter
from bagssl_fast.training.optim import learning_rate
from bagssl_fast.training.reporter import Reporter
from bagssl_fast.training.run import Run, save
from bagssl_fast.training.step import objective


def train(run: Run) -> None:
    """Trains to the end.

    Raises:
        Stopped: When a signal asked for it; the state is on disk.
        Diverged: When the loss is not finite; the last good state is on disk.
        ImageError: For a broken image, under on_error="raise".
    """
    config, device, optimizer = run.config, run.ranks.device, run.optimizer
    # Looking at a number makes a GPU wait: there the loss is looked at every few steps only.
    check_every = 1 if device.type == "cpu" else min(config.log_every, 20)
    save_every = math.ceil(config.checkpoint_every * run.steps_per_epoch)
    reporter = Reporter(
        run.run_dir if run.ranks.is_main else None, run.total_steps, run.step, config.tensorboard
    )
    meter = Meter(run)
    compute: Callable[[Tensor], Computed] = partial(step, run)
    if config.cuda_graph:
        compute = GraphedStep(compute)
    run.forward.train()
    with StopSignals() as stop, contextlib.closing(reporter):
        for patches in bags(run):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(
                    config.optim, run.step, run.total_steps, run.steps_per_epoch, config.batch_size
                )
            loss, terms, h, z = compute(patches)
            meter.add(loss, terms, h)
            if run.step % check_every == 0:
                meter.raise_if_broken(terms)

            if config.optim.clip_grad > 0:
                run.scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(run.model.parameters(), config.optim.clip_grad)
            run.scaler.step(optimizer)
            run.scaler.update()
            if run.average is not None:
                run.average.update(run.model)
            run.step += 1

            last = run.step == run.total_steps
            if run.step % config.log_every == 0 or last:
                reporter.report(run.step, meter.record(h, z))
            reporter.advance()
            due = last or (save_every > 0 and run.step % save_every == 0)
            asked = 0
            if run.step % check_every == 0:
                asked = int(run.ranks.maximum([stop.received])[0])
            if due or asked:
                meter.raise_if_broken(terms, weights=True)
                save(run)
            if last:
                return
            if asked:
                raise Stopped(
                    asked,
                    f"stopped by {signal.Signals(asked).name}: {run.run_dir}, step {run.step} of "
                    f"{run.total_steps}; --resume auto resumes it",
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
