"""The batch script of docs/scaling.md, with SLURM and the trainer replaced by stubs."""

import os
import re
import subprocess
from pathlib import Path

import pytest

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "scaling.md"
STUBS = {
    "scontrol": 'if [ "$1" = show ]; then echo first; else echo "scontrol $*" >> "$LOG"; fi',
    "srun": 'while [ "$1" != bash ]; do shift; done; exec "$@"',
    "python": 'echo "$RANK/$WORLD_SIZE $MASTER_ADDR $*" >> "$LOG"; exit $CODE',
}


@pytest.mark.parametrize(("code", "requeued"), [(138, True), (0, False), (1, False), (143, False)])
def test_the_job_is_requeued_after_sigusr1_alone(tmp_path, code, requeued):
    script = re.search(r"```bash\n(#!/bin/bash\n#SBATCH.*?)```", DOCUMENT.read_text(), re.S)
    assert script
    for name, body in STUBS.items():
        stub = tmp_path / name
        stub.write_text(f"#!/bin/sh\n{body}\n")
        stub.chmod(0o755)
    log = tmp_path / "log"
    slurm = {"PROCID": 3, "NTASKS": 64, "LOCALID": 3, "NTASKS_PER_NODE": 8, "JOB_ID": 7}
    environment = {
        **{f"SLURM_{name}": str(value) for name, value in slurm.items()},
        **{"SLURM_JOB_NODELIST": "n[1-8]", "DATA": "demo", "RUN": "run", "LOG": str(log)},
        **{"PATH": f"{tmp_path}:{os.environ['PATH']}", "CODE": str(code)},
    }
    done = subprocess.run(["bash", "-c", script[1]], env=environment, check=False)
    assert done.returncode == code
    first, *rest = log.read_text().splitlines()
    assert first.startswith("3/64 first -m bagssl_fast.train") and "--resume auto" in first
    assert rest == (["scontrol requeue 7"] if requeued else [])
