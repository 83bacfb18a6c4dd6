"""The command line and the recipes: what is read, what is refused, and what the refusal says."""

import subprocess
import sys
from dataclasses import fields, is_dataclass, replace
from pathlib import Path

import pytest
import yaml

from bagssl_fast import cli, train
from bagssl_fast.augment import Augment
from bagssl_fast.config import (
    BagConfig,
    Config,
    EncoderConfig,
    EvalConfig,
    check,
    number_of_slots,
    patch_size,
)

ROOT = Path(__file__).resolve().parent.parent
RECIPES = sorted((ROOT / "configs").glob("*.yaml"))


def refused(capsys, *argv):
    """What the program says to a command line that it refuses with exit status 2."""
    assert train.main(argv) == 2
    return capsys.readouterr().err


class TestParse:
    def test_defaults_then_file_then_flags(self, tmp_path):
        recipe = tmp_path / "mine.yaml"
        recipe.write_text("epochs: 3\noptim: {lr: 0.5, name: sgd}\n")
        config = cli.parse(["--config", str(recipe), "--optim.lr", "0.25"])
        assert (config.epochs, config.optim.lr, config.optim.name) == (3, 0.25, "sgd")
        assert config.optim.momentum == Config().optim.momentum
        assert config.name == "mine"

    @pytest.mark.parametrize("flag", ["--test-data", "--test_data"])
    def test_dashes_and_underscores_are_one(self, flag):
        assert cli.parse([flag, "a-b_c.tar"]).test_data == "a-b_c.tar"
        assert cli.parse([f"{flag}=a-b_c.tar"]).test_data == "a-b_c.tar"

    def test_flags_alone_are_the_demo(self):
        config = cli.parse(["--run_dir", "x"])
        assert config.name == "demo" and config.run_dir == "x" and config.eval.enabled
        assert cli.parse(["--data", "x"]).name != "demo"

    def test_options_of_parts(self):
        flags = "--data x --loss.options.sim_coeff 3 --encoder.options.depth [1,2]"
        config = cli.parse(flags.split(" "))
        assert config.loss.options == {"sim_coeff": 3}
        assert config.encoder.options == {"depth": [1, 2]}

    def test_second_augmentation(self, tmp_path):
        recipe = tmp_path / "two.yaml"
        recipe.write_text(
            "augment: &a {size: 24, hue: 0.1}\naugment_odd: {<<: *a, solarize_prob: 0.9}\n"
        )
        config = cli.parse(["--config", str(recipe)])
        assert config.augment_odd == replace(config.augment, solarize_prob=0.9)

    def test_no_argument_means_the_demo(self):
        config = cli.parse([])
        assert (config.name, config.data, config.eval.enabled) == ("demo", "demo", True)

    def test_yaml_comes_back_equal(self, tmp_path):
        config = cli.parse(["--config", "demo", "--eval.patches", "[1,9]", "--optim.lr", "3e-4"])
        path = tmp_path / "config.yaml"
        path.write_text(cli.to_yaml(config))
        assert cli.load(path) == config

    def test_print_config(self, capsys):
        with pytest.raises(SystemExit) as stop:
            cli.parse(["--config", "demo", "--epochs", "77", "--print_config"])
        assert stop.value.code == 0
        assert yaml.safe_load(capsys.readouterr().out)["epochs"] == 77

    def test_unknown_flag_names_its_neighbor(self, capsys):
        text = refused(capsys, "--optim.lrr", "3")
        assert "optim.lrr" in text and "did you mean --optim.lr?" in text

    @pytest.mark.parametrize("text", ["optimm: {lr: 1}", "optim: {lrr: 1}", "epoch: 3"])
    def test_unknown_yaml_key(self, capsys, tmp_path, text):
        recipe = tmp_path / "r.yaml"
        recipe.write_text(text)
        said = refused(capsys, "--config", str(recipe))
        assert "did you mean" in said

    def test_unknown_recipe_lists_the_known(self, capsys):
        text = refused(capsys, "--config", "nonesuch")
        assert "nonesuch" in text and "demo" in text and "cifar10_emp" in text

    def test_wrong_type_and_wrong_choice(self, capsys):
        assert "epochs" in refused(capsys, "--epochs", "many")
        text = refused(capsys, "--optim.name", "adam")
        assert "adamw" in text and "sgd_lars" in text


