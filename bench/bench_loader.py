"""How fast is the data path: our loader compared with torchvision, kornia, FFCV and DALI.

All providers get the same JPEG files (in the page cache) and do the same work: before anything is
timed, the shapes and the statistics of the pixels of all providers are compared. Rounds are
interleaved. Cases:

  a  CIFAR images, 20 patches each, EMP-SSL's augmentation, 16 -> 32 pixels; CPU time per core
  b  ImageNet images, 20 patches each, the same augmentation, a tenth of the image -> 64 pixels
  c  decoding alone, per core
  d  our own scaling, 1 thread against --threads
  e  the classic single view: a random resized crop of 224 pixels, flipped and normalized, from
     JPEG to float32; wall-clock time at equal threads, on the original files and on smaller
     ones (short side 256, quality 90)

Cases a to c count CPU seconds, which other processes hardly affect; d and e count wall-clock time
and need a quiet machine. FFCV and DALI may be installed in an environment of their own:
--peer-python names its interpreter.
"""

from __future__ import annotations

import importlib.util
import io
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from bagssl_fast.augment import Augment
from baselines.loader import Job, RemoteRunner, Runner, Stats
from harness.common import OURS, Report, Timing, arguments, interleave, paint, quantiles
from harness.photographs import data_folder

# EMP-SSL blurs with Pillow, whose kernel is unlimited: 13 pixels are three sigma at the strongest.
EMP = Augment(size=32, scale=(0.25, 0.25), blur_kernel=13)
LARGE = Augment(size=64, scale=(0.1, 0.1), blur_kernel=13)
CLASSIC = Augment(
    size=224,
    scale=(0.08, 1.0),
    ratio=(3 / 4, 4 / 3),
    jitter_prob=0.0,
    grayscale_prob=0.0,
    blur_prob=0.0,
    solarize_prob=0.0,
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
)

ONE_CORE: dict[str, Any] = {"patches": 20, "threads": 1, "inline": True}


class Peer(NamedTuple):
    """A provider, the package that it needs and how that is installed."""

    open: str
    package: str
    install: str


TORCHVISION = "pip install torchvision"
FFCV = (
    "apt-get install libopencv-dev libturbojpeg0-dev pkg-config; pip install --no-deps ffcv "
    "opencv-python-headless fastargs assertpy imgcat terminaltables psutil pandas numba llvmlite"
)
PEERS = {
    "torchvision PIL": Peer("baselines.loader_torchvision:pil", "torchvision", TORCHVISION),
    "torchvision v2": Peer("baselines.loader_torchvision:v2_tensor", "torchvision", TORCHVISION),
    "kornia": Peer("baselines.loader_kornia:batched", "kornia", "pip install kornia"),
    "FFCV": Peer("baselines.loader_ffcv:open_loader", "ffcv", FFCV),
    "DALI": Peer(
        "baselines.loader_dali:open_loader", "nvidia.dali", "pip install nvidia-dali-cuda120"
    ),
}


def ours(job: Job) -> Callable[[], Iterator[Any]]:
    from bagssl_fast.data import BagLoader, Order, Threads, open_source

    loader = BagLoader(
        open_source(job.tar),
        batch_size=job.batch_size,
        patches=job.patches,
        augment=job.augment,
        order=Order(shuffle=False, drop_last=False),
        threads=Threads(job.threads),
    )
    epoch = iter(range(1 << 40))

    def batches() -> Iterator[Any]:
        loader.set_epoch(next(epoch))
        for batch in loader:
            yield batch.patches

    return batches


def corpus(source: Path, folder: Path, count: int, short_side: int = 0) -> Path:
    """Unpacks `count` evenly spread images of a tar, re-encoded where a short side is given."""
    from bagssl_fast.data import open_source

    images = open_source(source)
    for i in range(count):
        index = i * len(images) // count
        path = folder.joinpath("files", *Path(images.name(index)).parts[-2:])
        path.parent.mkdir(parents=True, exist_ok=True)
        data = bytes(images.read(index))
        path.write_bytes(reencoded(data, short_side) if short_side else data)
    with tarfile.open(folder / "images.tar", "w") as out:
        out.add(folder / "files", arcname=".")
    return folder


def is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of a package that contains the module
        return False


def reencoded(data: bytes, short_side: int) -> bytes:
    from PIL import Image

    image = Image.open(io.BytesIO(data)).convert("RGB")
    factor = min(1.0, short_side / min(image.size))
    width, height = (round(side * factor) for side in image.size)
    image.resize((width, height), Image.Resampling.LANCZOS).save(
        buffer := io.BytesIO(), "JPEG", quality=90
    )
    return buffer.getvalue()


