"""Data sets that are damaged or made to do harm: caches, labels, links, pickles, packed files."""

import gzip
import io
import json
import os
import pickle
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
from pictures import jpeg, waves, write_tar

from bagssl_fast import _C
from bagssl_fast.data import ImageError, open_source


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


def link(name: str, target: str, kind: bytes = tarfile.LNKTYPE) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


# Caches of indices


def changed(file: Path, **columns) -> None:
    with np.load(file) as saved:
        arrays = {**saved, **columns}
    np.savez(file, **arrays)


BAD_COLUMNS = {
    "offsets": np.array([0, -512]),
    "sizes": np.array([10, 2**62]),
    "labels": np.array([0, 7]),
    "name_ends": np.array([3, 999]),
    "meta": np.frombuffer(b"[" * 100_000, np.uint8),
}


@pytest.mark.parametrize("column", [*BAD_COLUMNS, "short", "float", "numbered", "zip", "zlib"])
def test_a_doubtful_cache_is_made_again(tmp_path, cache, column):
    path = write_tar(tmp_path / "set.tar", [(f"cat/{i}.jpg", jpeg(waves())) for i in range(2)])
    first = open_source(path)
    (file,) = cache.rglob("*.npz")
    good = file.read_bytes()
    if column == "short":
        changed(file, sizes=np.array([10]))
    elif column == "float":
        changed(file, offsets=np.array([0.5, 0.5]))
    elif column == "numbered":
        meta = json.dumps({"classes": ["cat"], "numbered": True}).encode()
        changed(file, meta=np.frombuffer(meta, np.uint8))
    elif column == "zip":  # a method of compression that there is not
        data = bytearray(good)
        for place in (data.find(b"PK\3\4") + 8, data.find(b"PK\1\2") + 10):
            data[place] = 77
        file.write_bytes(data)
    elif column == "zlib":
        data = bytearray(good)
        data[60:90] = bytes(30)
        file.write_bytes(data)
    else:
        changed(file, **{column: BAD_COLUMNS[column]})
    source = open_source(path)
    assert (source.classes, source.fingerprint) == (["cat"], first.fingerprint)
    assert source.read(1) == first.read(1)
    assert _C.index_tar(os.fsencode(path))["damage"] == ""


# Labels


@pytest.mark.parametrize("label", [5_000_000, 2**63 - 1, 10**30])
def test_a_label_that_no_data_set_has_costs_nothing(tmp_path, label):
    members = [("0.jpg", jpeg(waves())), ("0.cls", str(label).encode())]
    path = write_tar(tmp_path / "set.tar", members)
    with pytest.raises(ValueError, match=rf"label {label}: .*ignore them \(labels=\"none\"\)"):
        open_source(path)
    assert open_source(path, labels="none").labels is None
    if label < 2**63:
        with pytest.raises(ValueError, match=f"label {label}: "):
            open_source(np.zeros((2, 4, 4, 3), np.uint8), labels=np.array([0, label]))


def test_a_long_class_member_is_refused(tmp_path):
    members = [("0.jpg", jpeg(waves())), ("0.cls", b"7" * 5000)]
    with pytest.raises(ValueError, match=r"set\.tar.*\.cls member of 5000 bytes"):
        open_source(write_tar(tmp_path / "set.tar", members))


# Tars


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT], ids=["gnu", "pax"])
def test_hard_links_with_long_names_are_found(tmp_path, format):
    long = f"{'m' * 120}/{'k' * 90}"
    path = tmp_path / "set.tar"
    with tarfile.open(path, "w", format=format) as tar:
        for i in range(2):
            info = tarfile.TarInfo(f"{long}{i}.jpg")
            data = jpeg(waves(seed=i))
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        for i in range(2):
            tar.addfile(link(f"{long}{i}-again.jpg", f"{long}{i}.jpg"))
    source = open_source(path)
    assert len(source) == 4
    assert [source.read(i) for i in (2, 3)] == [source.read(i) for i in (0, 1)]
    assert source.name(3) == f"{path}/{long}1-again.jpg"


def test_a_hard_link_to_nothing_is_a_bad_image_with_a_name(tmp_path):
    path = tmp_path / "set.tar"
    with tarfile.open(path, "w") as tar:
        tar.addfile(link("cat/a.jpg", "cat/gone.jpg"))
        tar.addfile(link("cat/b.jpg", "cat/gone.jpg", tarfile.SYMTYPE))
    source = open_source(path)
    assert len(source) == 1
    with pytest.raises(ImageError, match=r"cat/a\.jpg: the file is empty"):
        source.decode(0)


