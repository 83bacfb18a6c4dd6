"""Files that are not what they were, or never were files: bad images, never a crash or a hang."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from bags import bags, make, same, write_folder
from pictures import jpeg, noise

from bagssl_fast.data import ImageError


@pytest.mark.parametrize("kind", ["fifo", "socket", "device"])
@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_special_files_are_bad_images_and_never_waited_for(tmp_path, kind, on_error):
    folder = write_folder(tmp_path / "set")
    path = folder / "a" / "00.jpg"
    path.unlink()
    listener = None
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "socket":
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(path))
    else:
        path.symlink_to("/dev/zero")
    signal.alarm(60)
    try:
        with make(folder, drop_last=False, on_error=on_error) as loader:
            if on_error == "skip":
                list(loader)
                assert [name for name, _ in loader.skipped] == [str(path)]
            else:
                with pytest.raises(ImageError, match=r"not a regular file|cannot open the"):
                    list(loader)
    finally:
        signal.alarm(0)
        if listener is not None:
            listener.close()


def data_file(folder: Path, kind: str) -> Path:
    pictures = noise(24, 60, 60)
    if kind == "npy":
        np.save(folder / "set.npy", pictures)
        return folder / "set.npy"
    from pictures import write_tar

    files = [(f"{i:02d}.jpg", jpeg(picture)) for i, picture in enumerate(pictures)]
    return write_tar(folder / "set.tar", files)


@pytest.mark.parametrize("kind", ["tar", "npy"])
@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_a_file_that_shrinks_gives_bad_images(tmp_path, kind, on_error):
    path = data_file(tmp_path, kind)
    with make(path, batch_size=1, shuffle=False, on_error=on_error) as loader:
        whole = [batch.index.tolist() for batch in loader]
        os.truncate(path, path.stat().st_size // 2)
        if on_error == "raise":
            with pytest.raises(ImageError, match=f"set.{kind}.*the file ends at byte"):
                list(loader)
            return
        index = [int(batch.index) for batch in loader]
        assert len(index) == len(whole) and index[:8] == list(range(8))
        assert all(f"set.{kind}" in name for name, _ in loader.skipped) and loader.skipped
        os.truncate(path, 0)
        with pytest.raises(ImageError, match="none of the 24 images"):
            list(loader)


@pytest.mark.parametrize("kind", ["tar", "npy"])
def test_a_file_that_is_removed_is_read_to_its_end(tmp_path, kind):
    path = data_file(tmp_path, kind)
    with make(path) as loader:
        before = bags(loader)
        path.unlink()
        loader.set_epoch(0)
        same(bags(loader), before)


def test_more_shards_than_descriptors(tmp_path):
    from pictures import write_tar

    for i, picture in enumerate(noise(40)):
        write_tar(tmp_path / f"{i:02d}.tar", [("a.jpg", jpeg(picture))])
    code = f"""
import os, resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
from bagssl_fast import _C
from bagssl_fast.data import open_source
before = len(os.listdir("/proc/self/fd"))
source, other = open_source({str(tmp_path)!r}), open_source({str(tmp_path)!r})
assert len(os.listdir("/proc/self/fd")) - before == 32, len(os.listdir("/proc/self/fd"))
assert [source.read(i) for i in range(40)] == [other.read(i) for i in range(40)]
os.truncate({str(tmp_path / "39.tar")!r}, 100)
try:
    source.read(39)
except RuntimeError as error:
    print(error)
del source, other
assert len(os.listdir("/proc/self/fd")) == before
"""
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "the file was changed since it was opened\n"
