"""BagLoader by what can go wrong: order, resuming, threads, fork, leaks, options, arguments."""

import dataclasses
import gc
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from bags import AUGMENT, PLAIN, bags, make, same, write_folder
from pictures import jpeg, noise

from bagssl_fast import _C
from bagssl_fast.augment import Augment
from bagssl_fast.data import open_source
from bagssl_fast.data.order import batch_ends, epoch_rows, num_batches


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def array_source():
    return open_source(noise(), labels=np.arange(24) % 5)


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_folder(tmp_path / "set")


# What a batch is


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "uint8"])
def test_batch_has_the_documented_shape_and_memory(array_source, dtype):
    with make(array_source, dtype=dtype) as loader:
        batch = next(iter(loader))
    assert batch.patches.shape == (3, 4, 3, 8, 8) and batch.patches.dtype == getattr(torch, dtype)
    flat = batch.patches.reshape(12, 3, 8, 8)
    assert flat.data_ptr() == batch.patches.data_ptr()
    assert flat.is_contiguous(memory_format=torch.channels_last)
    assert batch.labels.tolist() == [i % 5 for i in batch.index.tolist()]


def test_patches_are_those_of_the_public_calls(folder):
    source = open_source(folder)
    augments = [AUGMENT, PLAIN]
    with make(source, augment=augments, patches=4, seed=5, drop_last=False) as loader:
        loader.set_epoch(3)
        got = bags(loader)
    for index in range(len(source)):
        image = source.decode(index)
        table = _C.draw_views(
            augments,
            np.array([image.shape[:2]]),
            np.array([index]),
            patches=4,
            seed=5,
            epoch=3,
        )
        for p in range(4):
            a = augments[p % 2]
            patch = _C.patch_views(
                [image],
                table[p : p + 1],
                size=(8, 8),
                blur_kernel=a.blur_kernel,
                mean=a.mean,
                std=a.std,
            )[0, 0]
            np.testing.assert_array_equal(got[index][p].permute(1, 2, 0).numpy(), patch)


def test_batch_stays_while_the_next_one_is_taken_and_clone_stays_for_ever(array_source):
    with make(array_source, batch_size=2) as loader:
        previous, kept = None, []
        for batch in loader:
            if previous is not None:
                torch.testing.assert_close(previous[0].patches, previous[1].patches)
            previous = batch, batch.clone()
            kept.append(previous[1])
        fresh = make(array_source, batch_size=2)
        for batch, clone in zip(fresh, kept, strict=True):
            torch.testing.assert_close(batch.patches, clone.patches, rtol=0, atol=0)
        fresh.close()


def test_unlabeled_images_have_label_minus_one():
    with make(open_source(noise())) as loader:
        assert next(iter(loader)).labels.tolist() == [-1] * 4


@pytest.mark.parametrize("sampler", ["grid", "center"])
def test_evaluation_samplers_do_not_augment(array_source, sampler):
    patches = {"grid": 4, "center": 1}[sampler]
    options = {"sampler": sampler, "patches": patches, "shuffle": False, "drop_last": False}
    with make(array_source, **options, seed=1) as one, make(array_source, **options, seed=2) as two:
        same(bags(one), bags(two))
        index = [i for batch in one for i in batch.index.tolist()]
    assert index == list(range(24))


def test_fixed_patch_larger_than_the_image_is_the_largest_that_fits():
    with make(
        open_source(noise(4, 3, 50)), augment=dataclasses.replace(PLAIN, scale=(1, 1))
    ) as loader:
        assert torch.isfinite(next(iter(loader)).patches).all()


# The same bags, whoever makes them


@pytest.mark.parametrize("num_threads", [1, 2, 8])
@pytest.mark.parametrize("batch_size", [1, 5, 24])
def test_same_bags_for_any_threads_and_batch_size(folder, num_threads, batch_size):
    source = open_source(folder)
    with make(source, num_threads=1, drop_last=False) as loader:
        expected = bags(loader)
    options = {"num_threads": num_threads, "batch_size": batch_size, "drop_last": False}
    with make(source, **options) as loader:
        same(bags(loader), expected)


