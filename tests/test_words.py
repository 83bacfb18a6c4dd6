"""Words that this project gave up stay away: British spelling, phrases that readers tripped on."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("bagssl_fast", "kernels", "csrc", "bench", "tests", "hub", "configs", "docs", "scripts")
SUFFIXES = {".py", ".pyi", ".cpp", ".h", ".md", ".yaml", ".toml", ".json", ".csv", ".txt", ".sh"}

# The word, and what stands in its place.
GIVEN_UP = {
    r"colour\w*": "color",
    r"(neighb|behavi|fav)our\w*": "neighbor, behavior, favor",
    r"centre[sd]?|centring": "center, centered, centering",
    r"(un)?labell(ed|ing)|modell(ed|ing)": "labeled, modeled",
    r"grey\w*": "gray",
    r"learnt|licence|catalogue": "learned, license, catalog",
    r"\w*(normal|initial|optim|standard|synchron|regular|material|vector|penal|minim|maxim|general"
    r"|serial|organ|local|visual|parametr|quant|real|util|character|recogn|summar)is(e|ed|es|er|ers"
    r"|ing|ation|ations)": "-ize, -ization",
    r"wanted": "expected",
    r"way.out": "how to fix it, or simply the fix",
    r"by the wall": "wall-clock",
    r"to the bit": "bit-for-bit",
    r"is no json": "is not valid JSON",
    r"anew|afresh": "again, from scratch",
    r"quicker steps?|a lower end": "faster steps, lower final accuracy",
}


def texts() -> list[Path]:
    found = [p for p in ROOT.iterdir() if p.is_file() and p.suffix in SUFFIXES]
    for folder in FOLDERS:
        found += [p for p in (ROOT / folder).rglob("*") if p.suffix in SUFFIXES]
    return [p for p in found if p.name != Path(__file__).name and "__pycache__" not in p.parts]


@pytest.mark.parametrize("pattern", GIVEN_UP)
def test_given_up_words_stay_away(pattern: str) -> None:
    search = re.compile(rf"(?<![a-z])({pattern})(?![a-z])", re.I)
    hits = []
    for path in texts():
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            if match := search.search(line):
                hits.append(f"{path.relative_to(ROOT)}:{number}: {match[0]}")
    assert not hits, f"write {GIVEN_UP[pattern]!r}:\n" + "\n".join(hits)


def test_the_texts_are_really_read() -> None:
    names = {path.relative_to(ROOT).as_posix() for path in texts()}
    assert {"README.md", "csrc/loader.cpp", "kernels/vicreg.py", "configs/demo.yaml"} <= names
