"""Sources written in Python: `Source.from_function`."""

import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from bags import grouped
from pictures import jpeg, noise, png, waves

from bagssl_fast.augment import Augment
from bagssl_fast.data import BagLoader, Decoding, ImageError, Order, Source, open_source

SIZES = [(24, 32), (40, 20), (17, 17), (64, 48)]
PICTURES = [waves(h, w, seed=i) for i, (h, w) in enumerate(SIZES * 3)]


def bags(source, **options) -> dict[int, torch.Tensor]:
    """The bag of each image, by its place in the data set."""
    with BagLoader(
        source, 4, 3, Augment(size=8, hflip=0.5), **grouped(num_threads=3, **options)
    ) as loader:
        return {
            int(i): batch.patches[:, b].clone()
            for batch in loader
            for b, i in enumerate(batch.index)
        }


def same(found, expected) -> bool:
    return found.keys() == expected.keys() and all(
        torch.equal(found[i], expected[i]) for i in expected
    )


@pytest.mark.parametrize("views", ["host", "device"])
def test_files_give_the_bags_of_a_folder(tmp_path, views):
    files = [png(picture) if i % 3 == 0 else jpeg(picture) for i, picture in enumerate(PICTURES)]
    for i, file in enumerate(files):
        (tmp_path / f"{i:02}.{'png' if i % 3 == 0 else 'jpg'}").write_bytes(file)
    source = Source.from_function(files.__getitem__, len(files))
    assert source.read(3) == files[3]
    assert same(bags(source, views=views), bags(tmp_path, views=views))


def test_arrays_give_the_bags_of_an_array():
    images = noise(12)
    source = Source.from_function(lambda index: images[index], 12)
    assert same(bags(source), bags(images))


def test_images_of_mixed_sizes_and_kinds():
    def read(index):
        picture = PICTURES[index]
        gray = np.ascontiguousarray(picture[:, :, 0])
        turned = np.asfortranarray(picture)  # not packed as [H, W, 3] is
        return [picture, gray, gray[:, :, None], turned, png(picture)][index % 5]

    source = Source.from_function(read, len(PICTURES))
    for i, picture in enumerate(PICTURES):
        gray = np.repeat(picture[:, :, :1], 3, axis=2)
        np.testing.assert_array_equal(source.decode(i), gray if i % 5 in (1, 2) else picture)
    assert len(bags(source)) == len(PICTURES)


def failing(index):
    if index == 5:
        raise KeyError("no such key: größe")
    return PICTURES[index]


def test_exception_is_told_with_the_name_of_the_image():
    source = Source.from_function(failing, 12, name=lambda index: f"bucket/{index}")
    text = "bucket/5: read raised KeyError: 'no such key: größe'.*skip"
    with pytest.raises(ImageError, match=text):
        bags(source)
    with pytest.raises(ImageError, match=text):
        source.decode(5)
    with pytest.raises(RuntimeError, match="KeyError"):
        source.read(5)


def test_exception_is_skipped():
    source = Source.from_function(failing, 12)
    options = {"order": Order(shuffle=False), "decoding": Decoding(on_error="skip")}
    with BagLoader(source, 4, 2, Augment(size=8), **options) as loader:
        index = torch.cat([batch.index for batch in loader])
        assert index.tolist() == [0, 1, 2, 3, 4, 6, 6, 7, 8, 9, 10, 11]
        assert loader.skipped == [("image 5", "read raised KeyError: 'no such key: größe'")]


def test_exception_whose_text_cannot_be_made():
    class Broken(Exception):
        def __str__(self):
            raise ValueError

    def read(index):
        raise Broken if index else ValueError("caf\udce9")

    source = Source.from_function(read, 2)
    with pytest.raises(ImageError, match="image 1: read raised Broken"):
        source.decode(1)
    with pytest.raises(ImageError, match=r"image 0: read raised ValueError: caf\\udce9"):
        source.decode(0)


def test_keyboard_interrupt_is_no_bad_image():
    def read(index):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Source.from_function(read, 2).decode(0)