@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_ranks_together_make_the_batches_of_one(array_source, world_size, drop_last):
    whole = make(array_source, batch_size=2 * world_size, drop_last=drop_last)
    ranks = [
        make(array_source, batch_size=2, rank=r, world_size=world_size, drop_last=drop_last)
        for r in range(world_size)
    ]
    assert {len(rank) for rank in ranks} == {len(whole)}
    for batch, *parts in zip(whole, *ranks, strict=True):
        together = torch.cat([part.patches for part in parts], dim=1)
        torch.testing.assert_close(together, batch.patches, rtol=0, atol=0)
        assert torch.cat([part.index for part in parts]).tolist() == batch.index.tolist()


def test_every_image_once_and_ranks_step_together_for_any_counts():
    for images in (1, 2, 5, 12, 17):
        for world in (1, 2, 3):
            for size in (1, 2, 4):
                rows = np.arange(images)
                total = num_batches(images, size * world, drop_last=False)
                parts = [batch_ends(rows, total, size, r, world, False) for r in range(world)]
                assert all(len(ends) == total for _, ends in parts)
                assert sorted(np.concatenate([mine for mine, _ in parts])) == rows.tolist()
                assert all(np.diff(ends, prepend=0).max() <= size for _, ends in parts)


def test_epochs_and_seeds_change_order_and_bags(array_source):
    orders = {
        (seed, epoch): tuple(epoch_rows(np.arange(24), seed, epoch, True))
        for seed in (0, 1)
        for epoch in (0, 1)
    }
    assert len(set(orders.values())) == 4
    assert all(sorted(order) == list(range(24)) for order in orders.values())
    with make(array_source, drop_last=False) as loader:
        first, second = bags(loader), bags(loader)
        loader.set_epoch(0)
        same(bags(loader), first)
    assert any(not torch.equal(first[i], second[i]) for i in range(24))


def test_order_is_this_for_ever():
    # A change here breaks the resuming of everybody's runs.
    assert epoch_rows(np.arange(10), 0, 0, True).tolist() == [0, 2, 9, 1, 8, 5, 4, 3, 6, 7]
    assert epoch_rows(np.arange(10), 7, 3, True).tolist() == [2, 5, 9, 7, 3, 0, 6, 8, 4, 1]


def test_large_seeds_have_orders_of_their_own():
    seeds = [0, 2**63, 2**63 + 1, 2**64 - 2, 2**64 - 1]
    assert len({tuple(epoch_rows(np.arange(24), seed, 1, True)) for seed in seeds}) == len(seeds)


def test_global_generators_are_left_alone(array_source):
    np.random.seed(0)
    torch.manual_seed(0)
    before = torch.get_rng_state().clone(), np.random.get_state()[1].copy()
    with make(array_source) as loader:
        list(loader)
    assert torch.equal(before[0], torch.get_rng_state())
    assert (before[1] == np.random.get_state()[1]).all()


def test_subset_of_indices(array_source):
    with make(array_source, indices=[3, 9, 4, 20], batch_size=2) as loader:
        assert sorted(bags(loader)) == [3, 4, 9, 20]


# Resuming


@pytest.mark.parametrize("taken", [0, 1, 3, 6])
def test_resume_mid_epoch_gives_the_same_remaining_batches(array_source, taken):
    with make(array_source) as loader:
        loader.set_epoch(2)
        expected = [batch.clone() for batch in loader] + [batch.clone() for batch in loader]
    with make(array_source) as loader:
        loader.set_epoch(2)
        iterator = iter(loader)
        for _ in range(taken):
            next(iterator)
        state = loader.state_dict()
    assert (state["epoch"], state["step"]) == (2, taken)
    for _ in range(2):  # twice: from the state, and from a state of the resumed one
        loader = make(array_source, num_threads=1)
        loader.load_state_dict(state)
        loader.set_epoch(loader.state_dict()["epoch"])  # as trainers do
        state = loader.state_dict()
        rest = [batch.clone() for _ in range(2) for batch in loader][: len(expected) - taken]
        loader.close()
        for batch, other in zip(rest, expected[taken:], strict=True):
            assert batch.index.tolist() == other.index.tolist()
            torch.testing.assert_close(batch.patches, other.patches, rtol=0, atol=0)


