"""A run: all that the training loop works on, made from a configuration, saved and restored."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from threading import Timer
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from bagssl_fast import cli, machine, ops
from bagssl_fast.config import Config, check, number_of_slots
from bagssl_fast.data import (
    BagLoader,
    Decoding,
    Order,
    Output,
    Share,
    Source,
    Threads,
    open_source,
)
from bagssl_fast.distributed.ranks import Ranks
from bagssl_fast.distributed.sync_bn import normalizes_by_batch, share_batch_norm
from bagssl_fast.files import write_atomic
from bagssl_fast.losses import build_loss
from bagssl_fast.models import saved
from bagssl_fast.models.bag_model import BagModel, build_model
from bagssl_fast.terminal import say
from bagssl_fast.training import checkpoint
from bagssl_fast.training.choices import (
    Choices,
    choose,
    compiled_or_eager,
    time_precisions,
)
from bagssl_fast.training.directory import RunDirectory, claim_run_dir, make_fresh
from bagssl_fast.training.optim import WeightAverage, build_optimizer, learning_rate
from bagssl_fast.training.step import PRECISIONS, tune_device


@dataclass
class Run:
    """What the loop works on; `step` counts the steps done."""

    config: Config
    ranks: Ranks
    run_dir: Path
    source: Source
    loader: BagLoader
    model: BagModel
    forward: nn.Module  # the model, compiled and distributed as asked
    loss: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    average: WeightAverage | None  # with --ema
    choices: Choices
    total_steps: int
    step: int = 0
    directory: RunDirectory | None = None  # of the main process
    ending: Timer | None = None  # ends the process if `close` cannot

    @property
    def precision(self) -> torch.dtype:
        return PRECISIONS[self.choices.precision]

    @property
    def steps_per_epoch(self) -> int:
        return len(self.loader)

    def close(self) -> None:
        """Ends the loader's threads and lets other processes train in the run directory."""
        self.loader.close()
        if self.ending is not None:
            self.ending.cancel()
        if self.directory is not None:
            self.directory.close()


