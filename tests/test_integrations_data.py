"""Our data path in other scripts: the same bags as BagLoader's, in the hosts' layouts."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from bagssl_fast.data import Augment, BagLoader, ImageError, Order, Source
from bagssl_fast.integrations.data import BagDataset, MultiCropLoader, PatchViews

AUGMENT = Augment(size=8, scale=(0.2, 0.8))


@pytest.fixture
def images(tmp_path):
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (11, 20, 24, 3), dtype=np.uint8)
    path = tmp_path / "images.npz"
    np.savez(path, images=pixels, labels=np.arange(11) % 3)
    return path


def test_loader_yields_what_a_multi_crop_dataloader_yields(images):
    options = {"batch_size": 4, "patches": 3, "augment": AUGMENT, "order": Order(seed=5)}
    expected = [batch.clone() for batch in BagLoader(images, **options)]
    with MultiCropLoader(images, **options) as loader:
        assert len(loader) == 2 and len(loader.dataset) == 11
        batches = [([c.clone() for c in crops], labels) for crops, labels in loader]
    assert len(batches) == 2
    for (crops, labels), batch in zip(batches, expected, strict=True):
        assert [tuple(crop.shape) for crop in crops] == [(4, 3, 8, 8)] * 3
        assert torch.equal(torch.stack(crops), batch.patches)
        assert torch.equal(labels, batch.labels)


def test_loader_has_the_layouts_of_lightly_and_solo_learn(images):
    options = {"batch_size": 4, "patches": 2, "augment": AUGMENT, "order": Order(shuffle=False)}
    crops, labels, names = next(iter(MultiCropLoader(images, layout="lightly", **options)))
    assert len(crops) == 2 and len(names) == 4 and all(isinstance(n, str) for n in names)
    index, crops, labels = next(iter(MultiCropLoader(images, layout="solo_learn", **options)))
    assert index.tolist() == [0, 1, 2, 3] and labels.tolist() == [0, 1, 2, 0] and len(crops) == 2
    with pytest.raises(ValueError, match="layout='dali' is unknown: pair, lightly, solo_learn"):
        MultiCropLoader(images, layout="dali")


def test_loader_resumes_and_begins_epochs_as_bag_loader(images):
    options = {"batch_size": 4, "patches": 2, "augment": AUGMENT}
    loader = MultiCropLoader(images, **options)
    loader.set_epoch(3)
    steps = iter(loader)
    next(steps)
    state = loader.state_dict()
    crops, _ = next(steps)
    expected = [crop.clone() for crop in crops]
    again = MultiCropLoader(images, **options)
    again.load_state_dict(state)
    crops, _ = next(iter(again))
    assert all(torch.equal(a, b) for a, b in zip(crops, expected, strict=True))


@pytest.mark.parametrize("workers", [0, 1])
def test_dataset_gives_the_loaders_bags_in_any_worker(images, workers):
    with BagLoader(images, 11, 3, AUGMENT, order=Order(shuffle=False, seed=2)) as loader:
        loader.set_epoch(4)
        expected = next(iter(loader)).clone()
    dataset = BagDataset(images, 3, AUGMENT, seed=2)
    dataset.set_epoch(4)
    crops, labels = next(iter(DataLoader(dataset, batch_size=11, num_workers=workers)))
    assert torch.equal(torch.stack(crops), expected.patches)
    assert torch.equal(labels, expected.labels)


def test_dataset_is_indexed_like_a_sequence(images):
    dataset = BagDataset(images, 2, AUGMENT)
    assert len(dataset) == 11
    assert torch.equal(dataset[-1][0][0], dataset[10][0][0])
    with pytest.raises(IndexError):
        dataset[11]


def test_dataset_names_an_image_that_cannot_be_decoded():
    dataset = BagDataset(Source.from_function(lambda index: b"no image", 3), 2, AUGMENT)
    with pytest.raises(ImageError, match="image 1: not an image"):
        dataset[1]


@pytest.mark.parametrize("bad", [{"scale": (0.5, 0.2)}, {"interpolation": "nearest"}])
def test_patch_views_check_their_augments_when_made(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        PatchViews(replace(AUGMENT, **bad))


def test_patch_views_are_the_loaders_and_take_either_order_of_dimensions(images):
    with BagLoader(images, 11, 3, AUGMENT, order=Order(shuffle=False, seed=2)) as loader:
        expected = next(iter(loader)).clone()
    pixels = torch.from_numpy(np.load(images)["images"])
    views = PatchViews(AUGMENT, 3, seed=2)
    index = torch.arange(11)
    for batch in (pixels, pixels.permute(0, 3, 1, 2), list(pixels)):
        assert torch.equal(views(batch, index), expected.patches)
    reference = PatchViews(AUGMENT, 3, seed=2, impl="reference")
    assert (reference(pixels, index) - expected.patches).abs().max() <= 2 / 255 + 1e-6
    assert "3 patches of 8 x 8" in repr(views)


def test_a_bad_image_of_a_data_set_is_named():
    source = Source.from_function(
        lambda index: b"no image", 3, name=lambda index: f"bucket/{index}"
    )
    with pytest.raises(ImageError, match=r"bucket/2: .*not an image"):
        BagDataset(source, 2, AUGMENT)[2]


def test_patch_views_draw_new_views_and_resume_from_a_state(images):
    pixels = torch.from_numpy(np.load(images)["images"])[:4]
    views = PatchViews((AUGMENT, replace(AUGMENT, hflip=1.0)), 2)
    first, state = views(pixels), views.state_dict()
    state = {name: value.clone() for name, value in state.items()}
    second = views(pixels)
    assert not torch.equal(first, second)
    again = PatchViews((AUGMENT, replace(AUGMENT, hflip=1.0)), 2)
    again.load_state_dict(state)
    assert torch.equal(again(pixels), second)


def test_patch_views_bad_input():
    views = PatchViews(AUGMENT, 2)
    with pytest.raises(ValueError, match=r"torch.float32 \[2, 3, 9, 9\], expected uint8"):
        views(torch.zeros(2, 3, 9, 9))
    with pytest.raises(ValueError, match=r"\[2, 1, 9, 9\], expected 3 channels"):
        views(torch.zeros(2, 1, 9, 9, dtype=torch.uint8))
    with pytest.raises(ValueError, match="3 indices for 2 images"):
        views(torch.zeros(2, 3, 9, 9, dtype=torch.uint8), torch.arange(3))
    with pytest.raises(ValueError, match="augments differ in size"):
        PatchViews((AUGMENT, replace(AUGMENT, size=9)), 2)
    with pytest.raises(ValueError, match="patches=0"):
        PatchViews(AUGMENT, 0)
