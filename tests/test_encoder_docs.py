"""docs/encoders.md as a new user tries it: every snippet, in order."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from test_bag_encoder import CONFIGS, pictures, save

from bagssl_fast import export
from bagssl_fast.augment import Augment
from bagssl_fast.config import Config, EncoderConfig, HeadConfig

ROOT = Path(__file__).resolve().parent.parent
SMALL = HeadConfig(hidden=4, out=4, num_layers=1)


def snippets():
    text = (ROOT / "docs" / "encoders.md").read_text()
    return re.findall(r"```(python|bash)\n(.*?)```", text, re.S)


def test_every_snippet_works(tmp_path, monkeypatch):
    for package in ("sklearn", "torchvision", "timm", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "runs" / "my-run", CONFIGS["dense"])
    for name, encoder in (("my-resnet", "resnet18"), ("my-timm", "resnet10t")):
        config = Config(augment=Augment(size=72), encoder=EncoderConfig(encoder), head=SMALL)
        save(tmp_path / "runs" / name, config)
    (tmp_path / "photos").mkdir()
    for name, image in zip(("cat.jpg", "dog.png"), pictures((40, 30), (30, 40)), strict=True):
        Image.fromarray(image).save(tmp_path / "photos" / name)

    names = {}
    found = snippets()
    assert len(found) == 10
    for language, code in found:
        if language == "python":
            exec(compile(code, "docs/encoders.md", "exec"), names)
            continue
        program, *arguments = shlex.split(code)[1:]
        if program == "-m":
            assert arguments[0] == "bagssl_fast.export"
            assert export.main(arguments[1:]) == 0  # in this process, which has torch already
        else:
            subprocess.run([sys.executable, ROOT / program, *arguments], check=True)
    assert names["features"].shape == (2, names["encode"].dim)
    assert names["embedding"].shape == (5, names["encode"].dim)
    assert (tmp_path / "images.pt2").is_file()
    assert (tmp_path / "bagssl-fast-kernels" / "build.toml").is_file()