def prepare(config: Config, me: Ranks) -> Run:
    """Checks a configuration and makes all that its run needs, cheap and likely mistakes first.

    Raises:
        ValueError, OSError: For what the user can fix; nothing has been written by then.
    """
    check(config)
    threads = config.threads or max(
        1, machine.cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    )
    torch.set_num_threads(threads)
    tune_device(me.device)
    ops.set_impl(None if config.impl == "auto" else config.impl)
    if config.batch_size % me.world_size:
        raise ValueError(
            f"--batch_size {config.batch_size} is over all {me.world_size} processes and cannot be "
            f"shared equally; take a multiple of {me.world_size}"
        )
    run_dir = choose_run_dir(config, me)
    if config.run_dir is not None or config.resume != "never":
        config = replace(config, run_dir=str(run_dir))
    newest = checkpoint.find(config.resume, run_dir)
    older = config.resume == "auto" or Path(config.resume).is_dir()
    found = checkpoint.load_newest(newest, older) if newest else None

    model = build_model(config).to(me.device)
    if config.channels_last:
        model = model.to(memory_format=torch.channels_last)
    if config.sync_bn and me.group is not None:
        share_batch_norm(model, me.group)
    loss = build_loss(config.loss.name, group=me.group, **config.loss.options).to(me.device)
    optimizer = build_optimizer(model, config.optim)
    if config.cuda_graph and (me.device.type != "cuda" or me.group or loss.state_dict()):
        raise ValueError(
            f"--cuda_graph true on {me.device} x {me.world_size} with the loss {config.loss.name}: "
            "it takes one GPU and a loss without a state; leave it out (--compile true also saves "
            "launches)"
        )

    source = open_source(config.data, labels=config.labels, on_error=config.loader.on_error)
    if config.eval.enabled and config.test_data is not None:  # to fail now, not then
        open_source(config.test_data, labels=config.labels, on_error=config.loader.on_error)
    images = min(config.max_images or len(source), len(source))
    if images < config.batch_size:
        raise ValueError(
            f"--batch_size {config.batch_size} is larger than the data set, {images} images "
            f"in {config.data}: take at most {images}, or more images"
        )
    total_steps = config.max_steps or config.epochs * (images // config.batch_size)
    choices = choose(
        config,
        me,
        found.state.get("choices") if found else None,
        total_steps,
        lambda: time_precisions(model, loss, example(config, me, torch.float32)),
    )
    loader = make_loader(config, source, me, choices, threads)

    run = Run(
        config=config,
        ranks=me,
        run_dir=run_dir,
        source=source,
        loader=loader,
        model=model,
        forward=distribute(model, me),
        loss=loss,
        optimizer=optimizer,
        scaler=torch.amp.GradScaler(me.device.type, enabled=choices.precision == "fp16"),
        average=WeightAverage(model, config.ema) if config.ema else None,
        choices=choices,
        total_steps=total_steps,
    )
    extended = restore(run, found.state) if found else ""
    check_ranks(run, found)
    if choices.compile:  # now that nothing else can refuse the run
        patches = example(config, me, getattr(torch, choices.dtype))
        run.forward, done = compiled_or_eager(run.forward, loss, patches, config, choices, me)
        run.choices = replace(choices, compile=done)
    if me.is_main:
        open_directory(run, newest if older else None)
        log_summary(run, found)
        if extended:
            say(extended)
    if config.run_dir is None:
        run.run_dir = Path(me.from_main(str(run.run_dir)))
    return run


def open_directory(run: Run, newest: Path | None) -> None:
    """Claims the run directory and writes what it starts with.

    Args:
        run: It gets the directory.
        newest: The newest checkpoint when the run looked for one, None if it did not look.

    Raises:
        ValueError: If another process trains there, or has trained since the run looked.
    """
    config = run.config
    if config.run_dir is None:
        run.run_dir = make_fresh(run.run_dir)
        config = run.config = replace(config, run_dir=str(run.run_dir))
    run.directory = claim_run_dir(run.run_dir, config.resume, config.overwrite)
    try:
        if newest is not None and checkpoint.latest(run.run_dir) != newest:
            raise ValueError(
                f"--run_dir {run.run_dir}: another process has trained there just now; start again "
                "to resume from its last checkpoint"
            )
        report = machine.report() | {"choices": run.choices.state()}
        environment = json.dumps(report, indent=2) + "\n"
        run.directory.write(
            {"config.yaml": cli.to_yaml(config).encode(), "env.json": environment.encode()}
        )
        # A process may have died between its checkpoint and its export.
        if run.step > 0 and saved.exported_step(run.run_dir) < run.step:
            export(run)
    except BaseException:
        run.directory.close()
        raise


def check_ranks(run: Run, found: checkpoint.Found | None) -> None:
    """Refuses to train from different checkpoints in different processes.

    Raises:
        ValueError: On every rank.
    """
    mine = f"{found.path} (step {run.step}, sha256 {found.digest[:16]})" if found else "none"
    main = run.ranks.from_main(mine)
    other = mine.partition(" ")[2] != main.partition(" ")[2]
    if run.ranks.maximum([float(other)])[0]:
        raise ValueError(
            f"the processes found different checkpoints: rank 0 {main}, rank {run.ranks.rank} "
            f"{mine}; all nodes must see the same run directory, so put --run_dir on a file "
            "system that they share, or copy its checkpoints to each of them"
        )


def choose_run_dir(config: Config, me: Ranks) -> Path:
    """The run directory: as named, that of the checkpoint to resume, or a name under runs/."""
    if config.run_dir is not None:
        return Path(config.run_dir)
    if config.resume == "auto":
        raise ValueError(
            "--resume auto looks in the run directory: name it with --run_dir, or give "
            "--resume the run directory itself"
        )
    if config.resume != "never":
        path = Path(config.resume)
        return path if path.is_dir() else path.parent.parent
    name = f"runs/{config.name or config.encoder.name}-{datetime.now():%Y%m%d-%H%M%S}"
    return Path(me.from_main(name))


def make_loader(
    config: Config, source: Source, me: Ranks, choices: Choices, threads: int
) -> BagLoader:
    """The loader of this rank's share of every batch."""
    odd = config.augment_odd
    indices = None
    if 0 < config.max_images < len(source):
        generator = torch.Generator().manual_seed(config.seed)
        indices = torch.randperm(len(source), generator=generator)[: config.max_images].numpy()
    augments = (config.augment,) if odd is None else (config.augment, odd)
    return BagLoader(
        source,
        batch_size=config.batch_size // me.world_size,
        patches=config.bag.patches,
        augment=augments,
        order=Order(seed=config.seed, indices=indices),
        share=Share(me.rank, me.world_size),
        output=Output(choices.dtype, choices.views, pin_memory=me.device.type == "cuda"),
        decoding=Decoding(config.loader.on_error),
        threads=Threads(config.loader.num_threads or threads, config.loader.batches_ahead),
    )


def distribute(model: BagModel, me: Ranks) -> nn.Module:
    """The model whose gradients are averaged over the ranks, if there are several."""
    if me.group is None:
        return model
    # Batch norms that do not share their statistics take rank 0's every step, DDP's default.
    devices = [me.device.index] if me.device.type == "cuda" else None
    return DistributedDataParallel(model, devices, process_group=me.group)


def example(config: Config, me: Ranks, dtype: torch.dtype) -> Tensor:
    """Random patches of the shape and memory of a rank's batches, for trials of a step.

    The global generators stay as they are: a run resumes with their state.
    """
    size, batch = config.augment.size, config.batch_size // me.world_size
    generator = torch.Generator(me.device).manual_seed(0)
    shape = (config.bag.patches, batch, size, size, 3)
    pixels = torch.rand(shape, device=me.device, generator=generator)
    return pixels.to(dtype).permute(0, 1, 4, 2, 3)


def log_summary(run: Run, found: checkpoint.Found | None) -> None:
    """The first lines of a run: what is trained on what, how, and where it goes."""
    config, device = run.config, run.ranks.device
    weights = sum(p.numel() for p in run.model.parameters())
    classes = f", {len(run.source.classes)} classes" if run.source.classes else ""
    for path, aside in checkpoint.set_aside(found.damaged).items() if found else ():
        say(f"warning  {path} is damaged, so an older checkpoint is used; it is kept as {aside}")
    say(f"run      {run.run_dir}" + (f", resumed from {found.path}" if found else ""))
    used = f"{config.max_images} of " if 0 < config.max_images < len(run.source) else ""
    say(f"data     {config.data}: {used}{len(run.source)} images{classes}")
    say(
        f"model    {config.encoder.name} + {config.head.name}, {weights / 1e6:.2f} M weights; "
        f"loss {config.loss.name} over {number_of_slots(config)} slots"
    )
    say(f"device   {device} x {run.ranks.world_size}, {torch.get_num_threads()} threads")
    say(f"chosen   {run.choices}")
    if run.ranks.group is not None and not config.sync_bn and normalizes_by_batch(run.model):
        say(
            f"norms    each of the {run.ranks.world_size} processes normalizes its own "
            f"{config.batch_size // run.ranks.world_size} images of a batch, so the result depends "
            "on their number; --sync_bn true shares the statistics"
        )
    epochs = f"{run.total_steps / run.steps_per_epoch:.4g} epochs of {run.steps_per_epoch}"
    by = f" by --max_steps, not {config.epochs} by --epochs" if config.max_steps else ""
    say(f"steps    {run.step} of {run.total_steps} done: {epochs}{by}")
    if config.batch_size < 16:
        say(
            f"note     --batch_size {config.batch_size}: the losses compare the images of a batch, "
            "and batch norm takes its statistics from it; 100 and more is usual"
        )
    say(ops.table())


def identity(run: Run) -> dict[str, Any]:
    """All that decides the trained weights, to compare on resuming."""
    return cli.identity(run.config) | {
        "data.fingerprint": str(run.source.fingerprint),
        "precision": run.choices.precision,
        "loader.dtype": run.choices.dtype,
    }


def save(run: Run) -> None:
    """Writes a checkpoint, the exported model and the list of skipped images.

    Raises:
        OSError: If that cannot be done; earlier checkpoints are still there.
    """
    if run.directory is not None:
        run.directory.ensure()
    if run.loader.skipped:
        name = "skipped.txt" if run.ranks.is_main else f"skipped-{run.ranks.rank}.txt"
        lines = "".join(f"{image}\t{reason}\n" for image, reason in run.loader.skipped)
        write_atomic(run.run_dir / name, lines.encode())
    if not run.ranks.is_main:
        return
    state = {
        "identity": identity(run),
        "choices": run.choices.state(),
        "step": run.step,
        "model": run.model.state_dict(),
        "loss": run.loss.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "scaler": run.scaler.state_dict(),
        "average": run.average.weights if run.average else {},
        "rng": torch.get_rng_state(),
        "rng_cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }
    checkpoint.save(run.run_dir, run.step, state, run.config.keep_checkpoints)
    export(run)


def export(run: Run) -> None:
    """Writes the model as it is used and evaluated."""
    weights = run.average.weights if run.average else run.model.state_dict()
    saved.export(run.run_dir, weights, saved.describe(run.config, run.model, run.step))


def restore(run: Run, state: dict[str, Any]) -> str:
    """Puts a run where a checkpoint left it.

    Returns:
        What follows from a longer plan than the checkpoint's, "" for the same plan.

    Raises:
        ValueError: If the configuration is another one.
    """
    run.step = state["step"]
    extended = extension(run, state["identity"])
    run.model.load_state_dict(state["model"])
    run.loss.load_state_dict(state["loss"])
    run.optimizer.load_state_dict(state["optimizer"])
    run.scaler.load_state_dict(state["scaler"])
    if run.average is not None:
        run.average.load(state["average"])
    if run.ranks.is_main:
        torch.set_rng_state(state["rng"])
        for i, rng in enumerate(state["rng_cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(rng, i)
    else:
        torch.manual_seed(run.config.seed + 7919 * run.ranks.rank + run.step)
    return extended


def extension(run: Run, before: dict[str, Any]) -> str:
    """What a longer plan than that of a checkpoint means, "" for the same plan.

    Raises:
        ValueError: If anything else than the length of the run has changed, or it got shorter.
    """
    now = identity(run)
    planned = before["max_steps"] or before["epochs"] * run.steps_per_epoch
    longer = checkpoint.changes(before, now).keys() <= {"epochs", "max_steps"}
    if not longer or planned > run.total_steps:
        checkpoint.compare(before, now)
    if planned >= run.total_steps:
        return ""
    old, new = (
        learning_rate(run.config.optim, run.step, n, run.steps_per_epoch, run.config.batch_size)
        for n in (planned, run.total_steps)
    )
    return (
        f"extended from {planned} to {run.total_steps} steps: the {run.config.optim.schedule} "
        f"schedule now runs over all of them, so the learning rate at step {run.step} changes from "
        f"{old:.3g} to {new:.3g}; the result is not that of a run planned this long from the start"
    )
