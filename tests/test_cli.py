"""One dialect for all commands: names, values, hints, exit codes, nothing heavy too early."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from PIL import Image

from bagssl_fast import __main__ as door
from bagssl_fast import arguments, cli, config, env, evaluate, exits, export, pack, train
from bagssl_fast.analyze import __main__ as analyze
from bagssl_fast.arguments import Parser
from bagssl_fast.data import open_source
from bagssl_fast.distributed.ranks import StopSignals

COMMANDS = {
    "train": train,
    "evaluate": evaluate,
    "analyze": analyze,
    "pack": pack,
    "export": export,
    "env": env,
}
# What each command needs beside options, and paths that are wrong.
NEEDED = {"evaluate": ["RUN"], "export": ["RUN"], "pack": ["demo", "out.tar"]}
WRONG_PATHS = {
    "train": [
        ["--data", "nowhere.tar"],
        ["--test-data", "nowhere.tar"],
        ["--config", "nowhere"],
        ["--resume", "nowhere"],
        ["--run_dir", "full"],
        ["--data", "splits"],
    ],
    "evaluate": [["nowhere"], ["full"], ["run", "--data", "nowhere.tar"]],
    "analyze": [["--data", "nowhere.tar"], ["--config", "nowhere"], ["--out", "full/file"]],
    "pack": [["nowhere", "out.tar"], ["demo", "nowhere/out.tar"], ["demo", "full/file.tar"]],
    "export": [["nowhere", "--out", "o"], ["full", "--out", "o"]],
    "env": [],
}


@pytest.fixture
def places(tmp_path, monkeypatch):
    """A folder to work in: a directory in use, a run without content, a data set of two splits."""
    monkeypatch.chdir(tmp_path)
    for name in ("full/file", "full/file.tar", "run/model.safetensors"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).touch()
    Path("run/config.yaml").write_text(cli.to_yaml(config.Config()))
    for name in ("splits/train/a", "splits/val/a"):
        Path(name).mkdir(parents=True)
    return tmp_path


PROBE = """
import sys
from bagssl_fast.__main__ import main
for line in sys.argv[1:]:
    code = main(line.split())
    heavy = [m for m in ("torch", "numpy", "PIL", "bagssl_fast._C") if m in sys.modules]
    print("probe:", code, ",".join(heavy) or "light", line)
