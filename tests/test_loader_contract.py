"""What a loader promises: batches that stay, threads, forks, stalled data, exact epochs."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from bags import AUGMENT, bags, make, same, write_folder
from pictures import jpeg, noise
from torch.utils.data import DataLoader, IterableDataset

from bagssl_fast import _C
from bagssl_fast.data import BagLoader, ImageError, Source, open_source
from bagssl_fast.data import loader as module


@pytest.fixture
def source() -> Source:
    return open_source(noise(), labels=np.arange(24) % 5)


def pixels_of(batch) -> torch.Tensor:
    """What a batch's memory holds: its patches, or its images and views."""
    if hasattr(batch, "params"):
        return torch.cat([batch.images.bytes.float(), batch.params.flatten()])
    return batch.patches.clone()


# A batch stays until two more were taken


def held(batches: list, taken) -> None:
    """Keeps the latest two batches and checks that they are as they were when they were taken."""
    batches.append((taken, pixels_of(taken)))
    del batches[:-2]
    time.sleep(0.02)  # for threads that would overwrite them
    for batch, pixels in batches:
        assert torch.equal(pixels_of(batch), pixels)


@pytest.mark.parametrize("views", ["host", "device"])
@pytest.mark.parametrize("batches_ahead", [1, 3])
def test_batches_stay_across_epochs(source, views, batches_ahead):
    with make(source, views=views, batches_ahead=batches_ahead) as loader:
        latest: list = []
        for _ in range(4):
            for batch in loader:
                held(latest, batch)


@pytest.mark.parametrize("views", ["host", "device"])
def test_batches_stay_across_seeks_new_iterators_and_closing(source, views):
    loader = make(source, views=views)
    latest: list = []
    for round in range(8):
        iterator = iter(loader)
        for _ in range(1 + round % 3):
            held(latest, next(iterator))
        if round % 2:
            loader.seek(round, round % 4)
        time.sleep(0.02)
        held(latest, next(iter(loader)))
    other = make(source, views=views, seed=1)
    loader.close()
    list(other)
    for batch, pixels in latest:
        assert torch.equal(pixels_of(batch), pixels)


def test_batches_stay_in_the_child_of_a_fork(source):
    with make(source, batch_size=2, batches_ahead=1) as loader:
        iterator = iter(loader)
        latest: list = []
        for _ in range(3):
            held(latest, next(iterator))
        child = os.fork()
        if child == 0:
            code = 1
            try:
                signal.alarm(20)
                for _ in range(4):
                    held(latest, next(iterator))
                code = 0
            finally:
                os._exit(code)
        assert os.waitpid(child, 0)[1] == 0
        held(latest, next(iterator))


def test_a_fork_while_other_threads_take_batches(source):
    with make(source, batch_size=1) as loader:
        stop = threading.Event()

        def consume() -> None:
            while not stop.is_set():
                for _ in loader:
                    pass

        consumer = threading.Thread(target=consume)
        consumer.start()
        try:
            for _ in range(10):
                child = os.fork()
                if child == 0:
                    code = 1
                    try:
                        signal.alarm(20)
                        loader.seek(0, 0)
                        code = 0 if len(list(loader)) == 24 else 2
                    finally:
                        os._exit(code)
                assert os.waitpid(child, 0)[1] == 0
        finally:
            stop.set()
            consumer.join(timeout=30)
        assert not consumer.is_alive()


class Worker(IterableDataset):
    def __init__(self, loader: BagLoader) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[torch.Tensor]:
        return (batch.index for batch in self.loader)


def test_several_workers_of_a_data_loader_are_refused(source):
    with make(source, drop_last=False) as loader:
        for workers in (0, 1):
            index = torch.cat(list(DataLoader(Worker(loader), None, num_workers=workers)))
            assert sorted(index.tolist()) == list(range(24))
        with pytest.raises(
            RuntimeError, match="2 DataLoader workers would give every image 2 time"
        ):
            list(DataLoader(Worker(loader), None, num_workers=2))


class LikePinned:
    """A loader whose ring believes that its memory is pinned, as on a machine with a GPU."""

    def __init__(self, source: Source, monkeypatch, **options) -> None:
        monkeypatch.setattr(
            "bagssl_fast.data.ring.Ring._empty",
            lambda ring, count, kind: torch.empty(count, dtype=kind),
        )
        self.loader = make(source, **options)
        self.loader._ring._pinned = True