@pytest.mark.parametrize(
    ("result", "text"),
    [
        (None, "an object of type NoneType; expected bytes"),
        ("a.jpg", "an object of type str"),
        (torch.zeros(4, 4, 3, dtype=torch.uint8), "an object of type Tensor"),
        (np.zeros((4, 4, 3), np.float32), r"an array of type float32 and shape \[4, 4, 3\]"),
        (np.zeros((3, 4, 4), np.uint8), r"an array of type uint8 and shape \[3, 4, 4\]; expected"),
        (np.zeros((4, 4, 4), np.uint8), r"shape \[4, 4, 4\]"),
        (np.zeros(16, np.uint8), r"shape \[16\]"),
        (np.zeros((0, 4, 3), np.uint8), "no pixels"),
        (b"", "empty"),
        (b"no image", "not an image"),
    ],
)
def test_what_is_no_image_is_named(result, text):
    source = Source.from_function(lambda index: result, 4)
    with pytest.raises(ImageError, match=f"image 2: .*{text}"):
        source.decode(2)
    with pytest.raises(ImageError, match=text):
        bags(source)


def test_pixels_over_the_limit_are_refused():
    source = Source.from_function(lambda index: PICTURES[index], 4)
    with pytest.raises(ImageError, match="48 x 64 pixels exceeds the limit"):
        source.decode(3, max_pixels=2000)


def test_labels_classes_names_and_fingerprint():
    source = Source.from_function(failing, 4, labels=[1, 0, 1, 1], classes=["cat", "dog"])
    assert source.labels.tolist() == [1, 0, 1, 1] and source.labels.dtype == np.int64
    assert source.classes == ["cat", "dog"] and source.name(3) == "image 3"
    assert Source.from_function(failing, 4, labels=[1, 0, 2, 1]).classes == ["0", "1", "2"]
    plain = Source.from_function(failing, 4)
    assert plain.labels is None and plain.classes is None and len(plain) == 4
    marks = [plain, source, Source.from_function(failing, 5)]
    assert len({mark.fingerprint for mark in marks}) == 3
    assert plain.fingerprint == Source.from_function(PICTURES.__getitem__, 4).fingerprint
    assert Source.from_function(failing, 4, fingerprint="v2").fingerprint == "v2"
    assert open_source(source) is source


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"length": 0}, "length must be at least 1, got 0"),
        ({"length": 2.5}, "length must be an integer, got 2.5"),
        ({"read": PICTURES}, "read must be a function of an index, got a list"),
        ({"labels": [0]}, "1 labels for 2 images"),
        ({"labels": [0, -1]}, "label -1: classes are counted from 0"),
        ({"labels": [0.0, 1.0]}, "labels must be integers, got float64"),
        ({"labels": [0, 1], "classes": ["cat"]}, "label 1 has no name: classes has 1 names"),
        ({"classes": ["cat"]}, "give labels as well"),
    ],
)
def test_wrong_argument_is_named(options, text):
    with pytest.raises(ValueError, match=text):
        Source.from_function(**{"read": failing, "length": 2, **options})


def test_read_runs_in_several_threads_at_once():
    meeting = threading.Barrier(3, timeout=20)  # breaks unless three calls wait for each other

    def read(index):
        meeting.wait()
        return PICTURES[index]

    assert len(bags(Source.from_function(read, 12))) == 12


def test_source_outlives_the_name_that_its_function_had():
    images = noise(4)
    source = Source.from_function(lambda index, images=images: images[index], 4)
    expected = images[2].copy()
    del images
    np.testing.assert_array_equal(source.decode(2), expected)


@pytest.mark.parametrize("end", ["", "sys.exit(0)", "iterator = loader = source = None"])
def test_interpreter_ends_while_threads_read(end):
    code = (
        "import sys, time\nimport numpy as np\nfrom bagssl_fast.augment import Augment\n"
        "from bagssl_fast.data import BagLoader, Source, Threads\n"
        "def read(index):\n    time.sleep(0.005)\n"
        "    return np.zeros((9 + index, 9, 3), np.uint8)\n"
        "source = Source.from_function(read, 100)\n"
        "loader = BagLoader(source, 10, 3, Augment(size=8), threads=Threads(3))\n"
        f"iterator = iter(loader)\nnext(iterator)\nprint('end', flush=True)\n{end}\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "end\n", "")
