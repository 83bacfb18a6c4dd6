"""Every kind of bad file, and of odd but good ones, under both settings of on_error."""

import re
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from bags import bags, make, write_folder
from pictures import exif_rotated, jpeg, noise, png, write_tar

from bagssl_fast.data import ImageError, open_source


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """Every test has a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_folder(tmp_path / "set")


def bomb() -> bytes:
    """A PNG header of 100,000 x 100,000 pixels."""
    data = bytearray(png(noise(1)[0]))
    data[16:24] = (100_000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


BAD = {
    "truncated": (lambda: jpeg(noise(1, 90, 90)[0])[:-1500], "truncated JPEG|truncated"),
    "truncated_png": (lambda: png(noise(1)[0])[:-400], "truncated"),
    "only_a_header": (lambda: jpeg(noise(1)[0])[:50], "(?i)truncated|not an image"),
    "zero_bytes": (lambda: b"", "empty"),
    "text": (lambda: b"this is no image", "not an image"),
    "noise_after_start": (lambda: b"\xff\xd8\xff" + bytes(200), "JPEG|not an image"),
    "bomb": (bomb, "100000 x 100000 pixels exceeds the limit|bomb"),
    "unreadable": (None, "cannot open the file: No such file"),
}
GOOD = {
    "cmyk": lambda: jpeg(np.full((20, 26, 4), 90, np.uint8)),
    "gray": lambda: jpeg(noise(1)[0, ..., 0]),
    "exif_rotated": lambda: exif_rotated(noise(1)[0]),
    "1x1": lambda: jpeg(np.full((1, 1, 3), 200, np.uint8)),
    "1xN": lambda: jpeg(np.full((1, 300, 3), 200, np.uint8)),
    "65500_wide": lambda: jpeg(np.full((2, 65_500, 3), 60, np.uint8)),
    "progressive": lambda: jpeg(noise(1)[0], progressive=True),
    "rgba": lambda: png(np.full((9, 9, 4), 50, np.uint8)),
    "png_named_jpg": lambda: png(noise(1)[0]),
}


def plant(folder: Path, contents) -> Path:
    """Puts a file, or a link that leads nowhere, in the place of image 5 of 24."""
    path = sorted((folder / "a").iterdir())[5]
    path.unlink()
    if contents is None:
        path.symlink_to(folder / "gone")
    else:
        path.write_bytes(contents())
    return path


@pytest.mark.parametrize("kind", BAD)
def test_bad_file_is_an_error_with_name_and_reason(folder, kind):
    contents, reason = BAD[kind]
    path = plant(folder, contents)
    with make(folder, drop_last=False) as loader, pytest.raises(ImageError, match=reason) as error:
        list(loader)
    assert error.value.name == str(path) and str(path) in str(error.value)
    assert 'on_error="skip"' in str(error.value)


@pytest.mark.parametrize("kind", BAD)
def test_bad_file_is_replaced_the_same_way_by_any_threads(folder, kind):
    contents, reason = BAD[kind]
    path = plant(folder, contents)
    runs = []
    for num_threads, batch_size in ((1, 4), (3, 6)):
        options = {"num_threads": num_threads, "batch_size": batch_size, "shuffle": False}
        with make(folder, on_error="skip", **options) as loader:
            batches = [batch.clone() for batch in loader]
            list(loader)
            assert [name for name, _ in loader.skipped] == [str(path)]  # once, for two epochs
            assert re.search(reason, loader.skipped[0][1])
        runs.append(torch.cat([batch.patches for batch in batches], dim=1))
        index = torch.cat([batch.index for batch in batches]).tolist()
        assert index == [0, 1, 2, 3, 4, 6, 6, *range(7, 24)]
    torch.testing.assert_close(runs[0], runs[1], rtol=0, atol=0)


@pytest.mark.parametrize("on_error", ["raise", "skip"])
@pytest.mark.parametrize("kind", GOOD)
def test_odd_but_good_file_is_used(folder, kind, on_error):
    plant(folder, GOOD[kind])
    with make(folder, drop_last=False, on_error=on_error) as loader:
        assert len(bags(loader)) == 24
        assert loader.skipped == []


def test_exif_rotation_reaches_the_patches(folder):
    plant(folder, lambda: exif_rotated(noise(1)[0]))
    source = open_source(folder)
    assert source.decode(5).shape == (26, 20, 3)
    upright = open_source(source.decode(5)[None])
    options = {"patches": 1, "sampler": "center", "shuffle": False, "batch_size": 1}
    with make(source, indices=[5], **options) as one, make(upright, **options) as two:
        assert torch.equal(next(iter(one)).patches, next(iter(two)).patches)


def test_images_over_max_pixels_count_as_bad(folder):
    with make(folder, max_pixels=519) as loader, pytest.raises(ImageError, match=r"26 x 20 .*519"):
        list(loader)
    with make(folder, max_pixels=520) as loader:
        list(loader)


def test_bad_replacement_is_replaced_in_turn_and_subset_is_kept(tmp_path):
    files = [b"" if i in (2, 3) else jpeg(p) for i, p in enumerate(noise(6))]
    write_tar(tmp_path / "set.tar", [(f"{i}.jpg", data) for i, data in enumerate(files)])
    options = {"on_error": "skip", "shuffle": False, "batch_size": 1}
    with make(tmp_path / "set.tar", **options) as loader:
        assert [int(b.index) for b in loader] == [0, 1, 4, 4, 4, 5]
    with make(tmp_path / "set.tar", indices=[1, 2, 3], **options) as loader:
        assert [int(b.index) for b in loader] == [1, 1, 1]  # round, within the subset
    every_one_bad = pytest.raises(ImageError, match=r"none of the 2 images .* can be decoded")
    with make(tmp_path / "set.tar", indices=[2, 3], **options) as loader, every_one_bad:
        list(loader)


def test_first_bad_image_of_the_batch_is_told_whatever_thread_was_first(folder):
    for path in sorted((folder / "a").iterdir())[2:]:
        path.write_bytes(b"")
    for _ in range(5):
        loader = make(folder, shuffle=False, batch_size=24, num_threads=4)
        with loader, pytest.raises(ImageError) as error:
            next(iter(loader))
        assert error.value.name.endswith("a/06.jpg")


def test_loader_goes_on_after_an_error(folder):
    plant(folder, lambda: b"")
    with make(folder, shuffle=False, batch_size=4) as loader:
        for _ in range(2):
            with pytest.raises(ImageError):
                list(loader)
            loader.set_epoch(0)
