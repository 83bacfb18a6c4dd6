"""What a run reports goes on without room on the disk, and nothing of it is lost or doubled."""

import errno
import json
import os

import pytest
from runs import records

from bagssl_fast.training import reporter as reporter_module
from bagssl_fast.training.reporter import Reporter

NAMES = "loss lr images_per_s patches_per_s data_wait std_h std_z rank_h rank_z memory_mb"
RECORD = dict.fromkeys(NAMES.split(" "), 1.0)


@pytest.mark.parametrize("at", ["start", "record", "end"])
def test_without_room_for_tensorboard_the_run_goes_on(tmp_path, monkeypatch, capsys, at):
    """Its writer has a thread, whose error came out of the next record and ended the run."""
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    class Writer:
        def __init__(self, _):
            self.fail("start")

        def fail(self, where):
            if where == at:
                raise full

        def add_scalar(self, *_):
            self.fail("record")

        def close(self):
            self.fail("end")

    monkeypatch.setattr(reporter_module, "_tensorboard", Writer)
    reporter = Reporter(tmp_path, 10, tensorboard=True)
    for step in (1, 2, 3):
        reporter.report(step, RECORD)
    reporter.close()
    said = capsys.readouterr().out
    assert said.count("TensorBoard's events cannot be written and end here") == 1
    assert "No space left on device" in said
    assert [record["step"] for record in records(tmp_path)] == [1, 2, 3]


def test_metrics_wait_for_room(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    reporter = Reporter(tmp_path, 10)
    reporter.report(1, RECORD)
    path.rename(tmp_path / "kept")
    path.symlink_to("/dev/full")
    reporter.report(2, RECORD)
    reporter.report(3, RECORD)
    path.unlink()
    (tmp_path / "kept").rename(path)
    reporter.report(4, RECORD)
    assert [r["step"] for r in records(tmp_path)] == [1, 2, 3, 4]
    assert capsys.readouterr().out.count(f"{path} cannot be written") == 1


def test_a_torn_history_is_kept_as_far_as_it_is_whole(tmp_path):
    path = tmp_path / "metrics.jsonl"
    good = [json.dumps({"step": step}) for step in (1, 2, 3)]
    path.write_bytes(("\n".join(good) + '\n7\n{"st\xff').encode("latin-1"))
    Reporter(tmp_path, 10, step=2).close()
    assert path.read_text().splitlines() == good[:2]