"""


class TestLight:
    @pytest.mark.parametrize("command", COMMANDS)
    def test_nothing_heavy_before_the_command_line_is_understood(self, command, places):
        """torch takes seconds to import: help and mistakes must not wait for it."""
        needed = NEEDED.get(command, [])
        wrong = [[*needed, "--nonesuch", "3"], *WRONG_PATHS[command]]
        lines = [" ".join([command, *words]) for words in (["--help"], *wrong)]
        python = [sys.executable, "-c", PROBE]
        done = subprocess.run([*python, *lines], capture_output=True, text=True, check=True)
        probes = [line for line in done.stdout.splitlines() if line.startswith("probe:")]
        codes = [0] + [2] * len(wrong)
        assert probes == [f"probe: {c} light {x}" for c, x in zip(codes, lines, strict=True)]
        assert done.stderr.count("\n") == len(wrong), done.stderr  # each one line

    @pytest.mark.parametrize("command", COMMANDS)
    def test_help_explains_every_option(self, command, capsys):
        assert COMMANDS[command].main(["--help"]) == 0
        said = capsys.readouterr().out
        assert said.startswith(f"usage: bagssl {command}") and "{" not in said.split("\n")[0]


@dataclass(frozen=True)
class Inner:
    """An inner one.

    Args:
        name: A name.
        sizes: Sizes.
        options: More.
    """

    name: str = "x"
    sizes: tuple[float, float] = (0.0, 1.0)
    options: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Toy:
    """A toy.

    Args:
        source: From where.
        destination: To where.
        max_count: At most.
        counts: Numbers.
        fast: Hurry.
        kind: What kind.
        resume: What to resume.
        inner: An inner record.
        other: A second one.
    """

    source: str
    destination: Path
    max_count: int = 3
    counts: tuple[int, ...] = (1,)
    fast: bool = False
    kind: Literal["big", "small"] = "big"
    resume: str = field(default="never", metadata={"bare": "auto"})
    inner: Inner = field(default_factory=Inner)
    other: Inner | None = None


def read(text: str) -> Toy:
    return arguments.read(Toy, text.split(), "toy")


class TestDialect:
    def test_names_take_dashes_and_underscores_values_are_left_alone(self):
        for text in (
            "--max-count 7 a-b c_d-e",
            "a-b --max_count=7 c_d-e",
            "a-b c_d-e --max-count=7",
        ):
            toy = read(text)
            assert (toy.source, toy.destination, toy.max_count) == ("a-b", Path("c_d-e"), 7)

    @pytest.mark.parametrize("text", ["1,4", "[1,4]", "[1, 4]"])
    def test_lists_take_commas_with_and_without_brackets(self, text):
        assert arguments.read(Toy, ["a", "b", "--counts", text], "toy").counts == (1, 4)
        toy = arguments.read(Toy, ["a", "b", f"--counts={text}", "--inner.sizes=.5,2"], "toy")
        assert toy.counts == (1, 4) and toy.inner.sizes == (0.5, 2)

    def test_options_of_parts_take_lists_too(self):
        parsed = cli.parse(["--data", "x", "--encoder.options.depth", "1,2"])
        assert parsed.encoder.options == {"depth": [1, 2]}

    def test_a_bare_boolean_is_true(self):
        for text in ("--fast a b", "a --fast b", "a b --fast", "a b --fast --max_count 3"):
            assert read(text).fast and read(text).destination == Path("b")
        assert read("a b --fast yes").fast and not read("a b --fast FALSE").fast
        assert not read("a --fast no b").fast

    def test_a_bare_option_of_a_part_is_true(self):
        parsed = cli.parse(
            ["--data", "x", "--head.options.normalize", "--loss.options.eps", "1e-3"]
        )
        assert parsed.head.options == {"normalize": True}
        assert parsed.loss.options == {"eps": 1e-3}

    def test_a_bare_resume_is_auto(self):
        assert read("a b --resume").resume == "auto"
        assert read("a b --resume --fast").resume == "auto"
        assert read("a b --resume x").resume == "x"
        assert cli.parse(["--resume", "--run_dir", "r"]).resume == "auto"

    def test_positional_arguments_have_names_too(self):
        assert read("--destination b a") == read("a b")

    def test_only_what_is_given(self):
        parser = Parser(Toy, "toy", defaults=False, skip=("kind",))
        given = parser.read(["a", "b", "--fast"])
        assert (given["source"], given["destination"], given["fast"]) == ("a", Path("b"), True)
        assert not {"max_count", "counts", "kind", "resume"} & given.keys()
        with pytest.raises(ValueError, match="unknown option --kind"):
            parser.read(["a", "b", "--kind", "big"])

    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ("a", "DESTINATION is missing; bagssl toy SOURCE DESTINATION"),
            ("a b c", "unexpected argument c"),
            ("a b -v", "unexpected argument -v"),
            ("a b --max_count", "--max_count needs a value; expected a whole number"),
            ("a b --max_count many", "--max_count many: expected a whole number"),
            ("a b --max-count 2.5", "--max_count 2.5: expected a whole number"),
            ("a b --counts 1,x", "--counts 1,x: expected whole numbers, such as 1,4"),
            ("a b --inner.sizes 1", "--inner.sizes 1: expected 2 numbers"),
            ("a b --other.sizes x", "--other.sizes x: expected 2 numbers"),
            ("a b --kind bug", "--kind bug: expected big or small; did you mean --kind big?"),
            ("a b --max_cuont 3", "unknown option --max_cuont; did you mean --max_count?"),
            ("a b --count 3", "did you mean --counts?"),
            ("a b --inner.nam y", "did you mean --inner.name?"),
            ("a b --inner y", "inner is a group of options; did you mean --inner.name y?"),
            ("a b --no-fast", "did you mean --fast false?"),
            ("a b --sizes 1,2", "did you mean --inner.sizes or --other.sizes?"),
            ("a b --zzz", "--help lists the options"),
            ("a b --config x", "unknown option --config"),
        ],
    )
    def test_what_is_wrong_is_said_in_one_sentence(self, text, words):
        with pytest.raises(ValueError) as error:
            read(text)
        assert words in str(error.value) and "\n" not in str(error.value)


class TestTrain:
    @pytest.mark.parametrize(
        ("flags", "words"),
        [
            ("--lr 0.1", "did you mean --optim.lr?"),
            ("--wd 0.1", "did you mean --optim.weight_decay?"),
            ("--encoder resnet18", "did you mean --encoder.name resnet18?"),
            ("--loss vicreg", "did you mean --loss.name vicreg?"),
            ("--encoder.nam resnet18", "did you mean --encoder.name?"),
            ("--num_workers 4", "did you mean --loader.num_threads?"),
            ("--workers 4", "did you mean --loader.num_threads?"),
            ("--num-threads 4", "did you mean --loader.num_threads?"),
            ("--output_dir x", "did you mean --run_dir?"),
            ("--gpus 2", "torchrun --nproc_per_node N"),
            ("--device cuda:1", "CUDA_VISIBLE_DEVICES=1"),
            ("--device gpu", "did you mean --device cuda?"),
            ("--precision 16-mixed", "did you mean --precision fp16?"),
            ("--precision bf16-mixed", "did you mean --precision bf16?"),
            ("--patches 4", "did you mean --bag.patches or --eval.patches?"),
            ("--eval", "a group of options: --eval.enabled"),
        ],
    )
    def test_natural_guesses_get_a_hint(self, flags, words, capsys):
        assert train.main(flags.split()) == 2
        said = capsys.readouterr().err
        assert words in said and said.startswith("error: ") and said.count("\n") == 1

    def test_the_hints_name_options_that_there_are(self):
        known = dict(arguments.option_types(config.Config))
        assert set(arguments.ELSEWHERE.values()) <= known.keys()
        assert not set(arguments.ELSEWHERE) & known.keys()

    def test_flags_win_over_the_recipe_wherever_they_stand(self, tmp_path):
        (tmp_path / "r.yaml").write_text("epochs: 5\nseed: 2\n")
        parsed = cli.parse(["--epochs", "9", "--config", str(tmp_path / "r.yaml")])
        assert (parsed.epochs, parsed.seed) == (9, 2)

    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ("epochs: [", "is not valid yaml"),
            ("- 1", "expected options by name"),
            ("epochs: many", "--epochs many: expected a whole number"),
            ("augment_odd: {siz: 3}", "did you mean --augment_odd.size?"),
        ],
    )
    def test_a_wrong_recipe_is_refused(self, text, words, tmp_path):
        (tmp_path / "r.yaml").write_text(text)
        for reading in (cli.load, lambda path: cli.parse(["--config", str(path)])):
            with pytest.raises(ValueError) as error:
                reading(tmp_path / "r.yaml")
            assert words in str(error.value)

    @pytest.mark.parametrize(
        ("flags", "words"),
        [
            ("--loss.options.sim 3", "loss vicreg has no option sim"),
            ("--loss.options.sim 3", "sim_coeff, std_coeff, cov_coeff"),
            ("--loss.options.std_coef 3", "did you mean std_coeff?"),
            ("--encoder.options.widht 3", "encoder patchnet has no option widht"),
            ("--head.options.normalis 3", "did you mean normalize?); it has last_bias, normalize"),
            ("--head.name emp --head.options.x 3", "head emp has no option x"),
            ("--encoder.options.in_chans 1", "patches have 3 channels"),
            ("--encoder.name resnet18 --encoder.options.zero_init 1", "zero_init_residual"),
            ("--encoder.name resnet10t --encoder.options.in_chans 1", "patches have 3 channels"),
            ("--encoder.name resnet10t --encoder.options.drop_rat .1", "did you mean drop_rate?"),
        ],
    )
    def test_options_of_parts_are_listed(self, flags, words, tmp_path, capsys):
        if "resnet" in flags:
            pytest.importorskip("timm", reason="timm is not installed")
            pytest.importorskip("torchvision", reason="torchvision is not installed")
        command = ["--data", "demo", "--device", "cpu", "--run_dir", str(tmp_path / "r")]
        assert train.main([*command, *flags.split()]) == 2
        said = capsys.readouterr().err
        assert words in said and said.count("\n") == 1
        assert not (tmp_path / "r").exists()

    def test_tensorboard_is_missed_before_any_work(self, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr(config, "find_spec", lambda name: None)
        assert train.main(["--tensorboard", "--run_dir", str(tmp_path / "r")]) == 2
        assert "pip install tensorboard" in capsys.readouterr().err
        assert not (tmp_path / "r").exists()


def test_ranks_say_what_is_wrong_once(tmp_path):
    """Two processes refuse the same option: one line, and exit code 2 from both."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["-m", "bagssl_fast.train", "--run_dir", str(tmp_path / "r"), "--device", "cpu"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--loss.options.sim", "3"], capture_output=True, text=True, env=environment
    )
    assert done.stderr.count("loss emp_ssl has no option sim") == 1, done.stderr
    assert "exitcode  : 2" in done.stderr and not (tmp_path / "r").exists()


