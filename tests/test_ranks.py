"""Several processes: equal to one, and what becomes of a job when one of them is in trouble."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import many_ranks
import pytest
import torch
from many_ranks import EQUAL, IN_TROUBLE, TROUBLES
from runs import assert_bitwise_equal, final, records

from bagssl_fast.training import checkpoint

SCRIPT = Path(many_ranks.__file__)
STATE_IS_GOOD = [
    "killed",
    "killed of four",
    "broken image",
    "defect",
    "stopped",
    "stalled",
    "SIGUSR1",
]


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All trainings at once: starting Python takes longer than any of them."""
    from runs import write_tiny_images

    folder = tmp_path_factory.mktemp("ranks")
    data = write_tiny_images(folder / "images.npz")
    command = [sys.executable, str(SCRIPT), str(folder), str(data)]
    # As the trainer sets it before it imports torch (test_machine.py), which has happened there.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def screen(jobs: Path, case: str, rank: int) -> list[str]:
    """What a process said beside the progress."""
    lines = (jobs / case / f"rank{rank}.txt").read_text().splitlines()
    shown = r"error: |Traceback|stopped by|finished|\w*Error: "
    return [line for line in lines if re.match(shown, line)]


def end(jobs: Path, case: str) -> dict:
    return json.loads((jobs / "ends.json").read_text())[case]


class TestEqual:
    @pytest.mark.parametrize("world", many_ranks.WORLDS[1:])
    @pytest.mark.parametrize("case", EQUAL)
    def test_trainings_end_at_the_weights_of_one_process(self, jobs, case, world):
        """20 steps in float32, the fast ops, whole program."""
        assert set(end(jobs, f"equal {world}")["codes"]) == {0}
        for rank in range(world):  # one process speaks
            said = screen(jobs, f"equal {world}", rank)
            assert len(said) == (len(EQUAL) if rank == 0 else 0)
        one, many = (jobs / f"equal {n}" / case for n in (1, world))
        assert final(many)["step"] == many_ranks.STEPS
        for key, weight in final(one)["model"].items():
            found = final(many)["model"][key]
            torch.testing.assert_close(found, weight, rtol=1e-4, atol=1e-4, msg=key)
        for x, y in zip(records(one), records(many), strict=True):
            assert x["loss"] == pytest.approx(y["loss"], rel=1e-3)

    @pytest.mark.parametrize("world", many_ranks.WORLDS[1:])
    @pytest.mark.parametrize("case", [*EQUAL, "resnet18, torch.float64"])
    def test_float64_leaves_nothing_but_its_rounding(self, jobs, case, world):
        one, many = (
            torch.load(jobs / f"equal {n}" / "exact.pt", mmap=True)[case] for n in (1, world)
        )
        for key, weight in one.items():
            torch.testing.assert_close(many[key], weight, rtol=1e-11, atol=1e-12, msg=key)

    @pytest.mark.parametrize("world", many_ranks.WORLDS[1:])
    def test_resnets_difference_is_rounding(self, jobs, world):
        """One float32 step differs between 1 and n processes no more than float32 itself does.

        Batch norm over maps of few pixels divides by small deviations: after one step weights
        differ by 1e-3 and more, which the float64 test above shows to be no fault of the exchange.
        """

        def distance(a: dict, b: dict) -> float:
            return max(float((a[key].double() - b[key].double()).abs().max()) for key in a)

        names = ("resnet18, torch.float32", "resnet18, torch.float64")
        one, exact = (torch.load(jobs / "equal 1" / "exact.pt", mmap=True)[name] for name in names)
        many = torch.load(jobs / f"equal {world}" / "exact.pt", mmap=True)[names[0]]
        assert distance(many, one) < 3 * distance(one, exact)


