"""docs/encoders.md as a new user tries it: every snippet, in order."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_bag_encoder import CONFIGS, pictures, save
from test_export import RESIZED, photos

from bagssl_fast import export
from bagssl_fast.augment import Augment
from bagssl_fast.config import Config, EncoderConfig, HeadConfig

ROOT = Path(__file__).resolve().parent.parent
SMALL = HeadConfig(hidden=4, out=4, num_layers=1)


def snippets():
    text = (ROOT / "docs" / "encoders.md").read_text()
    return re.findall(r"```(python|bash)\n(.*?)```", text, re.S)


@pytest.fixture(scope="module")
def tried(tmp_path_factory):
    """Runs the snippets in one folder and one namespace; both, afterwards."""
    for package in ("sklearn", "torchvision", "timm", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    folder, names = tmp_path_factory.mktemp("docs"), {}
    save(folder / "runs" / "my-run", CONFIGS["dense"])
    for name, encoder in (("my-resnet", "resnet18"), ("my-timm", "resnet10t")):
        config = Config(augment=Augment(size=72), encoder=EncoderConfig(encoder), head=SMALL)
        save(folder / "runs" / name, config)
    (folder / "photos").mkdir()
    for name, image in zip(("cat.jpg", "dog.png"), pictures((40, 30), (30, 40)), strict=True):
        Image.fromarray(image).save(folder / "photos" / name)
    found = snippets()
    assert len(found) == 11
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for language, code in found:
            if language == "python":
                exec(compile(code, "docs/encoders.md", "exec"), names)
            else:
                command(shlex.split(code))
    return folder, names


def command(words):
    """Runs one command line; bagssl_fast's own in this process, which has torch already."""
    python, program, *arguments = words
    assert python == "python"
    if program == "-m":
        assert arguments.pop(0) == "bagssl_fast.export"
        assert export.main(arguments) == 0
    else:
        subprocess.run([sys.executable, ROOT / program, *arguments], check=True)


def test_every_snippet_works(tried):
    folder, names = tried
    assert names["features"].shape == (2, names["encode"].dim)
    assert names["h"].shape == (50, 16, 3) and names["z"].shape == (50, 16, 64)
    assert (folder / "images.pt2").is_file()
    assert (folder / "bagssl-fast-kernels" / "build.toml").is_file()


@pytest.mark.parametrize("shape", [(1, 24, 24), (3, 24, 31)], ids=str)
def test_onnx_has_the_numbers_of_the_bag_encoder(tried, shape):
    """Where nothing is resized: the shorter side has the 24 pixels of the view."""
    (got,) = tried[1]["session"].run(None, {"images": photos(*shape)})
    np.testing.assert_allclose(got, tried[1]["encode"](photos(*shape)), rtol=1e-4, atol=1e-5)


def test_onnx_resizes_as_the_loader(tried):
    session, encode = tried[1]["session"], tried[1]["encode"]
    (given,), (result,) = session.get_inputs(), session.get_outputs()
    assert (given.name, given.shape) == ("images", ["batch", "height", "width", 3])
    assert (result.name, result.shape) == ("embedding", ["batch", encode.dim])
    for shape in ((2, 61, 33), (1, 20, 20)):
        (got,) = session.run(None, {"images": photos(*shape)})
        np.testing.assert_allclose(got, encode(photos(*shape)), **RESIZED)