class TestRecipes:
    @pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
    def test_recipe_is_sound(self, path):
        config = cli.parse(["--config", str(path)])
        check(config)
        assert config.name == path.stem

    @pytest.mark.parametrize("size", [32, 64, 100])
    def test_one_override_chooses_imagenet_patches(self, size):
        config = cli.parse(["--config", "imagenet_bagssl", "--augment.size", str(size)])
        check(config)
        for augment in (config.augment, config.augment_odd):
            assert augment.size == size
            assert augment.scale == pytest.approx([(size / 224) ** 2] * 2)

    def test_all_are_there(self):
        names = {
            "demo",
            "cifar10_cpu",
            "cifar10_dense",
            "cifar10_bagssl",
            "cifar10_emp",
            "imagenet_bagssl",
        }
        assert names <= set(cli.recipe_names())

    @pytest.mark.parametrize(
        "name", ["cifar10_emp", "cifar10_emp.yaml", "configs/cifar10_emp.yaml"]
    )
    def test_bare_names_work_anywhere(self, name, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        assert cli.parse(["--config", name]).loss.name == "emp_ssl"

    def test_emp_is_the_published_setting(self):
        c = cli.parse(["--config", "cifar10_emp"])
        assert c.augment == Augment()
        assert (c.encoder.name, patch_size(c), c.bag.patches, c.batch_size) == (
            "resnet18",
            32,
            20,
            100,
        )
        assert (c.head.name, c.head.hidden, c.head.out) == ("emp", 4096, 1024)
        assert c.loss.options == {"patch_sim": 200.0, "tcr": 1.0, "eps": 0.2}
        o = c.optim
        assert (o.name, o.lr, o.momentum, o.weight_decay) == ("sgd_lars", 0.3, 0.9, 1e-4)
        assert (o.schedule, o.warmup_epochs, o.final_lr) == ("cosine", 0.0, 0.0)


class TestCheck:
    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"bag": BagConfig(patches=0)}, "--bag.patches 0: must be 1 or more"),
            ({"bag": BagConfig(patches=-3)}, "--bag.patches -3: must be 1 or more"),
            ({"bag": BagConfig(patches=1)}, "take at least 2"),
            ({"batch_size": 1}, "take 2 or more"),
            ({"epochs": 0}, "--epochs 0"),
            ({"ema": 1.0}, r"\[0, 1\)"),
            ({"encoder": EncoderConfig(patch_size=16)}, "--bag.dense true"),
            ({"augment_odd": Augment(size=16)}, "same size"),
            ({"augment": Augment(scale=(1.5, 1.5))}, "cannot be larger than the image"),
            (
                {"encoder": EncoderConfig(patch_size=40), "bag": BagConfig(dense=True)},
                "--encoder.patch_size 40 is larger than the view, --augment.size 32",
            ),
            ({"eval": EvalConfig(patches=(1, 5))}, "squares"),
            ({"eval": EvalConfig(patches=())}, "at least one"),
        ],
        ids=str,
    )
    def test_refuses_with_the_how_to_fix(self, change, words):
        with pytest.raises(ValueError, match=words):
            check(replace(Config(), **change))

    def test_slots(self):
        dense = replace(
            Config(), bag=BagConfig(patches=2, dense=True), encoder=EncoderConfig(patch_size=16)
        )
        assert number_of_slots(Config()) == 20
        assert number_of_slots(dense) == 2 * 5 * 5
        one_view = replace(dense, bag=BagConfig(patches=1, dense=True))
        check(one_view)  # the positions of one view make the pairs


def test_every_field_is_documented():
    def undocumented(part, prefix=""):
        for f in fields(part):
            value = getattr(part, f.name)
            if f"        {f.name}: " not in type(part).__doc__:
                yield prefix + f.name
            if is_dataclass(value):
                yield from undocumented(value, f"{prefix}{f.name}.")

    assert not list(undocumented(Config()))


def test_identity_ignores_what_changes_nothing():
    free = replace(Config(), data="elsewhere", run_dir="r", threads=7, log_every=1)
    assert cli.identity(free) == cli.identity(Config())
    assert cli.identity(replace(Config(), seed=1)) != cli.identity(Config())


def test_reading_a_command_line_needs_no_torch():
    code = (
        "import sys, bagssl_fast.cli as c; c.parse(['--epochs=2']); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
