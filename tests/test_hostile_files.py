"""Files made to harm the reader: pickles, index caches, bombs, labels; and the ways in."""

import ast
import gzip
import io
import json
import os
import pickle
import struct
import tracemalloc
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from bags import make
from pictures import jpeg, noise, write_tar

import bagssl_fast
from bagssl_fast import _C, cli
from bagssl_fast.data import open_source
from bagssl_fast.models.bag_model import build_model


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """Every test has a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


# Pickles


class Calls:
    """Pickles as a call of `function`."""

    def __init__(self, function, *args, state=None):
        self.call = (function, args) if state is None else (function, args, state)

    def __reduce__(self):
        return self.call


def memo_index(index: int) -> bytes:
    """A pickle that remembers None at an index for which the reader in C makes room."""
    return b"\x80\x02Nr" + struct.pack("<I", index) + b"."


def with_dtype(code: str) -> bytes:
    """A batch whose data are an array of `code` and 4 x 8 bytes of the file's choice."""
    array = np.arange(4, dtype=np.int64)
    return pickle.dumps({"data": array, "labels": [0]}, protocol=2).replace(
        b"X\x02\x00\x00\x00i8", b"X\x02\x00\x00\x00" + code.encode()
    )


PICKLES = {
    "a call of the system": pickle.dumps({"data": Calls(os.system, "true")}),
    # Dereferences an address of the file's choice in numpy's own constructor.
    "an array of objects": pickle.dumps(
        {"data": Calls(np.ndarray, (4,), "O", bytes(range(32))), "labels": [0]}
    ),
    "objects by a dtype": with_dtype("O8"),
    "text by a dtype": with_dtype("U2"),
    "a dtype's own state": pickle.dumps(
        {"data": Calls(np.dtype, "O", state=(3, "|", None, None, None, -1, -1, 0))}
    ),
    "a memo of 2^31": memo_index(2**31),
    "a length of 2^62": b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b"abc.",
    "nothing": b"",
    "a list": pickle.dumps([1, 2]),
    "no data": pickle.dumps({"labels": [1]}),
    "rows of another length": pickle.dumps(
        {"data": np.zeros((1, 3071), np.uint8), "labels": [1]}, protocol=2
    ),
    "labels of text": pickle.dumps({"data": np.zeros((1, 3072), np.uint8), "labels": ["1"]}),
    "a label of 2^40": pickle.dumps({"data": np.zeros((1, 3072), np.uint8), "labels": [2**40]}),
    "a negative shape": pickle.dumps(
        {"data": np.zeros((1, 3072), np.uint8), "labels": [1]}, protocol=2
    ).replace(b"K\x01M\x00\x0c\x86", b"J\xff\xff\xff\xffM\x00\x0c\x86"),
}


@pytest.mark.parametrize("kind", PICKLES)
def test_pickle_is_refused_by_name(tmp_path, kind):
    (tmp_path / "data_batch_1").write_bytes(PICKLES[kind])
    with pytest.raises(ValueError, match=r"data_batch_1: not a CIFAR batch \(.+\)"):
        open_source(tmp_path)