def test_state_of_other_settings_is_refused(array_source):
    state = make(array_source).state_dict()
    with pytest.raises(ValueError, match=r"seed was 0, is 1.*settings"):
        make(array_source, seed=1).load_state_dict(state)
    with pytest.raises(ValueError, match="source was"):
        make(open_source(noise(24, 9, 9))).load_state_dict(state)
    with pytest.raises(ValueError, match="step must be from 0 to 6, got 99"):
        make(array_source).load_state_dict({**state, "step": 99})
    with pytest.raises(ValueError, match=r"no config: use seek\(epoch, step\)"):
        make(array_source).load_state_dict({"epoch": 0, "step": 1})
    # The world may change as long as the global batch does not.
    make(array_source, batch_size=2, world_size=2).load_state_dict(state)


def test_seek_starts_the_next_iteration_anywhere(array_source):
    with make(array_source) as loader:
        epochs = [[batch.clone() for batch in loader] for _ in range(3)]
        for epoch, step in [(1, 4), (0, 0), (2, 5), (0, 6)]:
            loader.seek(epoch, step)
            where = (epoch, step) if step < len(loader) else (epoch + 1, 0)
            state = loader.state_dict()
            assert (state["epoch"], state["step"]) == where
            expected = epochs[where[0]][where[1] :]
            for batch, other in zip(loader, expected, strict=True):
                assert batch.index.tolist() == other.index.tolist()
                assert torch.equal(batch.patches, other.patches)


def test_seek_ends_the_iteration_before_it(array_source):
    with make(array_source) as loader:
        iterator = iter(loader)
        next(iterator)
        loader.seek(3, 2)
        with pytest.raises(RuntimeError, match="ended"):
            next(iterator)
        assert (loader.state_dict()["epoch"], loader.state_dict()["step"]) == (3, 2)


@pytest.mark.parametrize(
    ("epoch", "step", "text"),
    [
        (-1, 0, "epoch must be from 0 to 4294967295, got -1"),
        (1.5, 0, "epoch must be an integer, got 1.5"),
        (0, -1, "step must be from 0 to 6, got -1"),
        (0, True, "step must be an integer, got True"),
        (0, 7, "step must be from 0 to 6, got 7"),
    ],
)
def test_seek_out_of_range_is_named(array_source, epoch, step, text):
    with make(array_source) as loader:
        loader.seek(2, 3)
        with pytest.raises(ValueError, match=text):
            loader.seek(epoch, step)
        assert (loader.state_dict()["epoch"], loader.state_dict()["step"]) == (2, 3)


# Threads, processes, memory


def threads_now() -> int:
    return len(os.listdir("/proc/self/task"))


def test_breaking_out_early_stops_the_threads(array_source):
    loader = make(array_source, num_threads=4)
    before = threads_now()
    for _ in loader:
        assert threads_now() >= before
        break
    gc.collect()
    assert threads_now() == before
    assert loader.state_dict()["step"] == 1
    iterator = iter(loader)
    assert threads_now() == before + 4  # at work before the first batch is asked for
    del iterator
    assert threads_now() == before
    iterator = iter(loader)
    next(iterator)
    loader.close()
    assert threads_now() == before
    with pytest.raises(RuntimeError, match="iterated again, moved by seek, or closed"):
        next(iterator)


def test_close_is_final_and_may_be_repeated(array_source):
    loader = make(array_source)
    batch = next(iter(loader))
    loader.close()
    loader.close()
    assert torch.isfinite(batch.patches).all()  # the memory is the batch's own now
    assert loader.skipped == []
    with pytest.raises(RuntimeError, match="closed"):
        iter(loader)


def test_second_iteration_ends_the_first(array_source):
    with make(array_source) as loader:
        first, second = iter(loader), iter(loader)
        next(second)
        with pytest.raises(RuntimeError, match="iterated again, moved by seek, or closed"):
            next(first)
        assert len(list(second)) == len(loader) - 1


def test_exception_in_the_loop_leaves_nothing_behind(array_source):
    before = threads_now()
    loader = make(array_source)
    reference = weakref.ref(loader)
    with pytest.raises(KeyError), loader:
        for _ in loader:
            raise KeyError
    del loader
    gc.collect()
    assert reference() is None and threads_now() == before


def test_dropped_loader_ends_its_threads_though_they_wait_for_the_gil(folder):
    before = threads_now()
    for _ in range(5):
        iterator = iter(make(folder, batches_ahead=3))  # with PNGs, decoded under the GIL
        next(iterator)
        del iterator
    gc.collect()
    assert threads_now() == before


