"""Patches cut where the images were sent: the same views and pixels as the loader's own."""

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bags import AUGMENT, PLAIN, bags, make, same, write_folder
from pictures import noise

from bagssl_fast import _C
from bagssl_fast.data import Batch, ImageBatch, open_source
from bagssl_fast.data.feed import prefetch


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(params=["color array", "gray array", "files of two formats"])
def source(request, tmp_path) -> Any:
    if "array" in request.param:
        images = noise()
        return open_source(images if "color" in request.param else images[..., :1].copy())
    return open_source(write_folder(tmp_path / "set"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "uint8"])
def test_pixels_are_those_of_the_host(source, dtype):
    odd = dataclasses.replace(AUGMENT, solarize_prob=0.5, scale=(0.1, 0.9), ratio=(0.5, 2.0))
    options = {"augment": (AUGMENT, odd), "dtype": dtype, "seed": 3, "drop_last": False}
    with make(source, **options) as host, make(source, views="device", **options) as device:
        for _ in range(2):  # epochs: pixel buffers grow in the first and fit in the second
            same(bags(host), bags(device))


def test_views_are_those_of_the_public_draw(source):
    with make(source, views="device", seed=5) as loader:
        batch = next(iter(loader))
    shapes = np.array([source.decode(i).shape[:2] for i in batch.index.tolist()])
    drawn = torch.from_numpy(
        _C.draw_views([AUGMENT], shapes, batch.index.numpy(), patches=3, seed=5, epoch=0)
    )
    assert torch.equal(batch.params[..., 2:], drawn[..., 2:])
    # Boxes count from where the decoded part begins, the same for all patches of an image.
    corner = drawn[..., :2] - batch.params[..., :2]
    assert torch.equal(corner, corner[:1].expand_as(corner)) and corner.min() >= 0
    for b, image in enumerate(batch.images.unpack()):
        whole = torch.from_numpy(source.decode(batch.index[b].item()))
        for p in range(3):
            assert torch.equal(crop(image, batch.params[p, b]), crop(whole, drawn[p, b]))


def crop(image: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
    top, left, height, width = row[:4].int().tolist()
    return image[top : top + height, left : left + width]


def test_batch_stays_while_the_next_one_is_taken_and_clone_stays_for_ever(source):
    with make(source, batch_size=2, views="device") as loader:
        previous, kept = None, []
        for batch in loader:
            if previous is not None:
                assert torch.equal(previous[0].patches, previous[1].patches)
            previous = batch, batch.clone()
            kept.append(previous[1].patches)
        for batch, patches in zip(make(source, batch_size=2), kept, strict=True):
            assert torch.equal(batch.patches, patches)


def test_small_last_batches_and_empty_ones(source):
    # 24 images over 5 ranks of 3: the last 9 are dealt out, some ranks get one, some two.
    options = {"batch_size": 3, "world_size": 5, "drop_last": False}
    for rank in range(5):
        with make(source, rank=rank, **options) as host:
            expected = [batch.clone() for batch in host]
        with make(source, rank=rank, views="device", **options) as device:
            for batch, needed in zip(device, expected, strict=True):
                assert torch.equal(batch.patches, needed.patches)
    three = open_source(noise()[:3])
    with make(three, batch_size=1, world_size=2, drop_last=False, views="device") as loader:
        assert [batch.patches.shape[1] for batch in loader] == [1, 0]


def test_broken_images_are_replaced_alike(tmp_path):
    folder = write_folder(tmp_path / "set")
    broken = sorted(folder.rglob("*.jpg"))[1]
    broken.write_bytes(broken.read_bytes()[:40])
    source = open_source(folder)
    with (
        make(source, on_error="skip") as host,
        make(source, on_error="skip", views="device") as device,
    ):
        for a, b in zip(host, device, strict=True):
            assert torch.equal(a.index, b.index) and torch.equal(a.patches, b.patches)
        assert [Path(name).name for name, _ in device.skipped] == [broken.name]


def test_what_one_call_cannot_cut_is_refused():
    source = open_source(noise())
    with pytest.raises(ValueError, match='views="host"'):
        other = dataclasses.replace(AUGMENT, blur_kernel=5)
        make(source, augment=(AUGMENT, other), views="device")
    with pytest.raises(ValueError, match="views must be one of host, device, got 'gpu'"):
        make(source, views="gpu")
    with pytest.raises(ValueError, match="blur_kernel 17 is too large for patches of 8"):
        make(source, augment=dataclasses.replace(AUGMENT, blur_kernel=17), views="device")
    blurless = dataclasses.replace(PLAIN, blur_kernel=17)
    with make(source, augment=blurless, views="device") as loader:
        assert next(iter(loader)).patches.shape == (3, 4, 3, 8, 8)


# The way to a GPU, with something in the GPU's place


class FakeCuda:
    """Streams and events that write down what happens, in order."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.events = 0
        self.now = "main"

    def Stream(self, device: torch.device) -> "FakeStream":
        return FakeStream(self, "side")

    @contextlib.contextmanager
    def stream(self, stream: "FakeStream") -> Iterator[None]:
        self.now, before = stream.name, self.now
        yield
        self.now = before

    def current_stream(self, device: torch.device) -> "FakeStream":
        return FakeStream(self, self.now)


class FakeStream:
    def __init__(self, cuda: FakeCuda, name: str) -> None:
        self.cuda, self.name = cuda, name

    def record_event(self) -> "FakeEvent":
        event = FakeEvent(self.cuda, self.cuda.events)
        self.cuda.events += 1
        self.cuda.log.append(f"{self.name} records {event.number}")
        return event

    def wait_event(self, event: "FakeEvent") -> None:
        self.cuda.log.append(f"{self.name} waits for {event.number}")


class FakeEvent:
    def __init__(self, cuda: FakeCuda, number: int) -> None:
        self.cuda, self.number = cuda, number

    def synchronize(self) -> None:
        self.cuda.log.append(f"host waits for {self.number}")


@pytest.mark.parametrize("views", ["host", "device"])
def test_batches_travel_one_step_ahead(views, monkeypatch):
    cuda, kind = FakeCuda(), ImageBatch if views == "device" else Batch
    move = kind.to

    def to(self: Any, device: Any, non_blocking: bool = False) -> Any:
        assert non_blocking and cuda.now == "side"
        cuda.log.append("copies")
        return move(self, device, non_blocking)

    monkeypatch.setattr(kind, "to", to)
    monkeypatch.setattr(
        torch.Tensor, "record_stream", lambda x, s: cuda.log.append(f"kept for {s.name}")
    )
    source = open_source(noise())
    with make(source, views="host", batch_size=8) as loader:
        expected = [batch.patches.clone() for batch in loader]
    with make(source, views=views, batch_size=8) as loader:
        got = []
        for patches in prefetch(loader, torch.device("cpu"), cuda):
            cuda.log.append("works")
            got.append(patches.clone())
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    take = ["main waits for {0}", "kept for main", "works"]
    send = ["copies", "side records {0}"]
    needed = [line.format(0) for line in [*send, "host waits for {0}"]]
    for n in (1, 2):  # the next batch is on its way before the work on this one begins
        needed += [line.format(n) for line in send] + [line.format(n - 1) for line in take]
        needed += [f"host waits for {n}"]  # then the loader may have the memory
    assert cuda.log == needed + [line.format(2) for line in take]
