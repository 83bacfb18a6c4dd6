"""Numbers in trouble: what is not finite is named and stops the run, or is left out; collapse."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from bagssl_fast.evaluation.quality import collapse
from bagssl_fast.exits import Failed
from bagssl_fast.terminal import say
from bagssl_fast.training.cuda_graph import Computed

if TYPE_CHECKING:
    from bagssl_fast.training.run import Run

MOST_IN_A_ROW = 10
HELP = (
    "a lower --optim.lr, a longer --optim.warmup_epochs, --optim.clip_grad 1 or --precision fp32 "
    "usually help"
)
# A projection is collapsed below this spread (1 is even, trainings have 0.5 and more), or in fewer
# directions than this; the second says something only of a batch that could have more.
SPREAD, DIRECTIONS, ENOUGH_IMAGES = 0.1, 2.5, 16
# Losses that pull each dimension to a standard deviation of 1 collapse by shrinking, too.
UNIT_LOSSES, SMALL = ("vicreg", "sigreg"), 0.05
HELP_OF_LOSS = {
    "vicreg": "a larger --loss.options.std_coeff or a smaller sim_coeff",
    "emp_ssl": "a smaller --loss.options.patch_sim",
    "spectral": "a larger --loss.options.w (10) with --head.options.normalize true",
    "barlow_twins": "a larger --loss.options.lambda_offdiag",
    "info_nce": "a lower --loss.options.temperature",
    "byol": "a --head.momentum nearer to 1",
    "sigreg": "a larger --loss.options.lambda_sigreg",
}


class Diverged(Failed):
    """Numbers of the training are no longer finite."""


class Guard:
    """Watches that loss, terms, gradients and weights stay finite.

    On a CPU a bad step is found before it changes a weight. Elsewhere looking at a number makes
    the host wait: there the device keeps count, `check` looks every few steps, and under
    `--on_nonfinite skip` the device itself restores a copy of what a bad step changed.
    """

    def __init__(self, run: Run) -> None:
        device = run.ranks.device
        self.run = run
        self.skip = run.config.on_nonfinite == "skip"
        self.on_host = device.type == "cpu"
        self.bad = torch.zeros((), dtype=torch.bool, device=device)  # this step
        self.first = torch.full((), -1, dtype=torch.int64, device=device)  # the first such step
        self.values = torch.zeros((), device=device)  # of that step
        self.names: list[str] = []
        self.left_out, self.in_a_row, self.most = (
            torch.zeros((), dtype=torch.int64, device=device) for _ in range(3)
        )
        self.copies: list[Tensor] = []
        self.kept_at = -1  # steps done when they were made
        self.rng, self.loss = torch.get_rng_state(), run.loss.state_dict()

    @torch.no_grad()
    def keep(self) -> None:
        """Copies what the step may spoil: before each step."""
        if self.on_host:
            self.rng, self.loss = torch.get_rng_state(), self.run.loss.state_dict()
        self.kept_at = self.run.step
        if self.on_host or self.skip:
            tensors = self._at_risk()
            if len(tensors) != len(self.copies):  # an optimizer makes its state at the first step
                self.copies = [torch.empty_like(t) for t in tensors]
            torch._foreach_copy_(self.copies, tensors)

    @torch.no_grad()
    def judge(self, patches: Tensor, computed: Computed, norm: Tensor) -> bool:
        """Whether a step may change the weights; always true where that is undone later.

        Args:
            patches: Of the step.
            computed: What it computed.
            norm: Of its gradient.

        Raises:
            Diverged: If it may not, under --on_nonfinite stop; the state is that before the step.
        """
        run = self.run
        named = {"loss": computed.loss, **computed.terms}
        if not run.scaler.is_enabled():  # which leaves out overflows and lowers its scale
            named["gradient"] = norm
        values = torch.stack([value.detach().float() for value in named.values()])
        self.bad = ~torch.isfinite(values).all()
        if self.on_host and run.ranks.group is not None:
            self.bad.fill_(run.ranks.maximum([float(self.bad)])[0] > 0)
        new = self.bad & (self.first < 0)
        self.names, self.values = list(named), torch.where(new, values, self.values)
        self.first.masked_fill_(new, run.step)
        self.left_out += self.bad
        self.in_a_row = (self.in_a_row + 1) * self.bad
        self.most = torch.maximum(self.most, self.in_a_row)
        if not self.on_host or not bool(self.bad):
            return True
        self.restore()
        what = self._culprits(patches)
        if not self.skip or int(self.most) >= MOST_IN_A_ROW:
            raise self._diverged(what)
        if run.ranks.is_main:
            say(f"warning  step {run.step + 1} is left out, not finite: {what}")
        self.first.fill_(-1)
        return False

    @torch.no_grad()
    def restore(self) -> None:
        """Takes back what the forward pass of an unfinished step has changed; on a CPU."""
        if self.on_host and self.kept_at == self.run.step:
            self.run.loss.load_state_dict(self.loss)
            torch._foreach_copy_(self._at_risk(), self.copies)
            torch.set_rng_state(self.rng)

    @torch.no_grad()
    def undo(self) -> None:
        """Takes back a bad step on a device, without looking at it from here."""
        if self.on_host or not self.skip:
            return
        tensors = self._at_risk()
        known = self.copies if len(self.copies) == len(tensors) else self._first_copies(tensors)
        for tensor, copy in zip(tensors, known, strict=True):
            tensor.copy_(torch.where(self.bad, copy, tensor))

    def check(self, patches: Tensor, weights: bool = False) -> None:
        """Stops the run if anything was not finite on any rank; waits for the device.

        Args:
            patches: Of the step at hand.
            weights: Look at the weights too, before they are saved.

        Raises:
            Diverged: Naming step and part.
        """
        run = self.run
        found = 0.0
        if not self.on_host:
            found = float(self.most >= MOST_IN_A_ROW if self.skip else self.first >= 0)
        overflows = run.scaler.is_enabled() and run.scaler.get_scale() < 1
        spoiled = weights and self.bad_weight() != ""
        if run.ranks.maximum([max(found, float(overflows), float(spoiled))])[0] == 0:
            return
        if found:
            raise self._diverged(self._culprits(patches))
        if overflows:
            raise Diverged(
                f"step {run.step}: the gradient overflows fp16 even at a loss scale of "
                f"{run.scaler.get_scale():.2g}: take --precision bf16 or fp32"
            )
        self.check_weights()
        raise Diverged(f"step {run.step}: not finite: a number of another process; {HELP}")

    def check_weights(self) -> None:
        """Stops this process if a weight or statistic is not finite.

        Raises:
            Diverged: Naming it.
        """
        name = self.bad_weight()
        if name:
            raise Diverged(
                f"step {self.run.step}: not finite: a weight after the update, {name}; {HELP}"
            )

    def record(self) -> dict[str, float]:
        """What belongs into a step's record."""
        extra = {"left_out": float(self.left_out)} if self.skip else {}
        if self.run.scaler.is_enabled():
            extra["loss_scale"] = self.run.scaler.get_scale()
        return extra

    def bad_weight(self) -> str:
        """The name of a weight or statistic that is not finite, "" if there is none."""
        state = {k: v for k, v in self.run.model.state_dict().items() if v.is_floating_point()}
        finite = torch.stack([v.isfinite().all() for v in state.values()]).tolist()
        return next((name for name, ok in zip(state, finite, strict=True) if not ok), "")

    def _at_risk(self) -> list[Tensor]:
        """What a step changes: in its forward, and where it is undone late, by its update."""
        run = self.run
        frozen = [p for p in run.model.parameters() if not p.requires_grad]
        tensors = [*run.model.buffers(), *frozen, *run.loss.buffers()]
        if not self.on_host:
            tensors += [p.detach() for p in run.model.parameters() if p.requires_grad]
            tensors += run.average.weights.values() if run.average else []
            for state in run.optimizer.state.values():
                tensors += [value for value in state.values() if isinstance(value, Tensor)]
        return tensors

    def _first_copies(self, tensors: list[Tensor]) -> list[Tensor]:
        """With the optimizer's state, which is last, as it is before a first step: zeros."""
        new = tensors[len(self.copies) :]
        return [*self.copies, *(torch.zeros_like(t) for t in new)]

    def _culprits(self, patches: Tensor) -> str:
        """What was not finite in the first such step, or in the pixels of the one at hand."""
        named = dict(zip(self.names, self.values.tolist(), strict=True))
        bad = {name: value for name, value in named.items() if not math.isfinite(value)}
        gradient = bad.pop("gradient", None)
        terms = [f"{name} = {value}" for name, value in bad.items() if name != "loss"]
        if not bool(patches.isfinite().all()):
            return ", ".join(["pixels of the batch", *terms])
        if terms:
            return ", ".join(terms)
        if bad:
            return f"loss = {bad['loss']}, the sum of the terms"
        where = ""
        for name, p in self.run.model.named_parameters() if self.on_host else ():
            if p.grad is not None and not bool(p.grad.isfinite().all()):
                where = f" of {name}"
                break
        return f"the gradient{where}, norm = {gradient}"

    def _diverged(self, what: str) -> Diverged:
        step = int(self.first) + 1
        if self.skip:
            return Diverged(
                f"{MOST_IN_A_ROW} steps in a row were left out, the last at step "
                f"{self.run.step + 1}; not finite at step {step}: {what}; {HELP}"
            )
        return Diverged(
            f"step {step}: not finite: {what}; {HELP}, and --on_nonfinite skip leaves out single "
            "steps"
        )


