"""What one image or argument may cost: bombs, memory that is kept, CPUs, reads out of bounds."""

import io
import os
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from bags import make, write_folder
from pictures import exif_rotated, jpeg, noise, png, waves
from PIL import Image

from bagssl_fast import _C
from bagssl_fast.data import ImageError, open_source
from bagssl_fast.data.decoding import MAX_PIXELS, decode_image

needs_native = pytest.mark.skipif(not _C.HAS_JPEG, reason="built without libjpeg-turbo")


def scan_bomb(scans: int, side: int = 2000) -> bytes:
    """A progressive JPEG of a few bytes per scan, each of which passes over all its blocks."""
    file = jpeg(np.full((side, side), 128, np.uint8), progressive=True)
    # The last scan refines; an empty one like it: no coefficient changes, in runs of 32,767 blocks.
    start = file.rindex(b"\xff\xda")
    body = file[:start]
    last = file[start:-2]
    return body + last * scans + b"\xff\xd9"


def segment(marker: int, contents: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(contents) + 2) + contents


@needs_native
def test_a_jpeg_of_thousands_of_scans_is_refused_at_once():
    bomb = scan_bomb(4000)
    begin = time.process_time()
    with pytest.raises(RuntimeError, match=r"more than 500 scans \(raise max_scans\)"):
        _C.decode(bomb, None, MAX_PIXELS)
    limited = time.process_time() - begin
    begin = time.process_time()
    with pytest.raises(RuntimeError, match="more than 5 scans"):
        _C.decode(bomb, None, MAX_PIXELS, max_scans=5)
    assert time.process_time() - begin < limited
    few = scan_bomb(3)
    _C.decode(few, None, MAX_PIXELS, max_scans=few.count(b"\xff\xda"))
    with pytest.raises(RuntimeError, match="scans"):
        _C.decode(few, None, MAX_PIXELS, max_scans=few.count(b"\xff\xda") - 1)
    good = jpeg(waves(90, 130), progressive=True)
    np.testing.assert_array_equal(  # the decoder is as new after a refusal
        _C.decode(good, None, MAX_PIXELS, max_scans=64), _C.decode(good, None, MAX_PIXELS)
    )


@pytest.mark.parametrize("side", [1, 40])
def test_scans_are_counted_as_the_decoder_does(side):
    """Where simplejpeg decodes, nothing else limits them; those of a thumbnail do not count."""
    pixels = waves(side, side)
    files = [jpeg(pixels), jpeg(pixels, progressive=True), scan_bomb(7, side)]
    marks = b"\xff\xd8\xff\xda" * 9
    files += [file[:2] + segment(0xE1, marks) + file[2:] for file in files]
    files += [file + marks for file in files]
    for file in files:
        scans = _C.count_scans(file)
        assert scans >= 1
        _C.decode(file, decode_image, MAX_PIXELS, max_scans=scans)
        if scans > 1:
            with pytest.raises(RuntimeError, match=f"more than {scans - 1} scans"):
                _C.decode(file, decode_image, MAX_PIXELS, max_scans=scans - 1)
    for damaged in (b"", b"\xff", b"\xff\xd8\xff", b"\xff\xd8\xff\xda", b"\xff\xd8\xff\xda\0"):
        assert _C.count_scans(damaged) <= 1


@needs_native
def test_scans_and_bytes_are_options_of_the_loader(tmp_path):
    folder = write_folder(tmp_path)
    path = sorted((folder / "a").iterdir())[5]
    path.write_bytes(scan_bomb(20, 200) + bytes(9999))
    options = {"shuffle": False, "on_error": "skip"}
    with make(folder, max_scans=15, **options) as loader:
        list(loader)
        assert loader.skipped == [(str(path), "a JPEG of more than 15 scans (raise max_scans)")]
    with make(folder, max_scans=100, **options) as loader:
        list(loader)
        assert loader.skipped == []
    size = path.stat().st_size
    with make(folder, max_bytes=size - 1, **options) as loader:
        list(loader)
        reason = f"a file of {size} bytes exceeds the limit of {size - 1} bytes (raise max_bytes)"
        assert (str(path), reason) in loader.skipped


