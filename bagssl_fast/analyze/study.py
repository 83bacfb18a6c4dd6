"""The types of the analysis: a Study tests one claim in a Context and returns a Result."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

if TYPE_CHECKING:
    from bagssl_fast.analyze.models import Context

# One module per claim; each has a STUDY.
MODULES = ("patches", "aggregation", "mean", "locality", "cooccurrence", "epochs")
CLAIMS = tuple(range(1, len(MODULES) + 1))
Verdict = Literal["holds", "does not hold", "undecided"]


@dataclass(frozen=True)
class Table:
    """A table of the report.

    Args:
        title: One line above it.
        columns: Its head.
        rows: Cells as they are shown; numbers already rounded.
    """

    title: str
    columns: list[str]
    rows: list[list[str | int | float]]

    def markdown(self, plain: bool = True) -> str:
        """The table as Markdown, its title as a bold line above, numbers to the right.

        Args:
            plain: Whether cells are shown as they are; they are Markdown otherwise.
        """
        shown = escape if plain else str
        numeric = [
            all(is_number(row[i]) for row in self.rows if row[i] not in ("", "-"))
            for i in range(len(self.columns))
        ]
        lines = [
            [shown(name) for name in self.columns],
            ["---:" if number else "---" for number in numeric],
            *([shown(cell) for cell in row] for row in self.rows),
        ]
        body = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        return f"**{escape(self.title)}**\n\n{body}\n"


def escape(text: object) -> str:
    """Plain text as one line of Markdown that shows it as it is."""
    return re.sub(r"([\\`*_\[\]<>&|~#$])", r"\\\1", " ".join(str(text).split()))


def plural(count: int, word: str) -> str:
    """Such as "1 seed", "2 seeds"."""
    return f"{count} {word}" + ("s" if count != 1 else "")


def is_number(cell: str | int | float) -> bool:
    """Whether a cell is a number, with or without a spread, unit or sign of its own."""
    if not isinstance(cell, str):
        return True
    number = r"[-+−]?\d[\d,.]*(e[-+]?\d+)?"
    return re.fullmatch(rf"{number}( ?± ?{number})? ?(%|s|x|°)?", cell.strip()) is not None


@dataclass(frozen=True)
class Figure:
    """A picture of the report.

    Args:
        title: One line.
        path: Name of the PNG inside the output directory.
        caption: What is drawn: axes, lines, bands; Markdown.
    """

    title: str
    path: str
    caption: str


@dataclass(frozen=True)
class Result:
    """The outcome of testing a claim; JSON round-trips all of it.

    Args:
        claim: Its number, 1 to 6.
        title: The claim in one sentence.
        verdict: Computed from the numbers.
        text: What was done, what it shows and what it does not; Markdown.
        tables: Shown in this order.
        figures: Shown in this order, before the tables.
        numbers: The raw numbers, for other plots.
        seconds: Wall-clock time of the study itself, all its interrupted parts included.
        costs: Wall-clock time of each model and measurement that it used, by its path in the output
            directory; several studies may use the same.
    """

    claim: int
    title: str
    verdict: Verdict
    text: str
    tables: list[Table] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    numbers: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    costs: dict[str, float] = field(default_factory=dict)

    @property
    def took(self) -> float:
        """Wall-clock time of the study and of everything it used."""
        return self.seconds + sum(self.costs.values())

    def to_json(self) -> dict[str, Any]:
        """Plain dictionaries and lists."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Result:
        """The result that `to_json` gave.

        Raises:
            ValueError: If the dictionary is something else.
        """
        try:
            tables = [Table(**table) for table in data["tables"]]
            figures = [Figure(**figure) for figure in data["figures"]]
            result = cls(**(data | {"tables": tables, "figures": figures}))
        except (KeyError, TypeError) as error:
            raise ValueError(f"not the result of a study: {error}") from error
        if result.verdict not in get_args(Verdict):
            raise ValueError(f"not the result of a study: verdict {result.verdict!r}")
        return result


@dataclass(frozen=True)
class Study:
    """A claim and the function that tests it.

    Args:
        name: Stem of its files, such as "patches".
        claim: Its number.
        title: The claim in one sentence.
        run: Tests it.
    """

    name: str
    claim: int
    title: str
    run: Callable[[Context], Result]

    def result_path(self, out: Path) -> Path:
        """Where its result is stored, so that an interrupted analysis resumes after it."""
        return out / "results" / f"{self.claim}-{self.name}.json"
