"""Trainings of several processes, for test_ranks.py: `python many_ranks.py FOLDER DATA`.

Every process is a fork of one that has imported torch and read the configurations: both take longer
than these trainings. What a process prints is in FOLDER/<case>/rank<r>.txt.
"""

import dataclasses
import json
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import torch._dynamo  # by the first optimizer of each process, otherwise
import yaml
from runs import DENSE, PATCHES

from bagssl_fast import cli, ops, train
from bagssl_fast.config import Config
from bagssl_fast.distributed import ranks
from bagssl_fast.distributed.sync_bn import share_batch_norm
from bagssl_fast.losses import build_loss
from bagssl_fast.models.bag_model import build_model
from bagssl_fast.training.meter import Meter
from bagssl_fast.training.run import distribute

STEPS, EXACT_STEPS = 20, 3  # the third reads statistics and targets that the others moved
WORLDS = (1, 2, 4)
# SGD: AdamW divides the gradient by itself and would blow up its last bits.
COMMON = {
    "optim": {"name": "sgd", "lr": 0.02},
    "sync_bn": True,
    "epochs": 5,
    "log_every": 10,
    "ema": 0.0,
    "checkpoint_every": 0,
    "head": {"hidden": 16, "out": 8, "num_layers": 2},
}
LOSSES: dict[str, dict] = {
    "vicreg": {"loss": {"name": "vicreg", "options": {"sim_coeff": 5.0}}},
    # Wider than the batch: gathered rows instead of reduced moments.
    "vicreg wide": {"loss": {"name": "vicreg"}, "head": {"hidden": 16, "out": 24}},
    "emp_ssl": {
        "loss": {"name": "emp_ssl", "options": {"patch_sim": 20.0}},
        "head": {"name": "emp", "hidden": 16, "out": 8},
    },
    "spectral": {"loss": {"name": "spectral"}},
    # Its gradient is large: at 0.02 it magnifies the last bits a hundredfold.
    "barlow_twins": {"loss": {"name": "barlow_twins"}, "optim": {"name": "sgd", "lr": 0.002}},
    "info_nce": {"loss": {"name": "info_nce"}},
    "byol": {
        "loss": {"name": "byol"},
        "head": {**COMMON["head"], "momentum": 0.9},
    },
    "sigreg": {"loss": {"name": "sigreg", "options": {"num_directions": 16}}},
}
BAGS = {"dense": DENSE, "patches": PATCHES}
EQUAL = {f"{loss}, {bags}": (loss, bags) for loss in LOSSES for bags in BAGS}
IN_TROUBLE = {**DENSE, "sync_bn": True, "ema": 0.0, "optim": COMMON["optim"]}
RESNET = {
    **PATCHES,
    **COMMON,
    **LOSSES["vicreg"],
    "bag": {"patches": 2},
    "encoder": {"name": "resnet18"},
    "augment": {"size": 32, "scale": [0.3, 0.3]},
    "augment_odd": None,
}


def recipe(loss: str, bags: str) -> dict:
    return {**BAGS[bags], **COMMON, **LOSSES[loss]}


def arguments(folder: Path, options: dict, data: str, run_dir: Path) -> list[str]:
    path = folder / f"{run_dir.name}-{os.getpid()}.yaml"  # each process writes its own
    path.write_text(yaml.safe_dump(options))
    return ["--config", str(path), "--data", data, "--run_dir", str(run_dir)]


def configurations(folder: Path) -> dict[str, Config]:
    """Of the trainings that have to be equal, for `steps`."""
    path = folder / "options.yaml"
    found = {}
    for case, options in {**{k: recipe(*v) for k, v in EQUAL.items()}, "resnet18": RESNET}.items():
        path.write_text(yaml.safe_dump(options))
        found[case] = cli.load(path)
    return found


def steps(config: Config, me: ranks.Ranks, dtype: torch.dtype, count: int) -> dict:
    """Weights after steps of a model on random bags, by the reference ops."""
    ops.set_impl("reference")
    model = build_model(config).to(dtype)
    if me.group is not None:
        share_batch_norm(model, me.group)
    forward = distribute(model, me).train()
    loss_function = build_loss(config.loss.name, group=me.group, **config.loss.options)
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(weights, lr=0.02)
    generator = torch.Generator().manual_seed(0)
    size = config.augment.size
    for _ in range(count):
        shape = (config.bag.patches, config.batch_size, 3, size, size)
        bags = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        _, z = forward(bags.chunk(me.world_size, dim=1)[me.rank])
        loss, _ = loss_function(z)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.state_dict()