def test_many_hard_links_are_looked_up_at_once(tmp_path):
    count, path = 20_000, tmp_path / "set.tar"
    file, links = tarfile.TarInfo("a/0.jpg"), []
    for i in range(count):
        links.append(link(f"a/{i + 1}.jpg", "a/0.jpg").tobuf(tarfile.USTAR_FORMAT))
    path.write_bytes(file.tobuf(tarfile.USTAR_FORMAT) + b"".join(links) + bytes(1024))
    index = _C.index_tar(os.fsencode(path))  # quadratic before: 200 million comparisons
    assert len(index["sizes"]) == count + 1 and index["damage"] == ""


def test_records_of_terabytes_are_damage(tmp_path):
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.XHDTYPE, 1 << 40
    path = tmp_path / "set.tar"
    path.write_bytes(info.tobuf(tarfile.GNU_FORMAT))
    os.truncate(path, 2 << 40)
    with pytest.raises(ValueError, match="PAX records of 1099511627776 bytes"):
        open_source(path)


# Pickles and packed files


class Call:
    """Pickles as a call."""

    def __init__(self, function, *arguments) -> None:
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def cifar(folder: Path, batch) -> Path:
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        (folder / name).write_bytes(pickle.dumps(batch, protocol=2))
    return folder


@pytest.mark.parametrize(
    "data",
    [
        Call(np.ndarray, (4,), "O", b"\x41" * 32),
        Call(np.ndarray, (4,), "u1", b"\x41" * 32),
        Call(np.dtype, "O"),
        np.array([None, None], object),
        np.zeros((4, 3072), np.float64),
        np.zeros((4, 100), np.uint8),
        np.zeros((5, 3072), np.uint8),
        [1, 2],
    ],
    ids=["address", "ndarray", "dtype", "objects", "floats", "size", "count", "list"],
)
def test_pickles_of_anything_but_pixels_are_refused(tmp_path, data):
    folder = cifar(tmp_path, {"data": data, "labels": [0, 1, 2, 3]})
    with pytest.raises(ValueError, match="data_batch_1: not a CIFAR batch"):
        open_source(folder)


@pytest.mark.parametrize("cut", [1, 50, 2000])
def test_damaged_pickles_are_named(tmp_path, cut):
    batch = {"data": np.zeros((4, 3072), np.uint8), "labels": [0, 1, 2, 3]}
    cifar(tmp_path, batch)
    assert len(open_source(tmp_path)) == 20
    whole = (tmp_path / "data_batch_3").read_bytes()
    (tmp_path / "data_batch_3").write_bytes(whole[cut:])
    with pytest.raises(ValueError, match="data_batch_3: not a CIFAR batch"):
        open_source(tmp_path)


@pytest.mark.parametrize("sizes", [(5, 28, 28), (5, 28), (-1, 28, 28), ()])
def test_packed_bombs_are_unpacked_as_far_as_they_are_images(tmp_path, sizes):
    raw = tmp_path / "raw"
    raw.mkdir()
    header = struct.pack(f">4B{len(sizes)}i", 0, 0, 8, len(sizes), *sizes)
    bomb = gzip.compress(header + bytes(200 << 20))
    (raw / "train-images-idx3-ubyte.gz").write_bytes(bomb)
    (raw / "train-labels-idx1-ubyte").write_bytes(struct.pack(">4Bi", 0, 0, 8, 1, 5) + bytes(5))
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte\.gz: "):
        open_source(tmp_path)


def test_a_damaged_gzip_is_named(tmp_path):
    raw = tmp_path / "raw"
    raw.mkdir()
    data = gzip.compress(struct.pack(">4B3i", 0, 0, 8, 3, 5, 28, 28) + bytes(5 * 784))
    for bad in (data[:30], data[:20] + b"\xff" * 9 + data[29:], b"no gzip"):
        (raw / "train-images-idx3-ubyte.gz").write_bytes(bad)
        (raw / "train-labels-idx1-ubyte").write_bytes(b"")
        with pytest.raises((ValueError, OSError), match=r"train-images-idx3-ubyte\.gz"):
            open_source(tmp_path)