class Bench:
    """The options, the corpora made so far and the report."""

    def __init__(self, options: Any, work: Path) -> None:
        self.options, self.work = options, work
        self.data = data_folder(options.data, work)
        self.report = Report("bench_loader", options.threads)
        self.rounds = min(options.rounds, 3) if options.quick else options.rounds
        self.seconds = 0.2 if options.quick else 0.5  # of a measurement, at least
        self.absent: set[str] = set()

    def count(self, quick: int, full: int) -> int:
        """How many images a case uses."""
        return self.options.images or (quick if self.options.quick else full)

    def job(self, tar: str, count: int, augment: Augment, short_side: int = 0, **more: Any) -> Job:
        folder = self.work / f"{Path(tar).stem}-{count}-{short_side}"
        if not folder.exists():
            corpus(self.data / tar, folder, count, short_side)
        return Job(str(folder / "files"), str(folder / "images.tar"), augment, **more)

    def open(self, name: str, job: Job) -> Runner | RemoteRunner | None:
        """Opens a provider here, or in the peers' Python, or prints how to install it."""
        if name == OURS:
            return Runner(ours, job)
        peer = PEERS[name]
        if self.options.providers and name not in self.options.providers:
            return None
        try:
            if is_installed(peer.package):
                return Runner(peer.open, job)
            if self.options.peer_python:
                return RemoteRunner(self.options.peer_python, peer.open, job)
        except ImportError as error:
            print(paint(f"  {name}: {error}", "yellow"))
        if name not in self.absent:
            print(paint(f"  {name} is not installed: {peer.install}", "yellow"))
        self.absent.add(name)
        return None

    def compare(
        self,
        case: str,
        title: str,
        job: Job,
        floors: Mapping[str, float | None],
        clocks: tuple[str, ...],
        unit: str,
    ) -> dict[str, list[Timing]]:
        """Checks that all do the same work, then times them; floors apply to the first clock."""
        runners = {name: self.open(name, job) for name in (OURS, *floors)}
        running = {name: runner for name, runner in runners.items() if runner}
        self.same_work(case, {name: runner.check() for name, runner in running.items()})
        calls = {name: runner.run for name, runner in running.items()}
        times = interleave(calls, self.rounds, min_seconds=self.seconds)
        for runner in running.values():
            runner.close()
        for clock in clocks:
            metric = f"{unit} per {'core' if clock == 'cpu' else 'second'}"
            for name, timings in times.items():
                if clock == "cpu" and name.startswith("torchvision") and not job.inline:
                    continue  # its work is done in worker processes
                rates = [1 / getattr(t, clock) for t in timings]
                self.report.add(case, name, metric, rates, f"{unit}/s")
            self.report.table(
                case,
                metric,
                floors={k: v for k, v in floors.items() if v} if clock == clocks[0] else {},
                larger_is_better=True,
                title=f"{title}: {unit}/s" + (" of CPU time, per core" if clock == "cpu" else ""),
            )
        return times

    def same_work(self, case: str, stats: dict[str, Stats]) -> None:
        """Equal shapes and types; means and deviations within their sampling errors."""
        mine = stats[OURS]
        for name, theirs in stats.items():
            if (theirs.shape, theirs.dtype) != (mine.shape, mine.dtype):
                raise SystemExit(f"{case}: {name} gives {theirs}, ours {mine}: not the same work")
            self.report.add(case, name, "mean pixel", [theirs.mean], "normalized")
            self.report.add(case, name, "pixel deviation", [theirs.std], "normalized")
            for what in ("mean", "std"):
                error = abs(getattr(mine, what) - getattr(theirs, what))
                sampling = sum(getattr(s, f"{what}_error") ** 2 for s in (mine, theirs)) ** 0.5
                # Interpolation and blur differ between providers by a few percent.
                self.report.parity(case, f"{name} {what}", error, 4 * sampling + 0.02 * mine.std)


def case_a(bench: Bench) -> None:
    many_patches(
        bench,
        "a",
        "CIFAR, P=20, EMP-SSL's augmentation, 16 -> 32",
        bench.job("cifar10-train.tar", bench.count(32, 64), EMP, batch_size=32, **ONE_CORE),
        floor=40.0,
    )


def case_b(bench: Bench) -> None:
    many_patches(
        bench,
        "b",
        "ImageNet, P=20, EMP-SSL's augmentation, a tenth -> 64",
        bench.job("imagenet-sample.tar", bench.count(16, 32), LARGE, batch_size=16, **ONE_CORE),
        floor=5.0,
    )


def many_patches(bench: Bench, case: str, title: str, job: Job, floor: float) -> None:
    """Patches per second of CPU time, compared with torchvision's two pipelines and kornia."""
    floors = {"torchvision PIL": floor, "torchvision v2": floor, "kornia": None}
    times = bench.compare(case, f"{case}  {title}", job, floors, ("cpu",), "patches")
    decode_share(bench, case, job, times)