def equal(folder: Path, data: str, configs: dict[str, Config]) -> None:
    """All losses in turn, in processes that stay: gloo cannot join its peers a second time."""
    me = ranks.start("cpu", 100.0)
    start, stop = ranks.start, ranks.stop
    ranks.start, ranks.stop = lambda *_: me, lambda *_: None
    for case, names in EQUAL.items():
        options = arguments(folder, recipe(*names), data, folder / case)
        assert train.main(options) == 0, case
    ranks.start, ranks.stop = start, stop
    exact = {case: steps(configs[case], me, torch.float64, EXACT_STEPS) for case in EQUAL}
    for dtype in (torch.float64, torch.float32):
        exact[f"resnet18, {dtype}"] = steps(configs["resnet18"], me, dtype, 1)
    if me.is_main:
        torch.save(exact, folder / "exact.pt")
    ranks.stop(me)


@dataclasses.dataclass(frozen=True)
class Trouble:
    """What happens to one process of a training.

    Args:
        world: Number of processes.
        rank: The process.
        act: What it does in the midst of step 6.
        flags: Further options.
        step: Steps done before.
    """

    world: int
    rank: int
    act: Callable[[], None]
    flags: tuple[str, ...] = ()
    step: int = 5


def kill(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def refuse() -> None:
    raise ValueError("broken.jpg: no JPEG")


def fail() -> None:
    raise KeyError("defect")


TROUBLES = {
    "killed": Trouble(2, 1, kill(signal.SIGKILL)),
    "killed of four": Trouble(4, 2, kill(signal.SIGKILL)),
    "first killed": Trouble(2, 0, kill(signal.SIGKILL)),
    "broken image": Trouble(2, 1, refuse),
    "broken image of the first": Trouble(2, 0, refuse),
    "defect": Trouble(2, 1, fail),
    "stopped": Trouble(2, 1, kill(signal.SIGSTOP), ("--ranks_timeout", "0.4")),
    "stalled": Trouble(2, 1, lambda: time.sleep(1000), ("--ranks_timeout", "0.4")),
    "SIGUSR1": Trouble(2, 1, kill(signal.SIGUSR1)),
    "own statistics": Trouble(2, 1, kill(signal.SIGKILL), ("--sync_bn", "false")),
    "evaluated": Trouble(2, 1, lambda: None, ("--eval.enabled", "true", "--eval.patches", "1")),
    "none": Trouble(2, 1, lambda: None),
}


def trouble(folder: Path, data: str) -> None:
    """A training to whose one process something happens; the exit code is the trainer's."""
    case = TROUBLES[folder.name]
    add = Meter.add

    def add_and_act(self: Meter, *args: object) -> None:
        add(self, *args)
        if self.run.ranks.rank == case.rank and self.run.step == case.step:
            case.act()

    Meter.add = add_and_act
    flags = arguments(folder, IN_TROUBLE, data, folder / "run")
    sys.exit(train.main([*flags, *case.flags]))


def start(world: int, folder: Path, work: Callable[[], None]) -> list[int]:
    """Forks the processes of one training."""
    folder.mkdir()
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    processes = []
    for rank in range(world):
        pid = os.fork()
        if pid:
            processes.append(pid)
            continue
        code = 1
        try:
            names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_PORT": port}
            os.environ |= {name: str(value) for name, value in names.items()}
            os.environ["MASTER_ADDR"] = "127.0.0.1"
            output = os.open(folder / f"rank{rank}.txt", os.O_CREAT | os.O_WRONLY)
            os.dup2(output, 1)
            os.dup2(output, 2)
            work()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)
    return processes


def main() -> None:
    """Starts everything at once, ends as torchrun does what does not, and writes down how."""
    folder, data = Path(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)
    configs = configurations(folder)
    jobs = {
        name: start(case.world, folder / name, lambda n=name: trouble(folder / n, data))
        for name, case in TROUBLES.items()
    }
    for world in WORLDS:
        name = f"equal {world}"
        jobs[name] = start(world, folder / name, lambda n=name: equal(folder / n, data, configs))
    owner = {pid: name for name, pids in jobs.items() for pid in pids}
    codes: dict[str, dict[int, int]] = {name: {} for name in jobs}
    times: dict[str, list[float]] = {name: [] for name in jobs}
    while owner:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            time.sleep(0.05)
            for name, pids in jobs.items():
                left = [p for p in pids if p in owner]
                if left and times[name] and time.monotonic() - times[name][0] > 30:
                    for p in left:
                        os.kill(p, signal.SIGKILL)
            continue
        name = owner.pop(pid)
        codes[name][jobs[name].index(pid)] = os.waitstatus_to_exitcode(status)
        times[name].append(time.monotonic())
        if status != 0:
            for p in jobs[name]:
                if p in owner:
                    os.kill(p, signal.SIGTERM)
    result = {
        name: {"codes": [codes[name][r] for r in range(len(pids))], "times": times[name]}
        for name, pids in jobs.items()
    }
    (folder / "ends.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
