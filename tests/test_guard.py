"""Numbers in trouble: named, stopped or left out; collapse is told; odd batches train."""

import numpy as np
import pytest
import torch
from runs import DENSE, PATCHES, assert_bitwise_equal, final, interrupt_after, records

from bagssl_fast.training import guard, loop
from bagssl_fast.training import run as run_module

SKIP = ("--on_nonfinite", "skip")
SIGREG = {"name": "sigreg", "options": {"num_directions": 5}}


@pytest.fixture
def spoil(monkeypatch):
    """spoil(steps): the covariance of these steps (1 is the first) is not a number."""

    def spoil(steps, what="covariance"):
        prepare = run_module.prepare

        def prepare_spoiled(*args):
            run = prepare(*args)
            loss = run.loss.forward

            def forward(z):
                value, terms = loss(z)
                if run.step + 1 in steps:
                    terms[what] = terms[what] * torch.nan
                    value = value + terms[what]
                return value, terms

            run.loss.forward = forward
            return run

        monkeypatch.setattr(run_module, "prepare", prepare_spoiled)

    return spoil


class TestNames:
    def test_the_state_saved_is_that_before_the_step(self, start, spoil, monkeypatch):
        """Its forward has moved the statistics of the batch norms."""
        with monkeypatch.context() as patch:
            interrupt_after(patch, 5)
            _, stopped = start(DENSE, "stopped")
        spoil([6])
        status, run_dir = start(DENSE, "run")
        assert status == 1
        assert_bitwise_equal(final(run_dir), final(stopped))

    def test_a_gradient(self, start, monkeypatch, capsys):
        """Of a finite loss, sqrt(0) say: the weights were lost one step before it was found."""
        compute = loop.step

        def spoiled(run, patches):
            computed = compute(run, patches)
            if run.step == 3:
                run.model.head.hidden[0].weight.grad[0, 0] = torch.inf
            return computed

        monkeypatch.setattr(loop, "step", spoiled)
        status, run_dir = start(DENSE, "run")
        said = capsys.readouterr().err
        assert status == 1 and "step 4: not finite: the gradient of head.hidden.0.weight" in said
        assert final(run_dir)["step"] == 3 and "step_000000003.pt" in said
        monkeypatch.setattr(loop, "step", spoiled)
        status, run_dir = start(DENSE, "clipped", "--optim.clip_grad", "1")
        assert status == 1 and final(run_dir)["step"] == 3

    def test_pixels(self, start, monkeypatch, capsys):
        batches = loop.bags

        def spoiled(run):
            for number, patches in enumerate(batches(run), start=1):
                if number == 2:
                    patches = patches.clone()
                    patches[0, 0, 0, 0, 0] = torch.nan
                yield patches

        monkeypatch.setattr(loop, "bags", spoiled)
        assert start(DENSE, "run")[0] == 1
        assert "step 2: not finite: pixels of the batch" in capsys.readouterr().err


class TestSkip:
    @pytest.mark.parametrize("recipe", [DENSE, DENSE | {"loss": SIGREG}], ids=["vicreg", "sigreg"])
    def test_leaves_the_step_out(self, start, spoil, monkeypatch, capsys, recipe):
        """Weights, statistics, optimizer and average are those of the step before."""
        with monkeypatch.context() as patch:
            interrupt_after(patch, 11)
            _, before = start(recipe, "before")
        spoil([12], "covariance" if recipe is DENSE else "sigreg")
        status, run_dir = start(recipe, "run", *SKIP)
        said = capsys.readouterr().out
        assert status == 0 and "step 12 is left out, not finite: " in said
        a, b = final(before), final(run_dir)
        assert b.pop("step") == a.pop("step") + 1
        assert_bitwise_equal(a, b)
        assert records(run_dir)[-1]["left_out"] == 1

    def test_means_are_of_the_steps_that_counted(self, start, spoil):
        """One step that was left out made the loss of all steps of its record null."""
        spoil([6, 7, 8])
        _, each = start(DENSE, "each", *SKIP, "--log_every", "1")
        _, pairs = start(DENSE, "pairs", *SKIP)
        each, pairs = records(each), records(pairs)
        for name in ("loss", "term/covariance"):
            assert pairs[1][name] == pytest.approx((each[2][name] + each[3][name]) / 2, rel=1e-5)
            assert pairs[2][name] == each[4][name]
            assert pairs[3][name] is each[6][name] is None

    def test_ten_in_a_row_are_too_many(self, start, spoil, capsys):
        spoil(range(2, 100))
        status, run_dir = start(DENSE, "run", *SKIP)
        said = capsys.readouterr().err
        assert status == 1 and "10 steps in a row were left out, the last at step 11" in said
        assert "not finite" in said and "covariance = nan" in said
        assert all(v.isfinite().all() for v in final(run_dir)["model"].values())

    def test_nine_are_not(self, start, spoil):
        spoil([2, 3, 4, 5, 6, 7, 8, 9, 10, 12])
        assert start(DENSE, "run", *SKIP)[0] == 0

    def test_a_run_may_be_resumed_with_it(self, start, spoil):
        spoil([6])
        assert start(DENSE, "run")[0] == 1
        status, run_dir = start(DENSE, "run", "--resume", "auto", *SKIP)
        assert status == 0 and final(run_dir)["step"] == 12