@pytest.mark.parametrize("views", ["host", "device"])
def test_pinned_memory_is_never_written_to_while_someone_has_it(source, views, monkeypatch):
    # A copy on any stream has it: torch's allocator then keeps the memory from being reused.
    loader = LikePinned(source, monkeypatch, views=views).loader
    kept = []
    with loader:
        for _ in range(3):
            kept += [(batch, pixels_of(batch)) for batch in loader]
        for batch, pixels in kept:
            assert torch.equal(pixels_of(batch), pixels)
        loader.set_epoch(0)
        with make(source, views=views) as plain:
            for batch, other in zip(loader, plain, strict=True):
                assert torch.equal(batch.patches, other.patches)


@pytest.mark.gpu
@pytest.mark.parametrize("views", ["host", "device"])
def test_ring_waits_for_copies_on_any_stream(source, views):
    with make(source, views=views) as plain:
        expected = [batch.clone().patches for _ in range(3) for batch in plain]
    stream, copies = torch.cuda.Stream(), []
    with make(source, views=views, pin_memory=True) as loader:
        for _ in range(3):
            for batch in loader:
                with torch.cuda.stream(stream):
                    torch.cuda._sleep(20_000_000)  # the copy is asked for long before it is made
                    if views == "host":
                        copies.append(batch.patches.cuda(non_blocking=True))
                    else:
                        copies.append(batch.to("cuda", non_blocking=True).patches)
    torch.cuda.synchronize()
    for copy, patches in zip(copies, expected, strict=True):
        torch.testing.assert_close(copy.cpu(), patches, rtol=0, atol=1e-5)


# Several threads


def test_close_while_a_thread_waits_for_a_batch_is_an_error_there(source):
    entered, release = threading.Event(), threading.Event()

    def read(index: int) -> np.ndarray:
        entered.set()
        release.wait(20)
        return noise(1)[0]

    for end in ("close", "seek", "iter"):
        entered.clear(), release.clear()
        loader = make(Source.from_function(read, 24))
        iterator, caught = iter(loader), []

        def take(iterator=iterator, caught=caught) -> None:
            try:
                next(iterator)
            except BaseException as error:
                caught.append(error)

        thread = threading.Thread(target=take)
        thread.start()
        assert entered.wait(20)
        time.sleep(0.05)
        threading.Timer(0.3, release.set).start()
        if end == "close":
            loader.close()
        elif end == "seek":
            loader.seek(1, 0)
        else:
            next(iter(loader))
        thread.join(20)
        assert not thread.is_alive()
        assert isinstance(caught[0], RuntimeError) and "this iteration ended" in str(caught[0])
        with pytest.raises(RuntimeError, match="this iteration ended"):
            next(iterator)
        loader.close()