class TestTrouble:
    @pytest.mark.parametrize(
        ("case", "reason"),
        {
            "killed": "rank 1 of 2 is gone without an error of its own",
            "killed of four": "rank 2 of 4 is gone without an error of its own",
            "broken image": "rank 1 of 2: broken.jpg: no JPEG",
            "defect": "rank 1 of 2: KeyError: 'defect'",
            "stopped": "rank 1 of 2 did not respond for --ranks_timeout (24 s)",
            "stalled": "rank 1 of 2 is alive but did not take part in a step within",
        }.items(),
    )
    def test_the_first_process_says_why_and_saves(self, jobs, case, reason):
        """It was "Connection reset" with a traceback in every process, and nothing was saved."""
        first, second = screen(jobs, case, 0)
        assert first.startswith(f"error: {reason}")
        kept = jobs / case / "run" / "checkpoints" / "step_000000005.pt"
        assert f"at step 5 of 12; last good state: {kept}; to resume" in second
        assert checkpoint.latest(jobs / case / "run") == kept
        for rank in range(1, TROUBLES[case].world):
            said = screen(jobs, case, rank)
            defect = ["Traceback (most recent call last):", "KeyError: 'defect'"]
            assert said == (defect if case == "defect" else [])

    @pytest.mark.parametrize("case", TROUBLES)
    def test_the_job_ends_within_half_a_minute(self, jobs, case):
        times, codes = (end(jobs, case)[key] for key in ("times", "codes"))
        # A stopped process ends by the launcher's SIGKILL, 30 s after the first has ended.
        assert max(times) - min(times) < (45 if case == "stopped" else 30)
        expected = {"SIGUSR1": {138}, "none": {0}, "evaluated": {0}}.get(case, {1, -9})
        assert set(codes) <= expected

    def test_the_first_process_alone_shows_its_error(self, jobs):
        (said,) = screen(jobs, "broken image of the first", 0)
        assert said == "error: broken.jpg: no JPEG"
        assert screen(jobs, "broken image of the first", 1) == []

    def test_without_the_first_the_second_speaks(self, jobs):
        (said,) = screen(jobs, "first killed", 1)
        assert said.startswith("error: rank 0 of 2 is gone or does not respond")
        assert "frame #" not in (jobs / "first killed" / "rank1.txt").read_text()

    def test_a_signal_to_one_stops_all_after_the_save(self, jobs):
        (said,) = screen(jobs, "SIGUSR1", 0)
        assert said.startswith("stopped by SIGUSR1") and screen(jobs, "SIGUSR1", 1) == []
        assert final(jobs / "SIGUSR1" / "run")["step"] == 6

    @pytest.mark.parametrize("case", STATE_IS_GOOD)
    def test_another_number_of_processes_resumes(self, jobs, case, start, tmp_path):
        """By one process; the end is that of two which nothing happened to, up to rounding."""
        shutil.copytree(jobs / case / "run", tmp_path / case)
        status, run_dir = start(IN_TROUBLE, case, "--resume", "auto")
        assert status == 0
        undisturbed = final(jobs / "none" / "run")["model"]
        for key, weight in final(run_dir)["model"].items():
            torch.testing.assert_close(weight, undisturbed[key], rtol=0, atol=1e-4, msg=key)

    def test_the_unfinished_step_leaves_no_trace(self, jobs, start, tmp_path):
        """Two processes and one differ by rounding alone, after step 5 as at any step."""
        _, run_dir = start(
            IN_TROUBLE,
            "one",
            "--max_steps",
            "12",
            "--checkpoint_every",
            "0.25",
            "--keep_checkpoints",
            "12",
        )
        one = checkpoint.load(run_dir / "checkpoints" / "step_000000005.pt")["model"]
        killed = final(jobs / "killed" / "run")["model"]
        for key, weight in one.items():
            torch.testing.assert_close(killed[key], weight, rtol=0, atol=1e-4, msg=key)


class TestStart:
    def test_statistics_of_its_own_are_told_once(self, jobs):
        said = (jobs / "own statistics" / "rank0.txt").read_text()
        assert said.count("each of the 2 processes normalizes its own 4 images") == 1
        assert "normalizes its own" not in (jobs / "own statistics" / "rank1.txt").read_text()
        assert "normalizes its own" not in (jobs / "none" / "rank0.txt").read_text()

    def test_a_timeout_of_nothing_is_refused(self, start, capsys):
        assert start(IN_TROUBLE, "run", "--ranks_timeout", "0")[0] == 2
        assert "--ranks_timeout 0.0: minutes" in capsys.readouterr().err


def test_the_others_leave_before_the_evaluation(jobs):
    """Nothing waits for a process that has left, or for one that evaluates."""
    assert end(jobs, "evaluated")["codes"] == [0, 0]
    assert (jobs / "evaluated" / "run" / "eval.json").is_file()
    assert screen(jobs, "evaluated", 1) == []
    assert_bitwise_equal(
        final(jobs / "evaluated" / "run")["model"], final(jobs / "none" / "run")["model"]
    )
