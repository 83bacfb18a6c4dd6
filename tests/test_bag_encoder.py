"""BagEncoder: the numbers of the evaluation, whatever the images come in; and its files."""

import io
import json
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from bagssl_fast import ops
from bagssl_fast.augment import Augment
from bagssl_fast.config import BagConfig, Config, EncoderConfig, HeadConfig
from bagssl_fast.data import ImageError, open_source
from bagssl_fast.evaluation import features
from bagssl_fast.evaluation.features import CENTER, Plan, extract
from bagssl_fast.inference.bag_encoder import BagEncoder
from bagssl_fast.models import saved
from bagssl_fast.models.bag_model import build_model

HEAD = HeadConfig(hidden=12, out=10, num_layers=2)
CONFIGS = {
    "dense": Config(
        bag=BagConfig(patches=2, dense=True),
        augment=Augment(size=24, scale=(0.5, 1.0), mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4)),
        encoder=EncoderConfig("patchnet", 8, 4, options={"hypercolumn": True}),
        head=HEAD,
    ),
    "one_by_one": Config(
        augment=Augment(size=8, scale=(0.2, 0.3)),
        encoder=EncoderConfig("resnet18"),
        head=HeadConfig("emp", hidden=12, out=10),
    ),
}


def save(folder, config):
    """A run directory's exported files, of a network whose batch norms have seen something."""
    model = build_model(config)
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(getattr(module, "running_mean", None), torch.Tensor):
            module.running_mean.normal_(0, 0.1, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
    saved.export(folder, model.state_dict(), saved.describe(config, model, 7))
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    return {name: save(root / name, config) for name, config in CONFIGS.items()}


@pytest.fixture(params=CONFIGS)
def run(request, runs):
    return runs[request.param]


def pictures(*sizes, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]


RAGGED = pictures((30, 41), (52, 33), (8, 9), (64, 64), (26, 26))


@pytest.mark.parametrize("layer", ["embedding", "projection"])
@pytest.mark.parametrize("patches", [9, "center"])
def test_has_the_numbers_of_the_evaluation(run, patches, layer):
    images = np.stack(pictures(*[(30, 41)] * 5))
    found = saved.load(run)
    model, config, step = found.model, found.config, found.step
    count = CENTER if patches == "center" else patches
    plan = Plan((count,), count, batch_size=3, device=torch.device("cpu"))
    pooled, _ = extract(model, config, open_source(images), plan)
    want = pooled[{"embedding": "h", "projection": "z"}[layer], count]
    encoder = BagEncoder.from_run(run, patches=patches, layer=layer, device="cpu", batch_size=20)
    assert step == 7 and encoder.dim == want.shape[1]
    for form in (images, list(images), open_source(images)):
        torch.testing.assert_close(encoder(form), want, rtol=1e-5, atol=1e-6)
    normalized = BagEncoder.from_run(run, patches=patches, layer=layer, normalize=True)
    torch.testing.assert_close(normalized(images), F.normalize(want, dim=1), rtol=1e-5, atol=1e-6)


def test_a_grid_gives_the_regions_of_the_bag_side_by_side(run):
    images = np.stack(pictures(*[(30, 41)] * 3))
    whole = BagEncoder.from_run(run, patches=16, device="cpu")
    regions = BagEncoder.from_run(run, patches=16, grid=2, device="cpu")
    assert regions.dim == 4 * whole.dim and "grid=2" in repr(regions)
    got = regions(images)
    assert got.shape == (3, regions.dim)
    torch.testing.assert_close(
        got.unflatten(1, (4, -1)).mean(1), whole(images), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("patches, grid", [(9, 2), ("center", 2), (4, 0), (4, 1.5)])
def test_a_grid_that_does_not_divide_the_bag_is_refused(run, patches, grid):
    with pytest.raises(ValueError, match="grid"):
        BagEncoder.from_run(run, patches=patches, grid=grid, device="cpu")


@pytest.mark.parametrize("patches", [9, "center"])
def test_patches_are_cut_by_the_implementation_in_force(run, patches, monkeypatch):
    """`--impl` holds for images in memory, too; the numbers are the same to rounding."""
    calls = []
    reference = ops._load("patch_views", "reference")

    def counted(*args, **kwargs):
        calls.append(args)
        return reference(*args, **kwargs)

    monkeypatch.setitem(ops._loaded, ("patch_views", "reference"), counted)
    encoder = BagEncoder.from_run(run, patches=patches, device="cpu", batch_size=2)
    want = encoder(RAGGED)
    assert not calls  # the loader's threads
    with ops.use_impl("reference"):
        got = encoder(RAGGED)
        assert len(calls) >= 3
        one = encoder(open_source(RAGGED[0][None]))
    torch.testing.assert_close(one, got[:1], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_where_patches_are_cut_follows_the_dispatch_table(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    found = {"triton": object()}
    monkeypatch.setattr(features, "find_spec", found.get)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert (features.views_at(cpu), features.views_at(cuda)) == ("host", "device")
    with ops.use_impl("reference"):
        assert (features.views_at(cpu), features.views_at(cuda)) == ("device", "device")
    with ops.use_impl("cuda"), pytest.raises(ValueError, match="expected cuda tensors"):
        features.views_at(cpu)
    found.clear()
    assert features.views_at(cuda) == "host"


def test_a_call_does_not_copy_the_model(runs, monkeypatch):
    """Images that come one by one would pay for it each time."""
    encoder = BagEncoder.from_run(runs["dense"], patches=4, device="cpu")
    monkeypatch.setattr(features, "fold_batch_norm", None)
    assert encoder(RAGGED[0]).shape == (1, encoder.dim)


def test_takes_images_in_every_form(runs, tmp_path):
    encoder = BagEncoder.from_run(runs["dense"], patches=4, device="cpu", batch_size=2)
    want = encoder(RAGGED)
    assert want.shape == (5, encoder.dim) and want.dtype == torch.float32
    paths = [tmp_path / f"{i}.png" for i in range(5)]
    for path, image in zip(paths, RAGGED, strict=True):
        Image.fromarray(image).save(path)
    same = {
        "one by one": torch.cat([encoder(image) for image in RAGGED]),
        "tensors": encoder([torch.from_numpy(image) for image in RAGGED]),
        "channels first": encoder([torch.from_numpy(i).permute(2, 0, 1) for i in RAGGED]),
        "pil": encoder([Image.fromarray(image) for image in RAGGED]),
        "one pil": torch.cat([encoder(Image.fromarray(image)) for image in RAGGED]),
        "paths": encoder(paths),
        "array of paths": encoder(np.array([str(path) for path in paths])),
        "a folder": encoder(tmp_path),
        "one path": torch.cat([encoder(path) for path in paths]),
        "a mixture": encoder([paths[0], RAGGED[1], *map(Image.fromarray, RAGGED[2:])]),
        "a generator": encoder(image for image in RAGGED),
    }
    for name, got in same.items():
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: n + m)
    batch = np.stack(pictures(*[(20, 21)] * 4))
    chw = torch.from_numpy(batch).permute(0, 3, 1, 2)
    torch.testing.assert_close(encoder(chw), encoder(batch))
    gray = batch[..., :1]
    torch.testing.assert_close(encoder(gray), encoder(np.repeat(gray, 3, 3)))
    torch.testing.assert_close(encoder(list(gray[..., 0])), encoder(gray))
    assert encoder([]).shape == (0, encoder.dim)


def test_three_dimensions_are_one_image_whatever_their_sizes(runs):
    """Three gray images must not become one color image where four would be four images."""
    encoder = BagEncoder.from_run(runs["dense"], patches=4)
    gray = np.stack(pictures(*[(20, 21)] * 4))[..., 0]
    assert encoder(gray[:3]).shape == (1, encoder.dim)  # [3, H, W]
    with pytest.raises(ValueError, match=r"\[4, 20, 21\].*images\[\.\.\., None\]"):
        encoder(gray)
    assert encoder(gray[:3, ..., None]).shape == (3, encoder.dim)


def test_a_jpeg_is_turned_upright_as_in_training(runs, tmp_path):
    image = Image.fromarray(RAGGED[0])
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.jpg", exif=exif, quality=95)
    encoder = BagEncoder.from_run(runs["dense"], patches=4)
    of_path = encoder(tmp_path / "turned.jpg")
    with Image.open(tmp_path / "turned.jpg") as opened:
        torch.testing.assert_close(encoder(opened), of_path, rtol=1e-2, atol=2e-3)


def test_results_can_be_trained_on(runs):
    embedded = BagEncoder.from_run(runs["dense"], patches=4)(RAGGED)
    probe = torch.nn.Linear(embedded.shape[1], 2)
    probe(embedded).sum().backward()
    assert probe.weight.grad is not None


class TestRefuses:
    @pytest.mark.parametrize(
        ("images", "words"),
        [
            (np.zeros((2, 8, 8, 3), np.float32), "image 0 is float32.*uint8.*255"),
            (torch.zeros(3, 8, 8), "image 0 is float32"),
            ([RAGGED[0], np.zeros((8, 8, 4), np.uint8)], r"image 1 .*\[8, 8, 4\].*alpha"),
            (np.zeros((1, 2, 8, 8, 3), np.uint8), r"image 0 .*\[2, 8, 8, 3\]"),
            ([np.zeros((0, 8, 3), np.uint8)], r"image 0 .*\[0, 8, 3\]"),
            ([None], "image 0 is a NoneType"),
            ([*RAGGED * 20, None, 3], "image 100 is a NoneType"),
            (3.5, "got a float"),
        ],
    )
    def test_what_is_no_image(self, runs, images, words):
        encoder = BagEncoder.from_run(runs["one_by_one"], patches=1)
        with pytest.raises(ValueError, match=words):
            encoder(images)

    def test_files_that_are_not_there_or_no_images(self, runs, tmp_path):
        encoder = BagEncoder.from_run(runs["dense"], patches=1)
        with pytest.raises(FileNotFoundError, match=r"missing\.jpg: there is no such image file"):
            encoder([tmp_path / "missing.jpg"])
        (tmp_path / "broken.png").write_bytes(b"no image")
        with pytest.raises(ImageError, match=r"broken\.png"):
            encoder(tmp_path / "broken.png")
        with pytest.raises(ImageError, match=r"broken\.png"):
            encoder([RAGGED[0], tmp_path / "broken.png"])
        with pytest.raises(FileNotFoundError, match=r"missing\.jpg"):
            encoder([RAGGED[0], tmp_path / "missing.jpg"])

    def test_options(self, runs):
        for options, words in (
            ({"patches": 5}, "not a square number"),
            ({"patches": "all"}, "'all'"),
            ({"patches": 400}, "holds 289 patches"),
            ({"layer": "z"}, "embedding, projection"),
            ({"precision": "int8"}, "fp32, bf16, fp16"),
        ):
            with pytest.raises(ValueError, match=words):
                BagEncoder.from_run(runs["dense"], **options)

    def test_folders_that_hold_no_model(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"nowhere is not a directory"):
            BagEncoder.from_run(tmp_path / "nowhere")
        folder = save(tmp_path / "run", CONFIGS["dense"])
        (folder / "model.safetensors").rename(folder / "elsewhere")
        with pytest.raises(FileNotFoundError, match=r"holds no model\.safetensors"):
            BagEncoder.from_run(folder)
        (folder / "model.safetensors").write_bytes(b"damaged")
        with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
            BagEncoder.from_run(folder)

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"format": 1}, r"format 1, expected 2.*bagssl_fast\.export RUN"),
            ({"format": 3}, "format 3, expected 2"),
            ({"crop": None}, r"config\.json does not describe a model"),
            (
                {"encoder": {"name": "patchnet", "patch_size": 8, "width": 5}},
                "does not fit the conf",
            ),
        ],
    )
    def test_other_versions_and_other_models(self, tmp_path, change, words):
        folder = save(tmp_path / "run", CONFIGS["dense"])
        described = json.loads((folder / "config.json").read_text()) | change
        (folder / "config.json").write_text(json.dumps(described))
        with pytest.raises(ValueError, match=words):
            BagEncoder.from_run(folder)

    def test_a_config_that_is_not_valid_json(self, tmp_path):
        folder = save(tmp_path / "run", CONFIGS["dense"])
        (folder / "config.json").write_text("{")
        with pytest.raises(ValueError, match="not valid JSON"):
            BagEncoder.from_run(folder)


