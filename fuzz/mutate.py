"""Mutations of a file: the same for the same target, seed and number, on every machine."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from random import Random

_EDGES = (0, 1, -1, 2, 7, 8, 127, 128, 255, 256, 511, 512, 32767, 32768, 65535, 65536)
_WIDE = (2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1)
_FORMATS = ("B", "<H", ">H", "<I", ">I", "<Q", ">Q")
_TEXTS = (
    b"../",
    b"/",
    b"\0",
    b"%s",
    b"-1",
    b"1e309",
    b"nan",
    b"77777777777",
    b"18446744073709551616",
)


def mutated(seeds: Sequence[bytes], random: Random) -> bytes:
    """One of the seeds with one to eight changes."""
    data = bytearray(random.choice(seeds))
    for _ in range(random.choice((1, 1, 1, 2, 2, 3, 5, 8))):
        if not data:
            data += b"\0"
        random.choice(_CHANGES)(data, seeds, random)
    return bytes(data)


def _flip_bit(data: bytearray, _: Sequence[bytes], random: Random) -> None:
    data[random.randrange(len(data))] ^= 1 << random.randrange(8)


def _set_byte(data: bytearray, _: Sequence[bytes], random: Random) -> None:
    data[random.randrange(len(data))] = random.randrange(256)


def _set_number(data: bytearray, _: Sequence[bytes], random: Random) -> None:
    kind = random.choice(_FORMATS)
    size = struct.calcsize(kind)
    number = random.choice(_EDGES + _WIDE) % (1 << (8 * size))
    at = random.randrange(len(data))
    data[at : at + size] = struct.pack(kind, number)


def _set_digits(data: bytearray, _: Sequence[bytes], random: Random) -> None:
    at = random.randrange(len(data))
    digits = bytes(random.choice(b"0123456789") for _ in range(random.randrange(1, 13)))
    data[at : at + len(digits)] = digits


def _insert_text(data: bytearray, _: Sequence[bytes], random: Random) -> None:
    at, text = random.randrange(len(data)), random.choice(_TEXTS)
    data[at : at + random.choice((0, len(text)))] = text


def _remove(data: bytearray, _: Sequence[bytes], random: Random) -> None:
    at = random.randrange(len(data))
    del data[at : at + _length(data, random)]


def _repeat(data: bytearray, _: Sequence[bytes], random: Random) -> None:
    at = random.randrange(len(data))
    data[at:at] = data[at : at + _length(data, random)] * random.choice((1, 1, 2, 9))


def _clear(data: bytearray, _: Sequence[bytes], random: Random) -> None:
    at = random.randrange(len(data))
    count = min(_length(data, random), len(data) - at)
    data[at : at + count] = bytes([random.choice((0, 0, 255, 32))]) * count


def _splice(data: bytearray, seeds: Sequence[bytes], random: Random) -> None:
    other = random.choice(seeds) or b"\0"
    at, from_ = random.randrange(len(data)), random.randrange(len(other))
    part = other[from_ : from_ + _length(other, random)]
    data[at : at + random.choice((0, len(part)))] = part


def _cut(data: bytearray, _: Sequence[bytes], random: Random) -> None:
    del data[random.randrange(len(data)) :]


def _length(data: bytes | bytearray, random: Random) -> int:
    return random.choice((1, 2, 4, 8, 16, 64, 512, 1 + random.randrange(len(data))))


_CHANGES: tuple[Callable[[bytearray, Sequence[bytes], Random], None], ...] = (
    _flip_bit,
    _set_byte,
    _set_number,
    _set_number,
    _set_digits,
    _insert_text,
    _remove,
    _repeat,
    _clear,
    _splice,
    _cut,
)
