"""`python -m bagssl_fast.pack`: what is packed can be opened again, with its labels and pixels."""

import io
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bagssl_fast.data import BagLoader, ImageError, open_source, packing
from bagssl_fast.data.packing import pack
from bagssl_fast.pack import main, parse_size


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    waves = np.stack([np.sin(y / (9 + c) + seed) + np.cos(x / (8 + c)) for c in range(3)], -1)
    return (128 + 60 * waves).astype(np.uint8)


@pytest.fixture
def folder(tmp_path) -> Path:
    """Six images of 60 x 90 and, last of each class, one of 20 x 30; one JPEG name occurs twice."""
    for i in range(6):
        size = (20, 30) if i % 3 == 2 else (60, 90)
        path = tmp_path / "set" / ("owl", "äffchen")[i // 3] / ("a.png", "a.jpg", "b.jpg")[i % 3]
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(*size, i)).save(path, quality=95)
    return tmp_path / "set"


def test_packed_folder_keeps_labels_order_and_looks(folder, tmp_path):
    source = open_source(folder)
    report = pack(source, tmp_path / "out.tar", short_side=40, quality=95)
    packed = open_source(tmp_path / "out.tar")
    assert report.images == len(packed) == 6 and report.paths == [tmp_path / "out.tar"]
    assert packed.classes == source.classes == ["owl", "äffchen"]
    assert packed.labels.tolist() == source.labels.tolist()
    names = [packed.name(i).split("/", tmp_path.as_posix().count("/") + 2)[-1] for i in range(6)]
    assert len(set(names)) == 6 and names[0] in ("owl/a.jpg", "owl/a-0.jpg")
    for i in range(6):
        whole = Image.fromarray(source.decode(i))
        height = min(40, whole.height)
        expected = whole.resize((height * 3 // 2, height), Image.Resampling.LANCZOS)
        difference = np.abs(packed.decode(i).astype(int) - np.asarray(expected))
        assert difference.mean() < 2.5


def test_packing_never_upscales_and_keeps_small_jpegs_as_they_are(folder, tmp_path):
    source = open_source(folder)
    report = pack(source, tmp_path / "out.tar", short_side=256)
    packed = open_source(tmp_path / "out.tar")
    assert report.kept == 4  # the JPEGs; the PNGs are encoded at their size
    assert [packed.decode(i).shape for i in range(6)] == [source.decode(i).shape for i in range(6)]
    assert sum(packed.read(i) == source.read(i) for i in range(6)) == 4


def test_exif_rotated_images_stay_upright(tmp_path):
    (tmp_path / "set").mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    for name, size in (("big", (60, 90)), ("small", (20, 30))):
        Image.fromarray(picture(*size)).save(tmp_path / "set" / f"{name}.jpg", exif=exif)
    pack(open_source(tmp_path / "set"), tmp_path / "out.tar", short_side=30)
    packed = open_source(tmp_path / "out.tar")
    assert [packed.decode(i).shape for i in range(2)] == [(45, 30, 3), (30, 20, 3)]


def test_arrays_and_numbered_classes(tmp_path):
    images = np.stack([picture(32, 32, i) for i in range(12)])
    # Twelve classes named by numbers: "10" sorts before "2", so folders would renumber them.
    source = open_source(images, labels=np.arange(12))
    pack(source, tmp_path / "out.tar")
    packed = open_source(tmp_path / "out.tar")
    assert packed.labels.tolist() == list(range(12))
    with tarfile.open(tmp_path / "out.tar") as tar:
        assert tar.getnames()[:2] == ["00000000.jpg", "00000000.cls"]
    pack(open_source(images), tmp_path / "flat.tar")
    assert open_source(tmp_path / "flat.tar").labels is None


def test_shards(folder, tmp_path):
    report = pack(open_source(folder), tmp_path / "out.tar", short_side=0, shard_size=8000)
    assert len(report.paths) > 1
    assert [path.name for path in report.paths][:2] == ["out-000000.tar", "out-000001.tar"]
    assert all(path.stat().st_size < 30_000 for path in report.paths)
    packed = open_source(f"{tmp_path}/out-*.tar")
    assert packed.labels.tolist() == [0, 0, 0, 1, 1, 1]


def test_same_file_for_any_number_of_threads(folder, tmp_path):
    for threads in (1, 4):
        pack(open_source(folder), tmp_path / f"{threads}.tar", num_threads=threads, short_side=24)
    assert (tmp_path / "1.tar").read_bytes() == (tmp_path / "4.tar").read_bytes()


@pytest.mark.parametrize("damage", [b"", b"words", None], ids=["empty", "text", "truncated"])
def test_bad_files_stop_or_are_left_out(folder, tmp_path, damage):
    path = folder / "owl" / "b.jpg"  # small: it would be stored as it is
    path.write_bytes(path.read_bytes()[:-300] if damage is None else damage)
    with pytest.raises(ImageError, match=r"owl/b\.jpg"):
        pack(open_source(folder), tmp_path / "out.tar")
    assert not [file for file in tmp_path.iterdir() if file.is_file()]  # nothing half done
    report = pack(open_source(folder), tmp_path / "out.tar", on_error="skip")
    assert report.images == 5 and report.skipped[0][0] == str(path)


def test_an_old_file_stays_until_the_new_one_is_whole(folder, tmp_path, monkeypatch):
    (tmp_path / "out.tar").write_bytes(b"old")

    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(packing, "encode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pack(open_source(folder), tmp_path / "out.tar")
    assert (tmp_path / "out.tar").read_bytes() == b"old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.tar", "set"]


def test_command_line(folder, tmp_path):
    command = [sys.executable, "-m", "bagssl_fast.pack", str(folder), str(tmp_path / "out.tar")]
    done = subprocess.run([*command, "--short-side", "24"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("6 images (2 as they were, 0 left out)")
    with BagLoader(tmp_path / "out.tar", 2, 2) as loader:
        assert len(list(loader)) == 3


def test_command_line_errors_are_one_line(folder, tmp_path, capsys):
    assert main([str(tmp_path / "gone"), str(tmp_path / "out.tar")]) == 1
    assert "no such file" in capsys.readouterr().err
    (folder / "owl" / "b.jpg").write_bytes(b"")
    assert main([str(folder), str(tmp_path / "out.tar")]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert main([str(folder), str(tmp_path / "out.tar"), "--on-error", "skip"]) == 0
    assert "left out: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"destination": "out.zip"}, "must end in .tar"),
        ({"quality": 0}, "quality must be from 1 to 100, got 0"),
        ({"short_side": -1}, "short_side must be at least 0, got -1"),
        ({"shard_size": -1}, "shard_size must be at least 0, got -1"),
        ({"layout": "lmdb"}, "layout must be one of auto, folder, webdataset, got 'lmdb'"),
        ({"on_error": "ignore"}, "on_error must be one of raise, skip, got 'ignore'"),
    ],
)
def test_wrong_argument_is_named(tmp_path, options, text):
    source = open_source(picture(8, 8)[None])
    destination = tmp_path / options.pop("destination", "out.tar")
    with pytest.raises(ValueError, match=text):
        pack(source, destination, **options)


def test_missing_destination_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="make it first"):
        pack(open_source(picture(8, 8)[None]), tmp_path / "gone" / "out.tar")


def test_sizes():
    assert [parse_size(text) for text in ("7", "500M", "2GB", "1.5k")] == [
        7,
        5 * 10**8,
        2 * 10**9,
        1500,
    ]
    with pytest.raises(Exception, match="not a size"):
        parse_size("big")


def test_files_are_ordinary_tars_of_jpegs(folder, tmp_path):
    pack(open_source(folder), tmp_path / "out.tar", short_side=24)
    with tarfile.open(tmp_path / "out.tar") as tar:
        for member in tar:
            data = tar.extractfile(member).read()
            assert Image.open(io.BytesIO(data)).format == "JPEG"
