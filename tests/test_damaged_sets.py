"""Tars and packed arrays that are damaged or made to do harm: links, records, bombs."""

import gzip
import io
import os
import struct
import tarfile
from pathlib import Path

import pytest
from pictures import jpeg, waves

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


# Packed files


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