class TestOnADevice:
    """What runs where looking at a number would make the host wait, on a CPU's tensors."""

    @pytest.fixture(autouse=True)
    def off_host(self, monkeypatch):
        make = guard.Guard.__init__

        def init(self, run):
            make(self, run)
            self.on_host = False

        monkeypatch.setattr(guard.Guard, "__init__", init)

    def test_a_first_step_is_undone(self, start, spoil):
        """When the optimizer has had no state to go back to."""
        spoil([1], "coding_rate")
        _, run_dir = start(PATCHES, "run", *SKIP, "--max_steps", "1")
        config = run_module.cli.load(run_dir / "config.yaml")
        state = final(run_dir)
        initial = run_module.build_model(config).state_dict()
        assert_bitwise_equal(dict(state["model"]), dict(initial))
        momenta = [s["momentum_buffer"] for s in state["optimizer"]["state"].values()]
        assert momenta and not any(bool(m.any()) for m in momenta)

    def test_means_are_of_the_steps_that_counted(self, start, spoil):
        TestSkip.test_means_are_of_the_steps_that_counted(self, start, spoil)

    def test_a_later_step_is_undone(self, start, spoil):
        flags = ["--optim.schedule", "constant", "--max_steps"]
        spoil([7], "coding_rate")
        _, before = start(PATCHES, "before", *flags, "6")
        _, after = start(PATCHES, "after", *SKIP, *flags, "7")
        a, b = final(before), final(after)
        for key in ("model", "optimizer", "average", "loss"):
            assert_bitwise_equal(a[key], b[key])

    def test_stops_and_names_the_first_bad_step(self, start, spoil, capsys):
        spoil([3])
        status, run_dir = start(DENSE, "run")
        said = capsys.readouterr().err
        assert status == 1 and "step 3: not finite: covariance = nan" in said
        assert "none was saved yet" in said and not (run_dir / "checkpoints").exists()

    def test_ten_in_a_row(self, start, spoil, capsys):
        spoil(range(2, 100))
        assert start(DENSE, "run", *SKIP)[0] == 1
        assert "10 steps in a row were left out" in capsys.readouterr().err

    def test_the_host_does_not_look_between_checks(self, start, monkeypatch):
        """A step's own part of the guard must not make it wait."""
        looks = []
        for name in ("__bool__", "__int__", "__float__", "item", "tolist"):
            real = getattr(torch.Tensor, name)
            monkeypatch.setattr(
                torch.Tensor, name, lambda t, r=real, n=name: (looks.append(n), r(t))[1]
            )
        seen = []
        for name in ("keep", "judge", "undo"):
            real = getattr(guard.Guard, name)

            def counted(self, *args, real=real):
                before = len(looks)
                result = real(self, *args)
                seen.append(len(looks) - before)
                return result

            monkeypatch.setattr(guard.Guard, name, counted)
        assert start(DENSE, "run", *SKIP)[0] == 0
        assert len(seen) == 36 and not any(seen)


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", [DENSE, PATCHES], ids=["adamw", "lars"])
def test_a_step_is_left_out_on_a_gpu(start, spoil, recipe):
    flags = ["--optim.schedule", "constant", "--device", "cuda", "--max_steps"]
    spoil([7], "covariance" if recipe is DENSE else "coding_rate")
    _, before = start(recipe, "before", *flags, "6")
    _, after = start(recipe, "after", *SKIP, *flags, "7")
    weights = final(after)["model"]
    for name, value in final(before)["model"].items():
        torch.testing.assert_close(weights[name], value, msg=name)


