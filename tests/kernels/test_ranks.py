"""Two ranks with half a batch each have the results and gradients of one rank with all of it."""

import subprocess
import sys
from pathlib import Path

import torch
from tolerances import assert_matches

HERE = Path(__file__).resolve().parent


def test_two_ranks_equal_one(tmp_path, monkeypatch):
    script = HERE / "two_ranks.py"
    ranks = [subprocess.Popen([sys.executable, script, str(r), tmp_path]) for r in range(2)]
    assert [process.wait(timeout=600) for process in ranks] == [0, 0]
    first, second = (torch.load(tmp_path / f"rank{r}.pt") for r in range(2))
    monkeypatch.syspath_prepend(HERE)
    from two_ranks import evaluate

    one = evaluate(0, 1, None)
    joined = {
        "loss": first["loss"],
        "out": torch.cat([first["out"], second["out"]]),
        "dx": torch.cat([first["dx"], second["dx"]]),
        # Every rank's loss is the global one, and all ranks' gradients are added: world_size times.
        "dz": torch.cat([first["dz"], second["dz"]], dim=1) / 2,
        "mean": first["mean"],
        "var": second["var"],
        **{name: first[name] + second[name] for name in ("dweight", "dgamma", "dbeta")},
    }
    for name, actual in joined.items():
        assert_matches(actual, one[name].double(), torch.float32, name, slack=5)