def test_threads_that_share_an_iterator_take_each_image_once(source):
    with make(source, batch_size=1, patches=1, drop_last=False) as loader:
        for epoch in range(20):
            iterator, found = iter(loader), []

            def consume(iterator=iterator, found=found) -> None:
                found.extend(int(batch.index[0]) for batch in iterator)

            threads = [threading.Thread(target=consume) for _ in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(20)
            assert sorted(found) == list(range(24))
            state = loader.state_dict()
            assert (state["epoch"], state["step"]) == (epoch + 1, 0)


def test_next_seek_iter_and_close_at_random_never_end_an_epoch_silently(source):
    problems: list[str] = []
    for seed in range(6):
        loader = make(source, batch_size=1, patches=1, num_threads=3)
        over = threading.Event()

        def consume(loader=loader, over=over) -> None:
            while not over.is_set():
                try:
                    taken = sum(1 for _ in loader)
                except RuntimeError as error:
                    if "ended" not in str(error) and "closed" not in str(error):
                        problems.append(repr(error))
                    continue
                if taken not in (24, 24 - 3):  # a whole epoch, or one that seek began at step 3
                    problems.append(f"an epoch of {taken}")

        threads = [threading.Thread(target=consume) for _ in range(3)]
        for thread in threads:
            thread.start()
        rng = np.random.default_rng(seed)
        for _ in range(30):
            time.sleep(float(rng.uniform(0, 0.005)))
            loader.seek(int(rng.integers(5)), int(rng.choice([0, 3])))
        loader.close()
        over.set()
        for thread in threads:
            thread.join(20)
            assert not thread.is_alive()
    assert not problems


def test_threads_that_cannot_be_created_are_an_error_and_leave_nothing(tmp_path):
    write_folder(tmp_path)
    code = f"""
import os, resource
from bagssl_fast import _C
from bagssl_fast.augment import Augment
from bagssl_fast.data import BagLoader, Threads
loader = BagLoader({str(tmp_path)!r}, 4, 2, Augment(size=8), threads=Threads(2000))
few = BagLoader({str(tmp_path)!r}, 4, 2, Augment(size=8), threads=Threads(2))
before = len(os.listdir("/proc/self/task"))
now = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (now + (300 << 20), resource.RLIM_INFINITY))
for _ in range(2):
    try:
        iter(loader)
    except OSError as error:
        print(error)
try:
    _C.decode_many([b"x"], 2000, None, 100)
except OSError as error:
    print(error)
assert len(os.listdir("/proc/self/task")) == before
print(len(list(few)))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr
    assert all("cannot start thread" in line and "of a loader's 2000" in line for line in lines[:2])
    assert "use fewer, by num_threads" in lines[0]
    assert "cannot start thread" in lines[2] and lines[3] == "6"


# Data that stall


@pytest.fixture
def stalled(monkeypatch) -> Iterator[Source]:
    """A source whose image 7 is not read before the test is over."""
    release = threading.Event()
    monkeypatch.setattr(module, "PATIENCE", 0.3)

    def read(index: int) -> np.ndarray:
        if index == 7:
            release.wait(60)
        return noise(1)[0]

    source = Source.from_function(read, 24)
    source.release = release
    yield source
    release.set()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_are_heard_while_data_stall(stalled, number):
    class Stop(Exception):
        pass

    def stop(*_: object) -> None:
        raise Stop

    before = signal.signal(number, stop)
    try:
        with make(stalled, batch_size=24) as loader:
            timer = threading.Timer(0.3, signal.raise_signal, [number])
            timer.start()
            begin = time.perf_counter()
            with (
                pytest.raises(Stop),
                pytest.warns(RuntimeWarning, match="image 7: its read has not returned for 0.3 s"),
            ):
                next(iter(loader))
            assert time.perf_counter() - begin < 10
            timer.join()
            stalled.release.set()
            assert loader.state_dict()["step"] == 0
    finally:
        signal.signal(number, before)


def test_threads_that_are_left_behind_end_when_their_reads_return(stalled):
    before = len(os.listdir("/proc/self/task"))
    loader = make(stalled, batch_size=24, num_threads=3)
    iterator = iter(loader)
    with pytest.warns(RuntimeWarning, match="left behind"):
        loader.close()
    del iterator, loader
    assert len(os.listdir("/proc/self/task")) == before + 1
    stalled.release.set()
    for _ in range(100):
        if len(os.listdir("/proc/self/task")) == before:
            return
        time.sleep(0.05)
    pytest.fail("the thread is still there")


def test_an_iteration_after_a_stalled_one_waits_for_its_memory(stalled):
    with make(stalled, batch_size=24) as loader:
        iterator = iter(loader)
        with pytest.warns(RuntimeWarning, match="left behind"):
            loader.seek(0)
        del iterator
        threading.Timer(0.5, stalled.release.set).start()
        assert len(next(iter(loader)).index) == 24


def test_a_stalled_read_does_not_keep_the_process(tmp_path):
    code = """
import signal, sys, threading, time
from bagssl_fast.augment import Augment
from bagssl_fast.data import BagLoader, Source, Threads
signal.signal(signal.SIGINT, signal.default_int_handler)
source = Source.from_function(lambda index: time.sleep(600), 8)
loader = BagLoader(source, 8, 2, Augment(size=8), threads=Threads(2))
threading.Timer(0.5, signal.raise_signal, [signal.SIGINT]).start()
try:
    next(iter(loader))
except KeyboardInterrupt:
    print("heard", flush=True)
"""
    begin = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=False
    )
    assert (done.returncode, done.stdout) == (0, "heard\n"), done.stderr
    assert time.perf_counter() - begin < 60


# Files that are not what they were


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


# Exact epochs


def indices(loader: BagLoader) -> list[int]:
    return [i for batch in loader for i in batch.index.tolist()]


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
@pytest.mark.parametrize("images", [1, 23, 24, 50])
def test_every_image_once_an_epoch_over_all_ranks(images, world_size):
    source = open_source(noise(images, 9, 9))
    options = {"batch_size": 4, "patches": 1, "drop_last": False, "world_size": world_size}
    ranks = [make(source, rank=rank, **options) for rank in range(world_size)]
    for _ in range(3):
        parts = [indices(rank) for rank in ranks]
        assert sorted(i for part in parts for i in part) == list(range(images))
    for rank in ranks:
        rank.close()


@pytest.mark.parametrize("before", [1, 2, 6])
@pytest.mark.parametrize("after", [1, 3, 4])
def test_every_image_once_after_resuming_with_other_ranks(source, before, after):
    def ranks(world_size: int) -> list[BagLoader]:
        options = {"batch_size": 12 // world_size, "patches": 1, "world_size": world_size}
        return [make(pictures, rank=rank, drop_last=False, **options) for rank in range(world_size)]

    pictures = open_source(noise(43, 9, 9))
    for step in range(4):
        seen, states = [], []
        for rank in ranks(before):
            iterator = iter(rank)
            seen += [i for _ in range(step) for i in next(iterator).index.tolist()]
            states.append(rank.state_dict())
            rank.close()
        assert all(state == states[0] for state in states) and len(seen) == 12 * step
        rest = []
        for rank in ranks(after):
            rank.load_state_dict(states[0])
            rest += indices(rank)
            rank.close()
        assert sorted(seen + rest) == list(range(43))


# What Python hands to C++


def native(source: Source, slots: list[np.ndarray], **options) -> _C.Loader:
    arguments = {
        "source": source.native,
        "augments": (AUGMENT,),
        "patches": 2,
        "sampler": "random",
        "dtype": "uint8",
        "seed": 0,
        "threads": 1,
        "batches_ahead": 1,
        "skip_bad": False,
        "dct_scaling": False,
        "max_pixels": 10**6,
        "max_bytes": 10**6,
        "max_scans": 9,
        "cut": True,
        "subset": np.arange(24),
        "decoder": None,
    }
    return _C.Loader(**{**arguments, "slots": slots, **options})


def test_memory_is_never_written_beyond_its_end(source):
    bag = 2 * 8 * 8 * 3
    slots = [np.zeros(4 * bag, np.uint8) for _ in range(3)]
    loader = native(source, slots)
    rows = np.arange(24)
    with pytest.raises(ValueError, match="batch of 5 images does not fit into slots with room for"):
        loader.start(0, rows, np.array([5]), 0)
    for ends, first, text in (
        ([4], -1, "first_batch is -1 of 1"),
        ([4], 2, "first_batch is 2 of 1"),
        ([4, 3], 0, "batch_ends must rise"),
        ([25], 0, "within the rows"),
    ):
        with pytest.raises(ValueError, match=text):
            loader.start(0, rows, np.array(ends), first)
    with pytest.raises(ValueError, match="index 24 of a data set of 24"):
        loader.start(0, rows + 1, np.array([4]), 0)
    run = loader.start(0, rows, np.array([4, 8, 12]), 0)
    taken = loader.next(run)
    with pytest.raises(ValueError, match="may not become smaller"):
        loader.set_slot(taken[0], np.zeros(4 * bag - 1, np.uint8))
    with pytest.raises(ValueError, match="not that of a held batch"):
        loader.set_slot((taken[0] + 1) % 3, np.zeros(4 * bag, np.uint8))
    with pytest.raises(RuntimeError, match="this iteration ended"):
        loader.next(run + 1)
    loader.stop()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"slots": [np.zeros(9, np.uint8)] * 2}, "expected batches_ahead"),
        ({"slots": [np.zeros((3, 9), np.uint8)] * 3}, r"shape \[3, 9\]; expected uint8 \[N\]"),
        ({"patches": 2**24}, "patches must be from 1"),
        ({"skip_bad": True, "subset": np.arange(0)}, "subset, which is empty"),
    ],
)
def test_native_arguments_are_checked(source, options, text):
    with pytest.raises(ValueError, match=text):
        native(source, **{"slots": [np.zeros(999, np.uint8)] * 3, **options})


def test_memory_that_cannot_be_written_is_refused(source):
    fixed = np.zeros(999, np.uint8)
    fixed.flags.writeable = False
    with pytest.raises(ValueError, match="writeable"):
        native(source, [fixed] * 3)
    with pytest.raises(TypeError):
        native(source, [np.zeros(999, np.float32)] * 3)
