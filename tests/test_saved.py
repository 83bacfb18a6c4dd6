"""A saved run is read in one way: evaluation, export and BagEncoder agree, errors included."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
from test_bag_encoder import CONFIGS, pictures
from test_bag_encoder import save as save_exported

from bagssl_fast import cli, evaluate, export
from bagssl_fast.inference.bag_encoder import BagEncoder
from bagssl_fast.models import saved
from bagssl_fast.models.bag_model import build_model

CONFIG = CONFIGS["dense"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A run directory, and what `export` made of it."""
    root = tmp_path_factory.mktemp("saved")
    run = save_exported(root / "run", CONFIG)
    (run / "config.yaml").write_text(cli.to_yaml(CONFIG))
    assert export.main([str(run), "--out", str(root / "exported")]) == 0
    return {"run": run, "exported": root / "exported"}


@pytest.fixture(params=["run", "exported"])
def folder(request, folders, tmp_path):
    """A copy of one of them, to damage."""
    return Path(shutil.copytree(folders[request.param], tmp_path / request.param))


def refusals(folder, capsys):
    """What the three readers say of a folder, which has to be the same."""
    said = []
    for command in ([evaluate.main, []], [export.main, ["--out", str(folder) + "-out"]]):
        capsys.readouterr()
        assert command[0]([str(folder), *command[1]]) == 2
        said.append(capsys.readouterr().err.strip().removeprefix("error: "))
    with pytest.raises((ValueError, FileNotFoundError)) as refused:
        BagEncoder.from_run(folder)
    said.append(str(refused.value))
    assert len(set(said)) == 1, said
    return said[0]


def test_all_forms_hold_the_same_model(folders):
    run, exported = (saved.load(folder) for folder in folders.values())
    assert run.step == exported.step == 7
    assert run.config == CONFIG and not run.model.training and not exported.model.training
    for (name, a), (other, b) in zip(
        run.model.state_dict().items(), exported.model.state_dict().items(), strict=True
    ):
        assert name == other and a.equal(b)
    one, two = (BagEncoder.from_run(f, patches=4, device="cpu") for f in folders.values())
    assert one(pictures((30, 40))).equal(two(pictures((30, 40))))


def test_an_exported_folder_can_be_evaluated(folder, tmp_path):
    """Any folder that BagEncoder reads, as far as it is told the data."""
    images = np.stack(pictures(*[(30, 30)] * 12))
    np.savez(tmp_path / "x.npz", images=images, labels=np.arange(12) % 2)
    flags = ["--data", str(tmp_path / "x.npz"), "--patches", "1", "--random", "false"]
    assert evaluate.main([str(folder), *flags]) == 0
    (path,) = (folder / "evaluations").glob("*.json")
    assert json.loads(path.read_text())["step"] == 7


def test_equal_weights_are_equal_files(tmp_path):
    """A resumed run has the file of one that was never stopped, byte for byte."""
    model = build_model(CONFIG)
    files = set()
    for i in range(8):
        (tmp_path / str(i)).mkdir()
        saved.export(tmp_path / str(i), model.state_dict(), saved.describe(CONFIG, model, 7))
        files.add((tmp_path / str(i) / "model.safetensors").read_bytes())
    assert len(files) == 1


class TestRefuses:
    """In one sentence that names the file and the fix, the same for all three readers."""

    def test_a_folder_that_does_not_exist_or_is_a_file(self, tmp_path, capsys):
        (tmp_path / "file").write_text("")
        for name in ("nowhere", "file"):
            said = refusals(tmp_path / name, capsys)
            assert said.startswith(f"{tmp_path / name} is not a directory: give the run directory")

    def test_a_folder_of_something_else(self, tmp_path, capsys):
        said = refusals(tmp_path, capsys)
        assert "neither config.yaml nor config.json: give the run directory" in said

    def test_no_model_yet(self, folder, capsys):
        (folder / "model.safetensors").unlink()
        said = refusals(folder, capsys)
        assert said.startswith(f"{folder} holds no model.safetensors: ")
        assert ("--resume auto" in said) == (folder.name == "run")

    @pytest.mark.parametrize("length", [0, 100, -5])
    def test_a_truncated_model(self, folder, capsys, length):
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:length])
        assert f"{path} is damaged (" in refusals(folder, capsys)

    def test_a_model_without_its_step(self, folder, capsys):
        path = folder / "model.safetensors"
        safetensors.torch.save_file(safetensors.torch.load_file(path), path)
        assert f"{path} is damaged (it names no step)" in refusals(folder, capsys)

    @pytest.mark.parametrize(
        ("section", "options", "tensor"),
        [
            ("encoder", {"width": 5}, "backbone.layers.3.weight"),
            ("head", {"hidden": 13}, "head.hidden.0.weight"),
            ("head", {"num_layers": 3}, "head.hidden.1.weight"),
        ],
    )
    def test_an_edited_configuration(self, folder, capsys, section, options, tensor):
        """No dump of every tensor: the first, how many, and what to set back."""
        if folder.name == "run":
            config = cli.load(folder / "config.yaml")
            edited = replace(config, **{section: replace(getattr(config, section), **options)})
            (folder / "config.yaml").write_text(cli.to_yaml(edited))
        else:
            described = json.loads((folder / "config.json").read_text())
            described[section] |= options
            (folder / "config.json").write_text(json.dumps(described))
        said = refusals(folder, capsys)
        assert f"does not fit the configuration beside it: {tensor} has the shape" in said
        assert "set encoder and head back" in said and len(said) < 500 + len(str(folder))

    def test_a_configuration_that_cannot_be_read(self, folder):
        name = "config.yaml" if folder.name == "run" else "config.json"
        (folder / name).write_text("{")
        with pytest.raises(ValueError, match=re.escape(f"{folder / name} is not")):
            saved.load(folder)

    def test_another_format(self, folders, tmp_path, capsys):
        folder = Path(shutil.copytree(folders["exported"], tmp_path / "exported"))
        described = json.loads((folder / "config.json").read_text()) | {"format": 9}
        (folder / "config.json").write_text(json.dumps(described))
        assert "config.json is of format 9, expected 2: write it" in refusals(folder, capsys)