def test_a_pickle_leaves_nothing_behind_for_the_next(tmp_path):
    """Guards against stand-ins that one file could change for another."""
    # BUILD with (None, {name: value}) sets attributes of whatever is on the stack.
    poisoned = b"\x80\x02cnumpy\ndtype\n(N}U\x0c__setstate__K\x05stb."
    (tmp_path / "data_batch_1").write_bytes(poisoned)
    with pytest.raises(ValueError, match="not a CIFAR batch"):
        open_source(tmp_path)
    batch = {"data": np.zeros((2, 3072), np.uint8), "labels": [1, 2]}
    for name in [*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"]:
        (tmp_path / name).write_bytes(pickle.dumps(batch, protocol=2))
    assert len(open_source(tmp_path)) == 10


def cifar(folder: Path, batch) -> Path:
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        (folder / name).write_bytes(pickle.dumps(batch, protocol=2))
    return folder


@pytest.mark.parametrize(
    "data",
    [
        Calls(np.ndarray, (4,), "O", b"\x41" * 32),
        Calls(np.ndarray, (4,), "u1", b"\x41" * 32),
        Calls(np.dtype, "O"),
        np.array([None, None], object),
        np.zeros((4, 3072), np.float64),
        np.zeros((4, 100), np.uint8),
        np.zeros((5, 3072), np.uint8),
        [1, 2],
    ],
    ids=["address", "ndarray", "dtype", "objects", "floats", "size", "count", "list"],
)
def test_pickles_of_anything_but_pixels_are_refused(tmp_path, data):
    folder = cifar(tmp_path, {"data": data, "labels": [0, 1, 2, 3]})
    with pytest.raises(ValueError, match="data_batch_1: not a CIFAR batch"):
        open_source(folder)


@pytest.mark.parametrize("cut", [1, 50, 2000])
def test_damaged_pickles_are_named(tmp_path, cut):
    batch = {"data": np.zeros((4, 3072), np.uint8), "labels": [0, 1, 2, 3]}
    cifar(tmp_path, batch)
    assert len(open_source(tmp_path)) == 20
    whole = (tmp_path / "data_batch_3").read_bytes()
    (tmp_path / "data_batch_3").write_bytes(whole[cut:])
    with pytest.raises(ValueError, match="data_batch_3: not a CIFAR batch"):
        open_source(tmp_path)


# Cached indices


def cached_index(tmp_path: Path) -> tuple[Path, Path]:
    """A tar of three images and the file with its cached index."""
    tar = write_tar(tmp_path / "set.tar", [(f"{c}/a.jpg", jpeg(noise(1)[0])) for c in "xyz"])
    open_source(tar)
    (file,) = Path(os.environ["XDG_CACHE_HOME"]).rglob("*.npz")
    return tar, file


def rewrite(file: Path, **changes) -> None:
    """Saves the cached index with some of its arrays replaced."""
    with np.load(file) as saved:
        arrays = {name: saved[name] for name in saved.files}
    np.savez(file, **{**arrays, **changes})


def meta(**changes) -> np.ndarray:
    content = {"classes": ["x", "y", "z"], "numbered": False, **changes}
    return np.frombuffer(json.dumps(content).encode(), np.uint8)


CHANGES = {
    "an offset behind the end": {"offsets": np.array([0, 10, 1 << 40])},
    "a negative offset": {"offsets": np.array([0, -512, 0])},
    "a negative size": {"sizes": np.array([1, -1, 1])},
    "a size of 2^62": {"sizes": np.array([10, 2**62, 10])},
    "sizes that overflow": {"sizes": np.array([1, 1, 2**63 - 1]), "offsets": np.array([0, 0, 9])},
    "too few offsets": {"offsets": np.array([0])},
    "too few sizes": {"sizes": np.array([10])},
    "floats": {"offsets": np.array([0.0, 1.0, 2.0])},
    "fractions": {"offsets": np.array([0.5, 0.5, 0.5])},
    "names that end behind the block": {"name_ends": np.array([1, 2, 4000])},
    "names in reverse": {"name_ends": np.array([9, 3, 21])},
    "a label without a class": {"labels": np.array([0, 1, 7])},
    "classes of numbers": {"meta": meta(classes=[1, 2, 3])},
    "numbered classes of text": {"meta": meta(numbered=True)},
    "deep JSON": {"meta": np.frombuffer(b"[" * 100_000, np.uint8)},
    "a list": {"meta": np.frombuffer(b"[]", np.uint8)},
    "pickled objects": {"offsets": np.array([{}], object)},
}


def unknown_compression(data: bytearray) -> None:
    for place in (data.find(b"PK\3\4") + 8, data.find(b"PK\1\2") + 10):
        data[place] = 77


def cleared(data: bytearray) -> None:
    data[60:90] = bytes(30)


@pytest.mark.parametrize("kind", [*CHANGES, unknown_compression, cleared])
def test_index_in_doubt_is_made_again(tmp_path, kind):
    tar, file = cached_index(tmp_path)
    first, whole = open_source(tar), file.read_bytes()
    if kind in CHANGES:
        rewrite(file, **CHANGES[kind])
    else:
        data = bytearray(whole)
        kind(data)
        file.write_bytes(data)
    source = open_source(tar)
    assert source.classes == ["x", "y", "z"] and source.name(2).endswith("set.tar/z/a.jpg")
    assert source.fingerprint == first.fingerprint and source.read(1) == first.read(1)
    assert source.decode(2).shape == (20, 26, 3)
    assert _C.index_tar(os.fsencode(tar))["damage"] == ""
    with np.load(file) as again:  # the next opening is quick again
        assert again["offsets"].tolist() == np.load(io.BytesIO(whole))["offsets"].tolist()


def test_index_with_a_broken_zip_entry_is_made_again(tmp_path):
    """Guards the NotImplementedError of a compression that zipfile does not know."""
    tar, file = cached_index(tmp_path)
    whole = file.read_bytes()
    for at in range(0, len(whole), 37):
        broken = bytearray(whole)
        broken[at] ^= 0x55
        file.write_bytes(bytes(broken))
        assert open_source(tar).classes == ["x", "y", "z"]


def test_index_that_would_grow_is_not_unpacked(tmp_path):
    tar, file = cached_index(tmp_path)
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as bomb:
        bomb.writestr("names.npy", bytes(50 << 20))
    assert open_source(tar).classes == ["x", "y", "z"]


# Files of a run


@pytest.mark.parametrize("value", ["", " 5", " [1]"])
def test_a_section_without_options_is_refused_by_name(tmp_path, value):
    """Guards jsonargparse's TypeError about functools.partial."""
    path = tmp_path / "config.yaml"
    path.write_text(f"data: demo\nbag:{value}\n")
    with pytest.raises(ValueError, match=r"config\.yaml: bag has no options"):
        cli.load(path)


def test_an_unknown_head_is_refused_by_name():
    config = cli.parse(["--data", "demo"])
    other = replace(config, head=replace(config.head, name="projuctor"))
    with pytest.raises(
        ValueError, match=r"head\.name is 'projuctor', expected one of projector, emp"
    ):
        build_model(other)


# Arrays that inflate


def npz_of(path: Path, shape: tuple[int, ...], size: int) -> Path:
    """Images of zeros: the shape that their header names, and the bytes that there are."""
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("images.npy", "w", force_zip64=True) as member,
    ):
        np.lib.format.write_array_header_1_0(member, header)
        for _ in range(size >> 20):
            member.write(bytes(1 << 20))
    return path