def case_c(bench: Bench) -> None:
    from baselines import loader_decode

    count = bench.count(32, 320)
    job = bench.job("imagenet-sample.tar", count, CLASSIC, patches=1, batch_size=32)
    files = loader_decode.read(job)
    files *= -(-64 // len(files))  # one pass must be long enough for buffers to be reused
    decoders = {OURS: loader_decode.ours(), **loader_decode.decoders()}
    for name, decoder in decoders.items():
        error = loader_decode.largest_difference(decoder, files[:16])
        bench.report.parity("c", name, error, 0.0 if name == OURS else 2.0)
    calls = {name: partial(decoder.many, files) for name, decoder in decoders.items()}
    for name, times in interleave(calls, bench.rounds).items():
        rates = [len(files) / t.cpu for t in times]
        bench.report.add("c", name, "images per core", rates, "images/s")
    title = "c  decoding ImageNet JPEGs to RGB: images/s of CPU time, per core"
    bench.report.table(
        "c", "images per core", floors={"simplejpeg": 1.0}, larger_is_better=True, title=title
    )


def case_d(bench: Bench) -> None:
    counts = (bench.count(1024, 4096), bench.count(64, 320))
    many = max(2, bench.options.threads)
    for letter, tar, count, augment, patches in (
        ("a", "cifar10-train.tar", counts[0], EMP, 20),
        ("b", "imagenet-sample.tar", counts[1], LARGE, 20),
        ("e", "imagenet-sample.tar", counts[1], CLASSIC, 1),
    ):
        job = bench.job(tar, count, augment, patches=patches, batch_size=32)
        names = {f"{threads} thread{'s' * (threads > 1)}": threads for threads in (1, many)}
        calls = {
            name: Runner(ours, Job(**{**vars(job), "threads": threads})).run
            for name, threads in names.items()
        }
        case = f"d, work of {letter}"
        for name, times in interleave(calls, bench.rounds, min_seconds=bench.seconds).items():
            rates = [1 / t.wall for t in times]
            bench.report.add(case, name, "patches per second", rates, "patches/s")
            bench.report.add(case, name, "CPU time", [t.cpu * 1e6 for t in times], "us/patch")
        first, last = names
        bench.report.table(
            case,
            "patches per second",
            ours=last,
            floors={first: 1.8 if many == 2 else 0.9 * many},
            larger_is_better=True,
            title=f"{case}: {last} against {first}, wall-clock time",
        )


def case_e(bench: Bench) -> None:
    count = bench.count(96, 320)
    floors = {"FFCV": 1.3, "DALI": 1.5, "torchvision PIL": None, "torchvision v2": None}
    # FFCV compiles for seconds whenever it is opened: --quick uses one number of threads.
    thread_counts = sorted({1, bench.options.threads})[-1 if bench.options.quick else 0 :]
    for kind, short_side in (("originals", 0), ("short side 256", 256)):
        for threads in thread_counts:
            job = bench.job(
                "imagenet-sample.tar",
                count,
                CLASSIC,
                short_side,
                patches=1,
                batch_size=32,
                threads=threads,
            )
            case = f"e, {kind}, {threads} thread{'s' * (threads > 1)}"
            title = f"{case}: crop to 224, flip, normalize"
            clocks = ("wall", "cpu")
            times = bench.compare(case, title, job, floors, clocks, "images")
            decode_share(bench, case, job, times)


def decode_share(bench: Bench, case: str, job: Job, times: dict[str, list[Timing]]) -> None:
    """Our CPU time per image, compared with that of only decoding all of it."""
    from baselines import loader_decode

    files = loader_decode.read(job)
    decode = partial(loader_decode.decoders()["simplejpeg"].many, files)
    timings = interleave({"simplejpeg": decode}, 3, min_seconds=0.1)["simplejpeg"]
    full = [t.cpu / len(files) * 1e6 for t in timings]
    whole = [t.cpu * job.patches * 1e6 for t in times[OURS]]
    bench.report.add(case, "simplejpeg", "decode alone", full, "us/image")
    bench.report.add(case, OURS, "CPU time", whole, "us/image")
    mine, theirs = quantiles(whole)[0], quantiles(full)[0]
    print(
        f"  ours: {mine:,.0f} us of CPU time per image, {mine / theirs:.2f} times a full decode by "
        f"simplejpeg ({theirs:,.0f} us)"
    )


CASES = {"a": case_a, "b": case_b, "c": case_c, "d": case_d, "e": case_e}


def main() -> None:
    parser = arguments(__doc__, data=True)
    parser.add_argument("--cases", default="a,b,c,d,e", help="which, separated by commas")
    parser.add_argument("--peer-python", metavar="PATH", help="a Python that has FFCV and DALI")
    parser.add_argument(
        "--providers", nargs="*", choices=[*PEERS], help="only these besides ours (default: all)"
    )
    parser.add_argument("--images", type=int, help="images per case (default: its own number)")
    options = parser.parse_args()
    if unknown := set(options.cases.split(",")) - set(CASES):
        parser.error(f"--cases {','.join(sorted(unknown))}: there are {','.join(CASES)}")
    with tempfile.TemporaryDirectory(prefix="bench_loader_") as work:
        bench = Bench(options, Path(work))
        for case in options.cases.split(","):
            CASES[case](bench)
        bench.report.save(options.json, options.csv)


if __name__ == "__main__":
    main()