class TestHalfPrecision:
    def test_overflows_lower_the_scale_and_the_run_goes_on(self, start, monkeypatch):
        compute = loop.step
        scales = []

        def spoiled(run, patches):
            scales.append(run.scaler.get_scale())
            computed = compute(run, patches)
            if run.step == 2:
                run.model.head.hidden[0].weight.grad[0, 0] = torch.inf
            return computed

        monkeypatch.setattr(loop, "step", spoiled)
        status, run_dir = start(DENSE, "run", "--precision", "fp16")
        assert status == 0 and final(run_dir)["step"] == 12
        assert scales[3] == scales[2] / 2
        assert records(run_dir)[-1]["loss_scale"] == scales[-1]

    def test_an_overflow_at_every_scale_stops(self, start, monkeypatch, capsys):
        compute = loop.step

        def spoiled(run, patches):
            computed = compute(run, patches)
            run.model.head.hidden[0].weight.grad[0, 0] = torch.inf
            return computed

        monkeypatch.setattr(loop, "step", spoiled)
        assert start(DENSE, "run", "--precision", "fp16", "--epochs", "20")[0] == 1
        assert "overflows fp16 even at a loss scale of 0.5: take --precision bf16" in (
            capsys.readouterr().err
        )


class TestCollapse:
    def test_is_told_within_200_steps(self, start, capsys):
        """Only the invariance is left of the loss: all projections become one."""
        loss = {"name": "vicreg", "options": {"std_coeff": 0.0, "cov_coeff": 0.0}}
        optim = DENSE["optim"] | {"lr": 0.03}
        recipe = DENSE | {"loss": loss, "optim": optim, "log_every": 20, "batch_size": 32}
        status, _ = start(recipe, "run", "--max_steps", "200")
        said = capsys.readouterr().out
        assert status == 0 and said.count("the projections have collapsed") == 1
        assert "a larger --loss.options.std_coeff" in said and "look at --data" not in said

    def test_however_rarely_the_run_reports(self, start, capsys):
        loss = {"name": "vicreg", "options": {"std_coeff": 0.0, "cov_coeff": 0.0}}
        recipe = DENSE | {"loss": loss, "log_every": 1000, "optim": {"name": "adamw", "lr": 0.03}}
        assert start(recipe, "run", "--max_steps", "200")[0] == 0
        assert "the projections have collapsed" in capsys.readouterr().out

    def test_a_healthy_run_says_nothing(self, start, capsys):
        assert start(DENSE, "run", "--epochs", "15")[0] == 0
        assert "collapsed" not in capsys.readouterr().out

    def test_every_loss_has_its_help(self):
        from bagssl_fast.losses import LOSSES

        assert guard.HELP_OF_LOSS.keys() == LOSSES.keys()


class TestOddBatches:
    def of(self, start, tmp_path, pixels, *flags):
        np.savez(tmp_path / "odd.npz", images=pixels.astype(np.uint8))
        return start(DENSE, "odd", "--data", str(tmp_path / "odd.npz"), *flags)

    def test_black_images_are_told(self, start, tmp_path, capsys):
        """They trained to the end with "std 0.00/0.00 rank 1/1" and no warning."""
        status, run_dir = self.of(start, tmp_path, np.zeros((33, 16, 16, 3)))
        said = capsys.readouterr().out
        assert status == 0 and "the images of a batch all look the same" in said
        assert "look at --data" in said
        assert all(v.isfinite().all() for v in final(run_dir)["model"].values())

    def test_copies_of_one_image_stay_finite(self, start, tmp_path):
        image = np.random.default_rng(0).integers(0, 255, (1, 16, 16, 3))
        status, run_dir = self.of(start, tmp_path, np.repeat(image, 33, 0))
        assert status == 0
        assert all(np.isfinite(r["loss"]) for r in records(run_dir))

    @pytest.mark.parametrize(
        "loss",
        ["vicreg", "emp_ssl", "spectral", "barlow_twins", "info_nce", "byol", "sigreg"],
    )
    def test_two_images_a_batch(self, start, capsys, loss):
        head = DENSE["head"] | {"momentum": 0.99 if loss == "byol" else 0.0}
        recipe = DENSE | {"loss": {"name": loss}, "head": head}
        status, run_dir = start(recipe, "run", "--batch_size", "2", "--max_steps", "8")
        assert status == 0 and all(np.isfinite(r["loss"]) for r in records(run_dir))
        assert "--batch_size 2: the losses compare the images of a batch" in capsys.readouterr().out
