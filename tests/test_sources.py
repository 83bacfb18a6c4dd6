"""Sources by layout and by what can be wrong with them."""

import gzip
import os
import pickle
import struct
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import jpeg, waves, write_tar
from PIL import Image

from bagssl_fast import _C
from bagssl_fast.data import ImageError, open_source
from bagssl_fast.data import demo as demo_module


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """Every test has a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


# Folders


def test_folder_tree_names_its_classes_by_the_parent_directory(tmp_path):
    for i, name in enumerate(["dog/b.jpg", "dog/a.png", "cat/x.jpeg", "cat/deep/owl/y.JPG"]):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(waves(seed=i)).save(tmp_path / name)
    (tmp_path / "cat/notes.txt").write_text("no image")
    (tmp_path / "cat/.hidden.jpg").write_bytes(b"")
    source = open_source(tmp_path)
    assert source.classes == ["cat", "dog", "owl"]
    names = [source.name(i).removeprefix(f"{tmp_path}/") for i in range(len(source))]
    assert names == ["cat/x.jpeg", "cat/deep/owl/y.JPG", "dog/a.png", "dog/b.jpg"]
    assert source.labels.tolist() == [0, 2, 1, 1]
    np.testing.assert_array_equal(source.decode(2), waves(seed=1))


def test_flat_folder_has_no_labels(tmp_path):
    (tmp_path / "a.jpg").write_bytes(jpeg(waves()))
    source = open_source(str(tmp_path))
    assert source.labels is None and source.classes is None and len(source) == 1


def test_links_in_a_circle_end(tmp_path):
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat/a.jpg").write_bytes(jpeg(waves()))
    (tmp_path / "cat/up").symlink_to(tmp_path)
    assert len(open_source(tmp_path)) == 1


def test_folder_in_the_place_of_a_file_is_named(tmp_path):
    (tmp_path / "a.jpg").write_bytes(jpeg(waves()))
    source = open_source(tmp_path)
    (tmp_path / "a.jpg").unlink()
    (tmp_path / "a.jpg").mkdir()
    with pytest.raises(ImageError, match=r"a\.jpg: not a regular file"):
        source.decode(0)


def test_missing_labels_are_an_error_or_left_out(tmp_path):
    (tmp_path / "cat").mkdir()
    for name in ("cat/a.jpg", "stray.jpg"):
        (tmp_path / name).write_bytes(jpeg(waves()))
    with pytest.raises(ValueError, match=r"1 of 2 images have no label.*stray\.jpg.*skip"):
        open_source(tmp_path)
    with pytest.warns(UserWarning, match=r"stray\.jpg"):
        source = open_source(tmp_path, on_error="skip")
    assert len(source) == 1 and source.name(0).endswith("cat/a.jpg")


@pytest.mark.parametrize("name", ["größe/猫 1.jpg", "c\udcffd/\udce9.jpg"], ids=["utf8", "bytes"])
def test_names_in_any_encoding(tmp_path, name):
    (tmp_path / name).parent.mkdir()
    (tmp_path / name).write_bytes(jpeg(waves()))
    (tmp_path / "other").mkdir()
    (tmp_path / "other/x.jpg").write_bytes(b"no image")
    source = open_source(tmp_path)
    place = next(i for i in range(2) if "other" not in source.name(i))
    assert source.decode(place).shape == (24, 32, 3)
    source.name(place).encode()  # can be printed
    with pytest.raises(ImageError, match=r"other/x\.jpg: not an image"):
        source.decode(1 - place)


@pytest.mark.parametrize(
    ("data", "error", "text"),
    [
        ("nowhere.tar", FileNotFoundError, "no such file or folder.*demo"),
        ("empty", ValueError, "no image files"),
        ("text.txt", ValueError, "not a data set of a known kind"),
        ("packed.tar.gz", ValueError, "unpack it first"),
        ("empty:test", ValueError, "only demo, CIFAR, MNIST and .npz files"),
    ],
)
def test_what_is_no_data_set_is_named(tmp_path, data, error, text):
    (tmp_path / "empty").mkdir()
    for name in ("text.txt", "packed.tar.gz"):
        (tmp_path / name).write_text("words")
    with pytest.raises(error, match=text):
        open_source(tmp_path / data)


def test_other_arguments_are_refused():
    with pytest.raises(ValueError, match="cannot open a float"):
        open_source(3.5)
    with pytest.raises(ValueError, match="on_error must be one of raise, skip, got 'ignore'"):
        open_source("demo", on_error="ignore")
    with pytest.raises(ValueError, match="empty list"):
        open_source([])


# Tars


@pytest.mark.parametrize(
    "format",
    [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT],
    ids=["ustar", "gnu", "pax"],
)
def test_tar_of_a_folder_tree(tmp_path, format):
    long = "n" * 90
    names = ["./cat/a.jpg", f"{long}/{long}.jpg", "dog/ü.jpg", "readme.txt"]
    if format != tarfile.USTAR_FORMAT:
        names.append(f"{'m' * 300}/{'k' * 200}.png")
    files = [(name, jpeg(waves(seed=i))) for i, name in enumerate(names)]
    source = open_source(write_tar(tmp_path / "set.tar", files, format))
    images = [(name, data) for name, data in files if name != "readme.txt"]
    assert len(source) == len(images)
    for i, (name, data) in enumerate(images):
        assert source.name(i) == f"{tmp_path}/set.tar/{name}"
        assert source.read(i) == data
        assert source.classes[source.labels[i]] == name.split("/")[-2]


def test_tar_of_a_flat_folder_has_no_labels(tmp_path):
    source = open_source(write_tar(tmp_path / "set.tar", [("./a.jpg", jpeg(waves()))]))
    assert source.labels is None


def test_tar_hard_links_and_folders(tmp_path):
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat/a.jpg").write_bytes(jpeg(waves()))
    os.link(tmp_path / "cat/a.jpg", tmp_path / "cat/b.jpg")
    (tmp_path / "cat/c.jpg").symlink_to("a.jpg")
    with tarfile.open(tmp_path / "set.tar", "w") as tar:
        tar.add(tmp_path / "cat", "cat")
    source = open_source(tmp_path / "set.tar")
    assert len(source) == 2  # the symbolic link is passed over
    assert source.read(0) == source.read(1)


def test_webdataset_shards_in_every_way_of_naming_them(tmp_path):
    for shard in range(2):
        members = []
        for i in range(3):
            key = f"{shard:03d}{i:03d}"
            members += [(f"{key}.jpg", jpeg(waves(seed=i))), (f"{key}.cls", str(5 * i).encode())]
            members.append((f"{key}.json", b"{}"))
        write_tar(tmp_path / f"s-{shard}.tar", members)
    paths = [tmp_path / "s-0.tar", tmp_path / "s-1.tar"]
    for data in (paths, tmp_path, f"{tmp_path}/s-*.tar"):
        source = open_source(data)
        assert source.labels.tolist() == [0, 5, 10] * 2
        assert source.classes == [str(i) for i in range(11)]
        assert source.name(4) == f"{tmp_path}/s-1.tar/001001.jpg"


def test_webdataset_classes_may_be_words(tmp_path):
    members = [
        ("0.jpg", jpeg(waves())),
        ("0.cls", b"owl\n"),
        ("1.jpg", jpeg(waves())),
        ("1.cls", b"cat"),
    ]
    source = open_source(write_tar(tmp_path / "set.tar", members))
    assert source.classes == ["cat", "owl"] and source.labels.tolist() == [1, 0]


def test_webdataset_missing_class_member(tmp_path):
    members = [("a.jpg", jpeg(waves())), ("a.cls", b"1"), ("b.jpg", jpeg(waves()))]
    path = write_tar(tmp_path / "set.tar", members)
    with pytest.raises(ValueError, match=r"no label.*b\.jpg"):
        open_source(path)
    with pytest.warns(UserWarning, match="left out"):
        assert len(open_source(path, on_error="skip")) == 1


def test_truncated_tar(tmp_path):
    path = write_tar(tmp_path / "set.tar", [(f"a/{i}.jpg", jpeg(waves(64, 64))) for i in range(4)])
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"set\.tar: truncated: 'a/\d\.jpg' wants \d+ bytes.*skip"):
        open_source(path)
    with pytest.warns(UserWarning, match="truncated"):
        source = open_source(path, on_error="skip")
    assert 1 <= len(source) < 4
    source.decode(len(source) - 1)


def test_damaged_tar_header(tmp_path):
    files = [(f"a/{i}.jpg", jpeg(waves())) for i in range(2)]
    path = write_tar(tmp_path / "set.tar", files, tarfile.GNU_FORMAT)
    data = bytearray(path.read_bytes())
    second = 512 + -(-len(files[0][1]) // 512) * 512
    data[second + 3] ^= 0x55
    path.write_bytes(data)
    with pytest.raises(ValueError, match=rf"bad header \(wrong checksum\), at byte {second}"):
        open_source(path)


@pytest.mark.parametrize("contents", [b"", b"words", bytes(range(256)) * 8], ids=len)
@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_what_is_no_tar(tmp_path, contents, on_error):
    path = tmp_path / "set.tar"
    path.write_bytes(contents)
    with pytest.raises(ValueError, match=r"set\.tar: (no|not a) tar archive"):
        open_source(path, on_error=on_error)


def test_tar_fuzzed_headers_do_not_crash(tmp_path):
    path = write_tar(
        tmp_path / "set.tar", [(f"ä/{'n' * 120}{i}.jpg", b"x" * 700) for i in range(3)]
    )
    clean = path.read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(200):
        data = bytearray(clean)
        for place in rng.integers(0, len(data), 4):
            data[place] = rng.integers(0, 256)
        # Repaired checksums let damage through to what stands behind them.
        for block in range(0, len(data) - 511, 512):
            header = data[block : block + 512]
            header[148:156] = b" " * 8
            data[block + 148 : block + 156] = b"%06o\0 " % sum(header)
        path.write_bytes(data[: rng.integers(1, len(data) + 1)])
        _C.index_tar(os.fsencode(path))


def test_tar_index_is_cached_away_from_the_data(tmp_path):
    shards = tmp_path / "data"
    shards.mkdir()
    path = write_tar(shards / "set.tar", [("cat/a.jpg", jpeg(waves()))])
    first = open_source(path)
    assert os.listdir(shards) == ["set.tar"]
    cached = list(Path(os.environ["XDG_CACHE_HOME"]).rglob("*.npz"))
    assert len(cached) == 1
    again = open_source(path)
    assert (again.name(0), again.classes, again.fingerprint) == (
        first.name(0),
        first.classes,
        first.fingerprint,
    )
    whole = cached[0].read_bytes()
    for damaged in (b"damaged", whole[:-100], b""):
        cached[0].write_bytes(damaged)
        assert open_source(path).classes == ["cat"]
    time.sleep(0.01)
    write_tar(path, [("dog/a.jpg", jpeg(waves()))])
    assert open_source(path).classes == ["dog"]


def test_cache_that_cannot_be_written_is_no_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert len(open_source(write_tar(tmp_path / "set.tar", [("c/a.jpg", jpeg(waves()))]))) == 1


def test_opening_50000_files_the_second_time_is_quick(tmp_path):
    # 50,000 headers and their one block of contents, written without tarfile's 10 seconds.
    count, path = 50_000, tmp_path / "set.tar"
    info = tarfile.TarInfo("")
    info.size = 100
    blocks = np.zeros((count, 1024), np.uint8)
    blocks[:, :512] = np.frombuffer(info.tobuf(tarfile.USTAR_FORMAT), np.uint8)
    names = b"".join(b"%d/%08d.jpg" % (i % 10, i) for i in range(count))
    blocks[:, :14] = np.frombuffer(names, np.uint8).reshape(count, 14)
    blocks[:, 148:156] = ord(" ")
    sums = [b"%06o\0 " % total for total in blocks[:, :512].sum(1, dtype=np.int64)]
    blocks[:, 148:156] = np.frombuffer(b"".join(sums), np.uint8).reshape(count, 8)
    path.write_bytes(blocks.tobytes() + bytes(1024))

    first = open_source(path)
    begin = time.perf_counter()
    source = open_source(path)
    assert time.perf_counter() - begin < 2
    assert len(source) == count and source.fingerprint == first.fingerprint
    assert source.name(49_999) == f"{path}/9/00049999.jpg" and source.labels[49_999] == 9


# Arrays


def test_arrays_in_memory_are_not_copied():
    images = np.stack([waves(seed=i) for i in range(3)])
    source = open_source(images, labels=[0, 2, 1])
    images[1, 0, 0] = 77
    np.testing.assert_array_equal(source.decode(1), images[1])
    assert source.classes == ["0", "1", "2"] and source.name(1) == "array[1]"
    tensor = open_source(torch.from_numpy(images))
    np.testing.assert_array_equal(tensor.decode(2), images[2])


def test_array_outlives_the_name_it_had():
    source = open_source(np.full((2, 4, 4, 3), 9, np.uint8))
    assert (source.decode(1) == 9).all()


def test_gray_arrays_become_rgb():
    images = np.random.default_rng(0).integers(0, 256, (2, 5, 6), np.uint8)
    for source in (open_source(images), open_source(images[..., None])):
        np.testing.assert_array_equal(source.decode(1), np.repeat(images[1][..., None], 3, 2))


def test_npy_and_npz(tmp_path):
    images = np.stack([waves(seed=i) for i in range(3)])
    np.save(tmp_path / "a.npy", images)
    np.savez(tmp_path / "b.npz", images=images, labels=[1, 0, 1])
    np.savez(tmp_path / "c.npz", x=images)
    assert open_source(tmp_path / "a.npy").labels is None
    labeled = open_source(tmp_path / "b.npz")
    assert labeled.labels.tolist() == [1, 0, 1]
    np.testing.assert_array_equal(labeled.decode(2), images[2])
    with pytest.raises(ValueError, match=r"c\.npz: no array 'images'"):
        open_source(tmp_path / "c.npz")
    (tmp_path / "d.npy").write_bytes((tmp_path / "a.npy").read_bytes()[:500])
    with pytest.raises(ValueError, match=r"d\.npy"):
        open_source(tmp_path / "d.npy")


@pytest.mark.parametrize(
    ("images", "labels", "text"),
    [
        (np.zeros((2, 4, 4, 3), np.float32), None, "must be uint8 .* got float32"),
        (np.zeros((2, 3, 4, 4), np.uint8), None, "transpose"),
        (np.zeros((0, 4, 4, 3), np.uint8), None, "no images"),
        (np.zeros((2, 4, 4, 3), np.uint8), [1], "1 labels for 2 images"),
        (np.zeros((2, 4, 4, 3), np.uint8), [0, -1], "label -1"),
    ],
)
def test_arrays_that_do_not_fit(images, labels, text):
    with pytest.raises(ValueError, match=text):
        open_source(images, labels=labels)


def test_torchvision_cifar_on_disk(tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    rng = np.random.default_rng(0)
    data = rng.integers(0, 256, (6, 4, 3072), np.uint8)
    for i, name in enumerate([*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"]):
        batch = {"data": data[i], "labels": [i, 1, 2, 3]}
        (folder / name).write_bytes(pickle.dumps(batch, protocol=2))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    source = open_source(tmp_path)
    assert len(source) == 20 and source.classes == list("abcdefghij")
    assert source.labels[:4].tolist() == [0, 1, 2, 3]
    np.testing.assert_array_equal(
        source.decode(5), data[1, 1].reshape(3, 32, 32).transpose(1, 2, 0)
    )
    assert len(open_source(f"{folder}:test")) == 4


def test_pickles_that_run_code_are_refused(tmp_path):
    class Attack:
        def __reduce__(self):
            return os.system, ("true",)

    (tmp_path / "data_batch_1").write_bytes(pickle.dumps({"data": Attack()}))
    with pytest.raises(ValueError, match=r"data_batch_1: not a CIFAR batch.*system"):
        open_source(tmp_path)


def test_torchvision_mnist_on_disk(tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    images = np.random.default_rng(0).integers(0, 256, (5, 28, 28), np.uint8)
    header = struct.pack(">4B3i", 0, 0, 8, 3, 5, 28, 28)
    (raw / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(header + images.tobytes()))
    labels = struct.pack(">4Bi", 0, 0, 8, 1, 5) + bytes([3, 1, 4, 1, 5])
    (raw / "train-labels-idx1-ubyte").write_bytes(labels)
    source = open_source(tmp_path)
    assert source.labels.tolist() == [3, 1, 4, 1, 5]
    np.testing.assert_array_equal(source.decode(3)[..., 1], images[3])
    (raw / "train-labels-idx1-ubyte").write_bytes(labels[:-1])
    with pytest.raises(ValueError, match="truncated"):
        open_source(tmp_path)


# Demo


def test_demo_splits_have_no_pixel_in_common():
    train, test = open_source("demo"), open_source("demo:test")
    assert len(train.classes) == len(demo_module.PHOTOGRAPHS) == len(test.classes)
    assert np.bincount(train.labels).tolist() == [demo_module.TRAIN_TILES] * len(train.classes)
    # A photograph whose every pixel is another number.
    photograph = np.arange(480 * 480 * 3, dtype=np.uint32).reshape(480, 480, 3)
    places = [
        set(np.unique(demo_module._cut_tiles(photograph, 300, 5, is_test)))
        for is_test in (False, True)
    ]
    assert not places[0] & places[1]


def test_npz_with_splits_as_medmnist_has_them(tmp_path):
    path = tmp_path / "bloodmnist.npz"
    train, test = np.zeros((5, 8, 8, 3), np.uint8), np.ones((2, 8, 8, 3), np.uint8)
    np.savez(
        path,
        train_images=train,
        train_labels=np.arange(5)[:, None],
        test_images=test,
        test_labels=np.array([[1], [0]]),
    )
    assert len(open_source(path)) == len(open_source(f"{path}:train")) == 5
    held_out = open_source(f"{path}:test")
    assert len(held_out) == 2 and held_out.labels.tolist() == [1, 0]
    np.savez(tmp_path / "plain.npz", images=train)
    with pytest.raises(ValueError, match="no array 'test_images'"):
        open_source(f"{tmp_path / 'plain.npz'}:test")


def test_demo_is_quick_and_always_the_same():
    begin = time.process_time()
    source = open_source("demo:train")
    assert time.process_time() - begin < 2
    assert source.fingerprint == open_source("demo").fingerprint


def test_demo_without_scikit_image(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install scikit-image"):
        open_source("demo")


def test_importing_without_the_extension_says_what_to_do():
    code = (
        "import sys; sys.modules['bagssl_fast._C'] = None\n"
        "try:\n    import bagssl_fast.data\n"
        "except ImportError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.count("\n") == 1
    assert "C++ extension cannot be loaded" in done.stdout and "pip install -e ." in done.stdout
