"""The report as one self-contained page."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bagssl_fast.analyze.study import Figure, Result, Table


def page(out: Path, results: Sequence[Result], about: Mapping[str, Any]) -> str:
    """The page: for each claim its verdict, text, figures (inlined PNGs) and tables.

    Args:
        out: Where the figures lie.
        results: In order.
        about: Data, seeds, wall time, machine.
    """
    body = "".join(_section(out, result) for result in results)
    return f"<!doctype html><meta charset=utf-8><title>bagssl_fast analysis</title>{body}\n"


def _section(out: Path, result: Result) -> str:
    text = "".join(f"<p>{html.escape(part)}</p>" for part in result.text.split("\n\n"))
    figures = "".join(_figure(out, figure) for figure in result.figures)
    tables = "".join(_table(table) for table in result.tables)
    title = html.escape(f"{result.claim}. {result.title}: {result.verdict}")
    return f"<h2>{title}</h2>{text}{figures}{tables}"


def _figure(out: Path, figure: Figure) -> str:
    data = base64.b64encode((out / figure.path).read_bytes()).decode()
    caption = html.escape(f"{figure.title}. {figure.caption}")
    source = f"data:image/png;base64,{data}"
    return f'<figure><img src="{source}"><figcaption>{caption}</figcaption></figure>'


def _table(table: Table) -> str:
    head = "".join(f"<th>{html.escape(name)}" for name in table.columns)
    rows = "".join(
        "<tr>" + "".join(f"<td>{html.escape(str(cell))}" for cell in row) for row in table.rows
    )
    return f"<table><caption>{html.escape(table.title)}</caption><tr>{head}{rows}</table>"