class TestScikitLearn:
    @pytest.fixture
    def features(self, runs):
        pytest.importorskip("sklearn", reason="scikit-learn is not installed")
        from bagssl_fast.inference.sklearn import BagFeatures

        return BagFeatures(runs["dense"], patches=4, device="cpu")

    def test_works_in_a_pipeline(self, features):
        from sklearn.linear_model import LogisticRegression
        from sklearn.model_selection import GridSearchCV
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        light = [image // 3 for image in pictures(*[(20, 24)] * 8)]
        dark = [255 - image // 3 for image in pictures(*[(24, 20)] * 8, seed=1)]
        images, labels = [*light, *dark], [0] * 8 + [1] * 8
        pipeline = make_pipeline(features, StandardScaler(), LogisticRegression())
        assert pipeline.fit(images, labels).score(images, labels) == 1.0
        grid = {"bagfeatures__patches": [1, 4], "logisticregression__C": [0.1, 1.0]}
        search = GridSearchCV(pipeline, grid, cv=2).fit(images, labels)
        assert search.best_score_ == 1.0
        names = pipeline[:1].get_feature_names_out()
        assert len(names) == len(features.transform(images[:1])[0]) and names[0] == "bagfeatures0"

    def test_is_the_bag_encoder(self, features, runs):
        got = features.fit_transform(RAGGED)
        assert isinstance(got, np.ndarray) and got.dtype == np.float32
        want = BagEncoder.from_run(runs["dense"], patches=4)(RAGGED)
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)

    def test_parameters_clone_and_pickle(self, features):
        from sklearn.base import clone

        other = clone(features)
        assert other.get_params() == features.get_params() and other is not features
        first = features.transform(RAGGED)
        assert features.set_params(patches=1).transform(RAGGED) is not first
        buffer = io.BytesIO()
        pickle.dump(features, buffer)
        assert len(buffer.getvalue()) < 1000  # the weights stay where they are
        loaded = pickle.loads(buffer.getvalue())
        np.testing.assert_array_equal(loaded.transform(RAGGED), features.transform(RAGGED))
        assert not np.allclose(first, loaded.transform(RAGGED))

    def test_fit_fails_early(self, tmp_path):
        pytest.importorskip("sklearn", reason="scikit-learn is not installed")
        from bagssl_fast.inference.sklearn import BagFeatures

        with pytest.raises(FileNotFoundError, match="nowhere"):
            BagFeatures(tmp_path / "nowhere").fit([])
