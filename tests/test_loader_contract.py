"""What a loader promises: batches that stay, forks, exact epochs, checked arguments."""

import os
import signal
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from bags import AUGMENT, make
from pictures import noise
from torch.utils.data import DataLoader, IterableDataset

from bagssl_fast import _C
from bagssl_fast.data import BagLoader, Source, open_source


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