def test_memory_is_flat_over_1000_epochs(folder):
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    source = open_source(folder)
    with make(source, batch_size=8, patches=2) as loader:
        for _ in range(150):
            for _ in loader:
                pass
        gc.collect()
        before, descriptors = resident(), len(os.listdir("/proc/self/fd"))
        for _ in range(1000):
            for _ in loader:
                pass
        gc.collect()
        assert len(os.listdir("/proc/self/fd")) == descriptors
        assert resident() - before < 4 << 20


def test_memory_is_flat_over_many_loaders(folder):
    source = open_source(folder)

    def use() -> None:
        for batch in make(source, batch_size=8, patches=2):
            del batch
            break

    for _ in range(20):
        use()
    gc.collect()
    before, threads = len(gc.get_objects()), threads_now()
    for _ in range(50):
        use()
    gc.collect()
    assert threads_now() == threads and len(gc.get_objects()) - before < 100


def test_fork_in_the_middle_of_an_epoch(folder):
    with make(folder, shuffle=False) as loader:
        expected = [batch.index.tolist() for batch in loader]
        loader.set_epoch(0)
        iterator = iter(loader)
        next(iterator)
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                signal.alarm(20)
                rest = [batch.index.tolist() for batch in iterator]
                again = len(list(loader))
                os.write(writer, repr((rest, again)).encode())
            finally:
                os._exit(0)
        os.close(writer)
        with os.fdopen(reader) as pipe:
            text = pipe.read()
        os.waitpid(child, 0)
        assert text == repr((expected[1:], len(expected)))
        assert [batch.index.tolist() for batch in iterator] == expected[1:]


