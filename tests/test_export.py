"""Encoders in other hands: their host's names, torch.export, ONNX."""

import json
import sys

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from test_bag_encoder import CONFIGS, pictures, save

from bagssl_fast import cli, export, ops
from bagssl_fast.augment import Augment
from bagssl_fast.config import Config, EncoderConfig, HeadConfig
from bagssl_fast.inference.bag_encoder import BagEncoder
from bagssl_fast.inference.export import export as write_export
from bagssl_fast.inference.graph import PatchGraph, to_onnx, to_program

SMALL = HeadConfig(hidden=4, out=4, num_layers=1)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    return {name: save(root / name, config) for name, config in CONFIGS.items()}


def photos(count, height, width):
    """Smooth pictures, as photographs are."""
    generator = torch.Generator().manual_seed(height)
    x = torch.rand(count, 3, 5, 6, generator=generator)
    x = torch.nn.functional.interpolate(x, (height, width), mode="bicubic").clamp(0, 1)
    return (255 * x).round().byte().permute(0, 2, 3, 1).numpy()


class TestFolder:
    def test_is_what_a_bag_encoder_reads(self, runs, tmp_path, capsys):
        assert export.main([str(runs["dense"]), "--out", str(tmp_path / "out")]) == 0
        assert "backbone.safetensors" in capsys.readouterr().out
        images = photos(2, 30, 40)
        first, second = (
            BagEncoder.from_run(f, patches=4) for f in (runs["dense"], tmp_path / "out")
        )
        assert first(images).equal(second(images))

    def test_renews_a_run_of_an_earlier_format(self, tmp_path, capsys):
        run = save(tmp_path / "run", CONFIGS["dense"])
        (run / "config.yaml").write_text(cli.to_yaml(CONFIGS["dense"]))
        want = BagEncoder.from_run(run, patches=4)(photos(1, 30, 40))
        (run / "config.json").write_text(json.dumps({"format": 1, "step": 7}))
        assert export.main([str(run), "--out", str(tmp_path / "out")]) == 0
        assert BagEncoder.from_run(tmp_path / "out", patches=4)(photos(1, 30, 40)).equal(want)

    def test_refusals(self, runs, tmp_path, capsys):
        for arguments, words in (
            ([str(tmp_path / "nowhere"), "--out", str(tmp_path / "o")], "is not a directory"),
            ([str(runs["dense"]), "--out", str(runs["dense"])], "is the run itself"),
            (
                [str(runs["dense"]), "--out", str(tmp_path / "o"), "--onnx", "--patches", "5"],
                "not a square number",
            ),
        ):
            assert export.main(arguments) == 2
            assert words in capsys.readouterr().err


class TestBackbone:
    """Loads into the host's own network by its plain, strict `load_state_dict`."""

    def exported(self, tmp_path, name, size, **options):
        config = Config(
            augment=Augment(size=size), encoder=EncoderConfig(name, options=options), head=SMALL
        )
        run = save(tmp_path / "run", config)
        write_export(run, tmp_path / "out")
        with safe_open(tmp_path / "out" / "backbone.safetensors", "pt") as file:
            assert file.metadata()["encoder"] == name
        encoder = BagEncoder.from_run(run, patches="center")
        return load_file(tmp_path / "out" / "backbone.safetensors"), encoder

    def compare(self, net, state, encoder, size):
        net.load_state_dict(state)
        x = torch.randn(2, 3, size, size)
        with torch.no_grad(), ops.use_impl("reference"):
            torch.testing.assert_close(net.eval()(x), encoder.model.backbone(x))

    def test_of_torchvision(self, tmp_path):
        models = pytest.importorskip("torchvision.models", reason="torchvision is not installed")
        state, encoder = self.exported(tmp_path, "resnet18", 72)
        net = models.resnet18()
        net.fc = torch.nn.Identity()
        self.compare(net, state, encoder, 72)

    def test_of_torchvision_with_the_stem_for_small_patches(self, tmp_path):
        models = pytest.importorskip("torchvision.models", reason="torchvision is not installed")
        state, encoder = self.exported(tmp_path, "resnet18", 16)
        net = models.resnet18()
        net.conv1 = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False)
        net.maxpool = net.fc = torch.nn.Identity()
        self.compare(net, state, encoder, 16)

    @pytest.mark.parametrize("name", ["resnet10t", "vit_tiny_patch16_224"])
    def test_of_timm(self, tmp_path, name):
        timm = pytest.importorskip("timm", reason="timm is not installed")
        state, encoder = self.exported(tmp_path, name, 32)
        options = {"img_size": 32} if "vit" in name else {}
        net = timm.create_model(name, num_classes=0, **options)
        self.compare(net, state, encoder, 32)
        file = tmp_path / "out" / "backbone.safetensors"  # timm also reads the file itself
        net = timm.create_model(name, num_classes=0, checkpoint_path=str(file), **options)
        self.compare(net, state, encoder, 32)

    def test_of_our_own(self, runs, tmp_path):
        from bagssl_fast.models.patchnet import PatchNet

        write_export(runs["dense"], tmp_path / "out")
        net = PatchNet(8, 4, hypercolumn=True)
        net.load_state_dict(load_file(tmp_path / "out" / "backbone.safetensors"))