class CollapseWatch:
    """Tells once when the projections collapse: twice in a row, at most 100 steps after it began.

    Args:
        run: What is trained.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.every = min(run.config.log_every, 50)
        self.seen = 0
        self.size = -1.0  # of the projections when it first looked

    def is_due(self) -> bool:
        """Whether to look at the step just done."""
        return self.size < 0 or self.run.step % self.every == 0

    def look(self, patches: Tensor, z: Tensor, record: dict[str, float] | None) -> None:
        """Looks at one step that is due.

        Args:
            patches: [P, B, C, h, w].
            z: Projections [P, B, D].
            record: The step's record, if it has one.
        """
        loss = self.run.config.loss.name
        size = float(z[0].detach().float().std(0).mean())
        if self.size < 0:
            self.size = size
        if record is None:
            found = collapse(z[0].detach())
        else:
            found = {"std": record["std_z"], "rank": record["rank_z"]}
        few = z.shape[1] >= ENOUGH_IMAGES and found["rank"] < DIRECTIONS
        shrunk = loss in UNIT_LOSSES and size < min(SMALL, self.size / 2)
        self.seen = self.seen + 1 if found["std"] < SPREAD or few or shrunk else 0
        if self.seen != 2 or not self.run.ranks.is_main:
            return
        first = patches[0]
        if bool((first == first[:1]).all()):
            why = "the images of a batch all look the same (black ones, say): look at --data"
        else:
            why = (
                f"{HELP_OF_LOSS[loss]}, a lower --optim.lr, a larger --batch_size or batch norm in "
                "the head usually help"
            )
        say(
            f"warning  step {self.run.step}: the projections have collapsed, different images give "
            f"nearly the same (std {found['std']:.2g} of directions, {size:.2g} of numbers, rank "
            f"{found['rank']:.2g}): {why}"
        )


def gradient_norm(run: Run) -> Tensor:
    """The norm of the gradient, unscaled; the gradient is clipped to --optim.clip_grad."""
    run.scaler.unscale_(run.optimizer)
    if run.config.optim.clip_grad > 0:
        return nn.utils.clip_grad_norm_(run.model.parameters(), run.config.optim.clip_grad)
    return nn.utils.get_total_norm([p.grad for p in run.model.parameters() if p.grad is not None])