@pytest.mark.parametrize("name", ["max_bytes", "max_scans", "max_inflation"])
def test_limits_are_checked(name):
    with pytest.raises(ValueError, match=f"{name} must be"):
        make(noise(), **{name: 0})


def test_a_sparse_file_of_terabytes_is_a_bad_image(tmp_path):
    folder = write_folder(tmp_path)
    path = sorted((folder / "a").iterdir())[5]
    os.truncate(path, 8 << 40)
    text = "a file of 8796093022208 bytes exceeds the limit"
    with make(folder, drop_last=False) as loader, pytest.raises(ImageError, match=text):
        list(loader)
    with make(folder, drop_last=False, on_error="skip") as loader:
        list(loader)
        assert [name for name, _ in loader.skipped] == [str(path)]
    with pytest.raises(ImageError, match=text):
        loader.source.decode(5)


def test_a_function_that_returns_a_large_file_is_refused():
    from bagssl_fast.data import Source

    source = Source.from_function(lambda index: jpeg(noise(1)[0]) + bytes(9999), 24)
    with make(source, max_bytes=9999) as loader, pytest.raises(ImageError, match="max_bytes"):
        list(loader)


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_exif_behind_xmp_is_found(orientation):
    upright = waves(90, 130)
    file = exif_rotated(upright, orientation)
    xmp = segment(0xE1, b"http://ns.adobe.com/xap/1.0/\x00<x:xmpmeta/>")
    before = file[:2] + xmp + file[2:]
    image = Image.open(io.BytesIO(before))
    expected = (image.width, image.height) if orientation < 5 else (image.height, image.width)
    np.testing.assert_array_equal(
        _C.decode(before, decode_image, MAX_PIXELS), _C.decode(file, decode_image, MAX_PIXELS)
    )
    assert _C.decode(before, decode_image, MAX_PIXELS).shape[1::-1] == expected


MEMORY = """
import gc, os, sys
import numpy as np
sys.path[:0] = {path!r}
from bags import make
from bagssl_fast.data import open_source

def megabytes():
    gc.collect()
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE") >> 20

source = open_source({folder!r})
options = dict(batch_size=1, patches=1, num_threads=4, shuffle=False)
with make(source, indices=list(range(4, 24)), **options) as loader:
    list(loader)
with make(source, **options) as loader:
    list(loader)
    before = megabytes()
    loader.set_epoch(0)
    iterator = iter(loader)
    list(iterator)
    print(before, megabytes())
"""