# A pixel in some ten thousand is rounded the other way than in C++, where an image is resized.
RESIZED = {"rtol": 0.0, "atol": 5e-3}


class TestProgram:
    def test_of_images_of_any_size(self, runs):
        """Boxes on a grid over the image, as encoders cut them that have no dense form."""
        encoder = BagEncoder.from_run(
            runs["one_by_one"], patches=4, layer="projection", normalize=True
        )
        program = to_program(encoder).module()
        for images in (photos(1, 27, 27), photos(3, 40, 52), photos(2, 61, 33)):
            got = program(torch.from_numpy(images))
            torch.testing.assert_close(got, encoder(images), **RESIZED)

    def test_of_patches_in_any_number(self, runs):
        encoder = BagEncoder.from_run(runs["one_by_one"])
        program = to_program(encoder, "patches").module()
        for bags, batch in ((1, 1), (5, 3)):
            x = torch.from_numpy(np.stack(pictures(*[(8, 8)] * bags * batch))).permute(0, 3, 1, 2)
            with torch.no_grad(), ops.use_impl("reference"):
                h = encoder.model.embed((x / 255 - 0.5) / 0.5).unflatten(0, (bags, batch)).mean(0)
            torch.testing.assert_close(program(x.unflatten(0, (bags, batch))), h)

    def test_takes_images_or_patches(self, runs):
        with pytest.raises(ValueError, match="'views', expected one of images, patches"):
            to_program(BagEncoder.from_run(runs["dense"]), "views")


class TestOnnx:
    """The numbers of `images.onnx` are in test_encoder_docs.py, which writes one anyhow."""

    def test_of_patches_in_onnxruntime(self, runs, tmp_path):
        pytest.importorskip("onnxscript", reason="onnxscript is not installed")
        onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
        encoder = BagEncoder.from_run(runs["dense"], layer="projection", normalize=True)
        to_onnx(encoder, tmp_path / "patches.onnx", "patches")
        session = onnxruntime.InferenceSession(tmp_path / "patches.onnx")
        (given,), (result,) = session.get_inputs(), session.get_outputs()
        assert (given.name, given.shape) == ("patches", ["patches", "batch", 3, 8, 8])
        assert (result.name, result.shape) == ("projection", ["batch", 10])
        graph = PatchGraph(encoder)
        for bags, batch in ((1, 1), (5, 3)):
            x = np.stack(pictures(*[(8, 8)] * bags * batch)).transpose(0, 3, 1, 2)
            x = x.reshape(bags, batch, 3, 8, 8)
            (got,) = session.run(None, {"patches": x})
            with torch.no_grad():
                want = graph(torch.from_numpy(x))
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)

    def test_says_what_is_missing(self, runs, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "onnxscript", None)
        with pytest.raises(ValueError, match="pip install onnx onnxscript"):
            to_onnx(BagEncoder.from_run(runs["dense"]), tmp_path / "x.onnx")