def test_an_npz_that_inflates_a_thousandfold_is_not_inflated(tmp_path):
    """2 MB took 2.5 GB."""
    path = npz_of(tmp_path / "bomb.npz", (300, 1024, 1024), 300 << 20)
    tracemalloc.start()
    text = (
        r"bomb\.npz: \d+ bytes would inflate to 314572928, 10\d\d times as many, .* of 200: raise"
    )
    with pytest.raises(ValueError, match=text):
        open_source(path)
    with pytest.raises(ValueError, match="max_inflation"):
        make(path)
    assert tracemalloc.get_traced_memory()[1] < 32 << 20
    tracemalloc.stop()
    assert len(open_source(path, max_inflation=2000)) == 300
    small = npz_of(tmp_path / "small.npz", (20, 1024, 1024), 20 << 20)  # black images, no bomb
    assert len(open_source(small)) == 20


@pytest.mark.parametrize("count", [2, 10**6, 10**12])
def test_an_npz_header_that_promises_more_is_refused_before_memory_is_taken(tmp_path, count):
    """It was a MemoryError with a traceback, or an allocation of that size."""
    path = npz_of(tmp_path / "set.npz", (count, 1024, 1024), 1 << 20)
    with pytest.raises(ValueError, match=r"set\.npz: images\.npy .* more than its \d+ bytes"):
        open_source(path)


