"""Train a bag-of-patches model: `python -m bagssl_fast.train [--config RECIPE] [--data PATH] ...`.

The loop is `train`; what it works on is a `Run`, made by `run.prepare`. Under torchrun every
process runs the same, on its own share of each batch.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

if __name__ == "__main__" and "torch" not in sys.modules:
    # Read once, when torch loads its OpenMP: threads that wait for work must not spin, since the
    # loader's threads want the cores meanwhile.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from torch import Tensor, nn

from bagssl_fast import checkpoint, cli, ranks
from bagssl_fast.cuda_graph import Computed, GraphedStep
from bagssl_fast.data import Batch, ImageBatch
from bagssl_fast.data.feed import ahead
from bagssl_fast.metrics import Reporter, collapse, memory_mb, say
from bagssl_fast.optim import learning_rate
from bagssl_fast.ranks import StopSignals
from bagssl_fast.run import Run, prepare, save


class Diverged(RuntimeError):
    """The loss is no longer a finite number."""


def train(run: Run) -> bool:
    """Trains to the end, or until a signal asks to stop.

    Returns:
        Whether the end was reached.

    Raises:
        Diverged: When the loss is not finite; the last good state is on disk.
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
            asked = run.step % check_every == 0 and run.ranks.maximum([stop.received])[0] > 0
            if due or asked:
                meter.raise_if_broken(terms, weights=True)
                save(run)
            if last or asked:
                return last
    return True


def step(run: Run, patches: Tensor) -> Computed:
    """One step up to the optimizer: forward, loss, backward."""
    with torch.autocast(patches.device.type, run.precision, run.precision != torch.float32):
        h, z = run.forward(patches)
    loss, terms = run.loss(z.float())
    run.optimizer.zero_grad(set_to_none=True)
    run.scaler.scale(loss).backward()
    return Computed(loss.detach(), terms, h, z)


def bags(run: Run) -> Iterator[Tensor]:
    """The patches of each remaining step [P, B, C, h, w], on the device."""
    device = run.ranks.device
    if device.type == "cuda":
        yield from ahead(batches(run), device)
    else:
        for batch in batches(run):
            yield batch.patches


def batches(run: Run) -> Iterator[Batch | ImageBatch]:
    """The batches of the remaining steps, epoch after epoch."""
    first, offset = divmod(run.step, run.steps_per_epoch)
    left = run.total_steps - run.step
    for epoch in range(first, run.config.epochs):
        run.seek(epoch, offset if epoch == first else 0)
        for batch in run.loader:
            if left == 0:
                return
            left -= 1
            yield batch


class Meter:
    """Counts what passed between two reports, and watches the loss."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.finite = torch.ones((), dtype=torch.bool, device=run.ranks.device)
        self._restart()

    def _restart(self) -> None:
        self.sums: dict[str, Tensor] = {}  # the loss and its terms, over the steps
        self.steps = self.images = self.patches = 0
        self.time, self.wait = time.monotonic(), self.run.loader.data_wait

    def add(self, loss: Tensor, terms: dict[str, Tensor], h: Tensor) -> None:
        """Takes in one step, before its update."""
        self.finite &= torch.isfinite(loss.detach())
        named = {"loss": loss.detach()} | {f"term/{name}": value for name, value in terms.items()}
        for name, value in named.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value
        self.steps += 1
        self.images += h.shape[1]
        self.patches += h.shape[0] * h.shape[1]

    def record(self, h: Tensor, z: Tensor) -> dict[str, float]:
        """The numbers since the last call: means over the ranks, sums for the rates."""
        run = self.run
        seconds = max(time.monotonic() - self.time, 1e-9)
        waited = (run.loader.data_wait - self.wait) / seconds
        of_h, of_z = collapse(h[0].detach()), collapse(z[0].detach())
        means = {
            **{name: float(value) / self.steps for name, value in self.sums.items()},
            "data_wait": waited,
            **{f"{key}_h": value for key, value in of_h.items()},
            **{f"{key}_z": value for key, value in of_z.items()},
        }
        sums = [self.images / seconds, self.patches / seconds]
        means = dict(zip(means, run.ranks.mean(list(means.values())), strict=True))
        images_per_s, patches_per_s = run.ranks.total(sums)
        self._restart()
        return means | {
            "lr": run.optimizer.param_groups[0]["lr"],
            "epoch": run.step / run.steps_per_epoch,
            "images_per_s": images_per_s,
            "patches_per_s": patches_per_s,
            "memory_mb": run.ranks.maximum([memory_mb(run.ranks.device)])[0],
        }

    def raise_if_broken(self, terms: dict[str, Tensor], weights: bool = False) -> None:
        """Stops the run if a loss was not finite on any rank; checkpoints stay as they are.

        Args:
            terms: Of the step at hand, to name the culprit.
            weights: Look at the weights too, before they are saved.
        """
        run = self.run
        finite = bool(self.finite)
        if weights:
            tensors = [v for v in run.model.state_dict().values() if v.is_floating_point()]
            finite &= bool(torch.stack([v.isfinite().all() for v in tensors]).all())
        if run.ranks.maximum([float(not finite)])[0] == 0:
            return
        bad = [f"{k} = {float(v)}" for k, v in terms.items() if not math.isfinite(float(v))]
        if not bad:
            bad = ["the sum of the terms" if not self.finite else "a weight after the update"]
        kept = checkpoint.latest(run.run_dir)
        raise Diverged(
            f"near step {run.step + 1}: the loss is not finite ({', '.join(bad)}); last good "
            f"state: {kept or 'none was saved yet'}. A lower --optim.lr, a longer "
            "--optim.warmup_epochs, --optim.clip_grad 1 or --precision fp32 usually help"
        )


def evaluate_run(run_dir: Path) -> int:
    """Evaluates a finished run; what is wrong with the data for it takes nothing from the run."""
    from bagssl_fast.evaluate import evaluate

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
