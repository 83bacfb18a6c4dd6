"""A loader that several threads share, and one whose data stall: no hang, no silent end."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
from bags import make, write_folder
from pictures import noise

from bagssl_fast.data import Source, open_source
from bagssl_fast.data import loader as module


@pytest.fixture
def source() -> Source:
    return open_source(noise(), labels=np.arange(24) % 5)


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
    entered, release = threading.Event(), threading.Event()
    monkeypatch.setattr(module, "PATIENCE", 0.3)

    def read(index: int) -> np.ndarray:
        if index == 7:
            entered.set()
            release.wait(60)
        return noise(1)[0]

    source = Source.from_function(read, 24)
    source.entered, source.release = entered, release
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
    assert stalled.entered.wait(60)
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
        assert stalled.entered.wait(60)
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