@pytest.mark.parametrize("kind", ["jpg", "png", "progressive"])
def test_memory_of_large_images_is_given_back(tmp_path, kind):
    for i, pixels in enumerate(noise(24)):
        if i < 4:  # 48 MB of pixels each
            pixels = np.zeros((4000, 4000, 3), np.uint8)
        data = png(pixels) if kind == "png" else jpeg(pixels, progressive=kind == "progressive")
        (tmp_path / f"{i:02d}.{'png' if kind == 'png' else 'jpg'}").write_bytes(data)
    code = MEMORY.format(path=[str(Path(__file__).parent)], folder=str(tmp_path))
    # glibc would keep what it once had; the size from which it asks for pages is set to stay.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    without, after = map(int, done.stdout.split())
    assert after - without < 60, done.stdout
    assert without < 800  # 4 threads, 48 MB each, on top of torch


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.mark.parametrize(
    ("groups", "files", "cpus"),
    [
        ("0::/\n", {"cpu.max": "800000 100000\n"}, 8),
        ("0::/\n", {"cpu.max": "max 100000\n"}, 0),
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000", "a/cpu.max": "150000 100000"}, 2),
        ("0::/gone/b\n", {"cpu.max": "50000 100000"}, 1),
        (
            "9:memory:/x\n4:cpu,cpuacct:/job\n",
            {"cpu,cpuacct/job/cpu.cfs_quota_us": "400000",
             "cpu,cpuacct/job/cpu.cfs_period_us": "100000"},
            4,
        ),
        (
            "1:cpu:/\n0::/\n",
            {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"},
            0,
        ),
        ("1:cpuset:/\n", {"cpuset/cpu.cfs_quota_us": "100000"}, 0),
        ("nonsense\n0::\n", {"cpu.max": "-5 0"}, 0),
        ("", {}, 0),
    ],
)  # fmt: skip
def test_cpus_of_a_container_are_its_quota(tmp_path, groups, files, cpus):
    write(tmp_path / "proc/self/cgroup", groups)
    for name, text in files.items():
        write(tmp_path / "sys/fs/cgroup" / name, text)
    assert _C.quota_cpus(str(tmp_path)) == cpus
    assert _C.quota_cpus(str(tmp_path / "nowhere")) == 0
    assert 1 <= _C.available_cpus() <= len(os.sched_getaffinity(0))


# Reads out of bounds


@pytest.mark.parametrize("denominator", [0, -1, 3, 16])
def test_denominators_are_checked(denominator):
    with pytest.raises(ValueError, match=f"denominator must be 1, 2, 4 or 8, got {denominator}"):
        _C.decode(jpeg(waves()), None, MAX_PIXELS, None, denominator)


def test_boxes_beyond_a_float_s_integers_are_inside_or_refused():
    side = (1 << 24) + 3  # as a float32 it is one more
    image = np.zeros((1, side, 3), np.uint8)
    params = np.zeros((1, 1, 16), np.float32)
    params[..., :4] = (0, 1 << 24, 1, 4)  # top, left, height, width: one column too far
    params[..., 4:] = _C.center_views(np.array([[8, 8]]))[0, 0, 4:]
    with pytest.raises(ValueError, match="no box of whole pixels inside"):
        _C.patch_views([image], params, size=(1, 4), blur_kernel=1)
    params[..., 3] = 3
    _C.patch_views([image], params, size=(1, 3), blur_kernel=1)


@pytest.mark.parametrize(
    ("lines", "stride", "offset", "text"),
    [
        (3, -8, 20, "stride is -8"),
        (3, 2**62, 0, "stride is"),
        (3, 8, -1, "outside of the pixels"),
        (3, 46, 0, "outside of the pixels"),
        (3, 8, 2**62, "outside of the pixels"),
        (2**62, 0, 0, "whole lines"),
        (0, 8, 0, "whole lines"),
    ],
)
def test_patch_rows_are_cut_within_their_pixels(lines, stride, offset, text):
    pixels, out = np.zeros(100, np.uint8), np.zeros(30, np.float32)
    offsets = np.array([offset])
    with pytest.raises(ValueError, match=text):
        _C.patch_rows(pixels, offsets=offsets, lines=lines, stride=stride, center=0, out=out)
    last = np.array([0])  # whose third line ends with the pixels
    _C.patch_rows(pixels, offsets=last, lines=3, stride=45, center=0, out=out)


def test_array_files_are_read_within_their_end(tmp_path):
    path = tmp_path / "set.bin"
    path.write_bytes(bytes(1000))
    name = os.fsencode(path)
    assert len(_C.ArrayFileSource(name, 100, (3, 10, 10, 3))) == 3
    for offset, shape in ((101, (3, 10, 10, 3)), (-1, (1, 1, 1, 1)), (0, (2**62, 2**40, 1, 3))):
        with pytest.raises(ValueError, match=r"bytes of images|too many pixels"):
            _C.ArrayFileSource(name, offset, shape)
    with pytest.raises(ValueError, match="4 channels"):
        _C.ArrayFileSource(name, 0, (1, 1, 1, 4))
    with pytest.raises(ValueError, match="image 3 of a source of 3"):
        _C.ArrayFileSource(name, 100, (3, 10, 10, 3)).read(3)


def test_arrays_on_disk_have_the_pixels_and_fingerprint_of_those_in_memory(tmp_path):
    images = noise(300, 7, 9)
    np.save(tmp_path / "c.npy", images)
    np.save(tmp_path / "f.npy", np.asfortranarray(images))
    np.save(tmp_path / "gray.npy", images[..., 0])
    memory = open_source(images)
    for name in ("c.npy", "f.npy"):
        source = open_source(tmp_path / name)
        assert source.fingerprint == memory.fingerprint
        assert all((source.read(i) == images[i]).all() for i in range(300))
    gray = open_source(tmp_path / "gray.npy")
    np.testing.assert_array_equal(gray.decode(7), np.repeat(images[7, ..., :1], 3, 2))