def test_an_idx_file_does_not_take_what_its_header_promises(tmp_path):
    header = b"\0\0\x08\x03" + struct.pack(">3i", 2**20, 2**10, 2**10)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(b"\0\0\x08\x01" + struct.pack(">i", 0))
    images = tmp_path / "train-images-idx3-ubyte"
    images.write_bytes(header)
    with pytest.raises(ValueError, match="expected 1099511627776 values, got 0"):
        open_source(tmp_path)
    images.unlink()
    images.with_suffix(".gz").write_bytes(gzip.compress(header))
    with pytest.raises(ValueError, match="would inflate to 1099511627776"):
        open_source(tmp_path)


# Labels


@pytest.mark.parametrize("label", [5_000_000, 10**18 - 1, 2**63 - 1, 10**30])
def test_a_class_number_does_not_make_millions_of_names(tmp_path, label):
    image = jpeg(noise(1)[0])
    members = [("a.jpg", image), ("a.cls", str(label).encode()), ("b.jpg", image), ("b.cls", b"0")]
    tar = write_tar(tmp_path / "set.tar", members)
    refusal = rf'label {label}: .* without gaps.*ignore them \(labels="none"\)'
    with pytest.raises(ValueError, match=refusal):
        open_source(tar)
    ignored = open_source(tar, labels="none")
    assert ignored.classes is None and ignored.labels is None
    if label < 2**63:
        with pytest.raises(ValueError, match=refusal):
            open_source(np.zeros((2, 4, 4, 3), np.uint8), labels=[0, label])


def test_a_long_class_member_is_refused(tmp_path):
    members = [("0.jpg", jpeg(noise(1)[0])), ("0.cls", b"7" * 5000)]
    with pytest.raises(ValueError, match=r"set\.tar.*\.cls member of 5000 bytes"):
        open_source(write_tar(tmp_path / "set.tar", members))


# The ways in


RUNS_CODE = {"eval", "exec", "compile", "__import__", "os.system", "os.popen"}
LOADERS_OF_CODE = ("pickle", "marshal", "shelve", "dill", "joblib", "yaml")


def runs_what_it_reads(name: str, given: dict[str | None, str]) -> bool:
    """Whether a call of `name` with these keywords may run what a file says."""
    module, _, function = name.rpartition(".")
    return (
        name in RUNS_CODE
        or (module in LOADERS_OF_CODE and function in ("load", "loads", "load_all", "Unpickler"))
        or (name == "torch.load" and given.get("weights_only") != "True")
        or given.get("allow_pickle", "False") != "False"
        or "shell" in given
    )


def test_nothing_read_from_disk_is_executed():
    root = Path(bagssl_fast.__file__).parent
    problems = []
    for path in sorted(root.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                given = {k.arg: ast.unparse(k.value) for k in node.keywords}
                name = ast.unparse(node.func)
                if runs_what_it_reads(name, given):
                    problems.append(f"{path.relative_to(root)}:{node.lineno}: {name}")
    assert problems == []


def test_the_scan_finds_what_it_looks_for():
    for call in (
        "pickle.load(f)",
        "yaml.load(f)",
        "eval(x)",
        "torch.load(f)",
        "torch.load(f, weights_only=False)",
        "np.load(f, allow_pickle=True)",
        "run(x, shell=True)",
    ):
        node = ast.parse(call).body[0].value
        given = {k.arg: ast.unparse(k.value) for k in node.keywords}
        assert runs_what_it_reads(ast.unparse(node.func), given), call