class TestExits:
    def test_what_only_a_later_rank_knows_is_said_after_a_while(self, monkeypatch, capsys):
        slept = []
        monkeypatch.setattr(exits.time, "sleep", slept.append)

        @exits.program
        def main(argv):
            raise ValueError("no\n  such thing")

        for rank in ("0", "1"):
            monkeypatch.setenv("LOCAL_RANK", rank)
            assert main([]) == exits.FAILED
            assert capsys.readouterr().err == "error: no such thing\n"
        assert slept == [exits.PATIENCE]

    @pytest.mark.parametrize(
        ("raised", "code"),
        [
            (None, 0),
            (ValueError("x"), 1),
            (FileNotFoundError("x"), 1),
            (exits.Failed("x"), 1),
            (exits.Stopped(signal.SIGTERM, "x"), 143),
            (KeyboardInterrupt(), 130),
        ],
        ids=repr,
    )
    def test_codes(self, raised, code):
        @exits.program
        def main(argv):
            if raised is not None:
                raise raised

        assert main([]) == code

    def test_a_defect_keeps_its_traceback(self):
        @exits.program
        def main(argv):
            raise RuntimeError("a defect")

        with pytest.raises(RuntimeError, match="a defect"):
            main([])

    def test_nohup_stays_in_force(self):
        before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
        try:
            with StopSignals() as stop:
                signal.raise_signal(signal.SIGHUP)
                assert stop.received == 0
            signal.signal(signal.SIGHUP, signal.SIG_DFL)
            with StopSignals() as stop:
                signal.raise_signal(signal.SIGHUP)
                assert stop.received == signal.SIGHUP
        finally:
            signal.signal(signal.SIGHUP, before)