def test_decoding_pool_after_fork():
    files = [jpeg(p) for p in noise(8)]
    total = _C.decode_many(files, 2, None, 10**6) if _C.HAS_JPEG else None
    if total is None:
        pytest.skip("built without libjpeg-turbo")
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        os._exit(0 if _C.decode_many(files, 2, None, 10**6) == total else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_interpreter_ends_while_threads_decode(folder):
    code = (
        "import sys\nfrom bagssl_fast.augment import Augment\n"
        "from bagssl_fast.data import BagLoader, Threads\n"
        f"loader = BagLoader({str(folder)!r}, 4, 3, Augment(size=8), threads=Threads(3))\n"
        "iterator = iter(loader)\nnext(iterator)\nprint('end')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "end\n", "")


def test_waiting_for_a_batch_can_be_interrupted(array_source, monkeypatch):
    release = threading.Event()

    def slow(data, max_pixels):
        release.wait(1.5)  # all of the batch: 18 seconds
        return np.zeros((4, 4, 3), np.uint8)

    monkeypatch.setattr("bagssl_fast.data.loader.decode_image", slow)
    # Shells start what runs in the background with the signal ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    source = open_source(noise())
    source.native = _C.FileSource([os.fsencode(__file__)] * 24)
    with make(source, batch_size=24) as loader:
        timer = threading.Timer(0.3, signal.raise_signal, [signal.SIGINT])
        timer.start()
        begin = time.perf_counter()
        try:
            with pytest.raises(KeyboardInterrupt):
                next(iter(loader))
            assert time.perf_counter() - begin < 10
        finally:
            release.set()
            timer.join()
            signal.signal(signal.SIGINT, before)


def test_data_wait_counts_what_the_consumer_waited(folder):
    with make(folder) as loader:
        assert loader.data_wait == 0
        list(loader)
        total = loader.data_wait
        assert total > 0
        iterator = iter(loader)
        time.sleep(0.3)  # the first batches are ready by now
        waited = loader.data_wait
        next(iterator)
        assert loader.data_wait - waited < 0.2


def test_no_more_than_batches_ahead_are_made(monkeypatch):
    made = []

    def counting(data, max_pixels):
        made.append(1)
        return np.zeros((4, 4, 3), np.uint8)

    monkeypatch.setattr("bagssl_fast.data.loader.decode_image", counting)
    source = open_source(noise())
    source.native = _C.FileSource([os.fsencode(__file__)] * 24)
    with make(source, batch_size=2, batches_ahead=3) as loader:
        iterator = iter(loader)
        next(iterator)
        time.sleep(0.3)
        assert 2 * (1 + 3) <= len(made) <= 2 * (1 + 4)


def test_torch_threads_are_left_alone(array_source):
    before = torch.get_num_threads()
    with make(array_source, num_threads=5) as loader:
        list(loader)
    assert torch.get_num_threads() == before


def test_pinning_without_cuda_is_nothing(array_source):
    with make(array_source, pin_memory=True) as loader:
        assert next(iter(loader)).patches.is_pinned() == torch.cuda.is_available()


# Options


def test_fast_decode_is_close_and_off_by_default(tmp_path):
    y, x = np.mgrid[:400, :500]
    smooth = np.stack([128 + 90 * np.sin(y / 60), 128 + 90 * np.cos(x / 50), x / 2], -1)
    (tmp_path / "a.jpg").write_bytes(jpeg(smooth.astype(np.uint8), quality=95))
    augment = dataclasses.replace(PLAIN, size=32, mean=(0, 0, 0), std=(1, 1, 1))
    options = {"augment": augment, "batch_size": 1, "patches": 5}
    with make(tmp_path, **options) as loader, make(tmp_path, fast_decode=True, **options) as fast:
        exact, scaled = next(iter(loader)).patches, next(iter(fast)).patches
    assert (exact - scaled).abs().mean() < 0.02
    if _C.HAS_JPEG:
        assert not torch.equal(exact, scaled)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"patches": 0}, "patches must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"batch_size": 2.5}, "batch_size must be an integer, got 2.5"),
        ({"batch_size": 25}, r"24 images do not fill one batch.*drop_last=False"),
        ({"num_threads": -1}, "num_threads must be at least 0, got -1"),
        ({"batches_ahead": 0}, "batches_ahead must be at least 1, got 0"),
        ({"seed": -1}, "seed must be from 0 to 18446744073709551615, got -1"),
        ({"seed": 2**64}, "seed must be from 0"),
        ({"shuffle": 3}, "shuffle must be True or False, got 3"),
        ({"drop_last": None}, "drop_last must be True or False, got None"),
        ({"pin_memory": "yes"}, "pin_memory must be True or False, got 'yes'"),
        ({"fast_decode": 2}, "fast_decode must be True or False, got 2"),
        ({"max_pixels": 0}, "max_pixels must be at least 1, got 0"),
        ({"order": {"seed": 1}}, r"order must be of type Order, got \{'seed': 1\}"),
        ({"share": 4}, "share must be of type Share, got 4"),
        ({"rank": 2, "world_size": 2}, "rank must be less than world_size 2, got 2"),
        ({"sampler": "spiral"}, "sampler must be one of random, grid, center, got 'spiral'"),
        ({"sampler": "grid", "patches": 20}, "square number .* got 20: use 16 or 25"),
        ({"sampler": "center", "patches": 2}, "patches must be 1 with sampler"),
        ({"dtype": "float64"}, "dtype must be one of float32, .*got 'float64'"),
        ({"on_error": "ignore"}, "on_error must be one of raise, skip, got 'ignore'"),
        ({"indices": [24]}, "indices must be from 0 to 23, .*got 24 to 24"),
        ({"indices": []}, "at least one integer"),
        ({"augment": ()}, "at least one"),
        ({"augment": (AUGMENT, Augment(size=9))}, r"sizes \[8, 9\]"),
        (
            {"augment": dataclasses.replace(AUGMENT, interpolation="cubic")},
            "one of bilinear, bicubic, got 'cubic'",
        ),
        ({"augment": dataclasses.replace(AUGMENT, scale=(0.5, 0.2))}, "scale"),
        ({"augment": dataclasses.replace(AUGMENT, size=0)}, "patch size is 0 x 0"),
        ({"augment": dataclasses.replace(AUGMENT, size=8.5)}, "size must be an integer, got 8.5"),
        ({"augment": dataclasses.replace(AUGMENT, blur_kernel=4)}, "blur_kernel is 4"),
        ({"augment": 8}, "augment must be an Augment or a tuple of at least one, got 8"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else "",
)
def test_wrong_argument_is_named(array_source, options, text):
    with pytest.raises(ValueError, match=text):
        make(array_source, **options)


def test_set_epoch_counts_from_zero(array_source):
    with pytest.raises(ValueError, match="epoch must be from 0 to 4294967295, got -1"):
        make(array_source).set_epoch(-1)