class TestDoor:
    def test_lists_the_commands(self, capsys):
        assert door.COMMANDS.keys() == COMMANDS.keys()
        assert door.main(["--help"]) == 0
        said = capsys.readouterr().out
        assert all(name in said for name in COMMANDS)
        assert door.main([]) == 2
        said = capsys.readouterr().err
        assert all(name in said for name in COMMANDS)

    def test_guesses_a_command(self, capsys):
        assert door.main(["trian"]) == 2
        assert capsys.readouterr().err == "error: unknown command trian; did you mean train?\n"

    def test_env_help_is_not_the_environment(self, capsys):
        assert door.main(["env", "--help"]) == 0
        assert capsys.readouterr().out.startswith("usage: bagssl env")
        assert door.main(["env"]) == 0
        assert json.loads(capsys.readouterr().out)["cores"] >= 1


def pictures(folder: Path, *names: str) -> None:
    for i, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((16, 16, 3), 10 * i, np.uint8)).save(path)


class TestData:
    def test_a_root_of_two_splits_is_refused(self, tmp_path, capsys):
        """Training on the test set too, with no word, was what happened."""
        pictures(tmp_path / "set", "train/owl/a.png", "val/owl/b.png")
        for refuse in (open_source, lambda path: exits.end("", train.main(["--data", str(path)]))):
            with pytest.raises((ValueError, SystemExit)) as error:
                refuse(tmp_path / "set")
            said = f"{error.value} {capsys.readouterr().err}"
            assert str(tmp_path / "set" / "train") in said
        assert len(open_source(tmp_path / "set" / "train")) == 1
        pictures(tmp_path / "birds", "train/a.png", "bus/b.png")  # two classes of vehicles
        assert open_source(tmp_path / "birds").classes == ["bus", "train"]

    def test_folders_need_not_be_labels(self, tmp_path):
        names = ("2024-05-01/a.png", "2024-05-02/b.png", "loose.png")
        pictures(tmp_path / "set", *names)
        with pytest.raises(ValueError, match='labels="none"'):
            open_source(tmp_path / "set")
        source = open_source(tmp_path / "set", labels="none")
        assert len(source) == 3 and source.labels is source.classes is None
        assert pack.main([str(tmp_path / "set"), str(tmp_path / "x.tar"), "--labels", "none"]) == 0
        assert open_source(tmp_path / "x.tar").labels is None
        pictures(tmp_path / "two", "owl/a.png", "cat/b.png")
        assert pack.main([str(tmp_path / "two"), str(tmp_path / "y.tar")]) == 0
        assert open_source(tmp_path / "y.tar").classes == ["cat", "owl"]
        for kind in ([tmp_path / "y.tar"], np.zeros((2, 8, 8, 3), np.uint8), "demo"):
            assert open_source(kind, labels="none").labels is None
        with pytest.raises(ValueError, match="labels must be one of auto, none, got 'some'"):
            open_source(tmp_path / "two", labels="some")

    def test_a_mistyped_path_gets_a_guess(self, tmp_path, capsys):
        (tmp_path / "images.tar").touch()
        assert train.main(["--data", str(tmp_path / "image.tar")]) == 2
        assert f"did you mean {tmp_path / 'images.tar'}?" in capsys.readouterr().err
