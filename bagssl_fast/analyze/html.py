"""The report as one self-contained page: figures as data URIs, nothing fetched, no script."""

from __future__ import annotations

import base64
import html
import re
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bagssl_fast.analyze.study import Figure, Result, Table

# A verdict is never told by its color alone.
SIGNS = {"holds": "✓", "does not hold": "✗", "undecided": "≈"}
STYLE = (Path(__file__).with_name("report.css")).read_text(encoding="utf-8")
# A browser that keeps to this cannot load anything that is not in the page.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
PAPER = "https://arxiv.org/abs/2206.08954"


def page(out: Path, results: Sequence[Result], about: Mapping[str, Any]) -> str:
    """The page: for each claim its verdict, text, figures (inlined PNGs) and tables.

    Args:
        out: Where the figures lie.
        results: In order.
        about: command, data, seeds, quick, seconds (wall time), machine (of `machine.report`); each
            may be left out.

    Raises:
        OSError: If a figure is missing.
        ValueError: If one is no PNG.
    """
    data = str(about.get("data", "images"))
    title = f"What patches teach: the claims of BagSSL, tested on {data}"
    parts = [
        "<!doctype html>",
        '<html lang="en">',
        "<head>",
        '<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="color-scheme" content="light dark">',
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
        f"<title>{html.escape(title)}</title>",
        f"<style>\n{STYLE}</style>",
        "</head>",
        "<body>",
        _header(results, about, data),
        "<main>",
        *(_section(out, result) for result in results),
        "</main>",
        _footer(about),
        "</body>",
        "</html>",
    ]
    return "\n".join(parts) + "\n"


def _header(results: Sequence[Result], about: Mapping[str, Any], data: str) -> str:
    counts = [
        f"{sum(result.verdict == verdict for result in results)} {verdict}" for verdict in SIGNS
    ]
    facts = [html.escape(data)]
    if "seeds" in about:
        facts.append(_plural(int(about["seeds"]), "seed") + " per setting")
    if "seconds" in about:
        facts.append(duration(float(about["seconds"])))
    rows = "".join(
        f'<li><a href="#claim-{r.claim}"><span class="number">{r.claim}</span>'
        f"<span>{_inline(r.title)}</span>{_chip(r)}</a></li>"
        for r in results
    )
    look = (
        '<p class="look"><strong>A quick look, not a measurement:</strong> short trainings on few '
        "images, one seed. Run it without <code>--quick</code> for numbers to rely on.</p>"
        if about.get("quick")
        else ""
    )
    return (
        "<header><h1>What patches teach</h1>"
        f'<p class="lead">The claims of <a href="{PAPER}">Bag of Image Patch Embedding Behind the '
        "Success of Self-Supervised Learning</a>, each put to the test on images of one data set. "
        "A verdict follows from the numbers of its claim and their spread; where a claim does not "
        "hold at this scale, this page says so.</p>"
        f'<p class="facts">{" · ".join(facts)}</p>{look}'
        f'<nav aria-label="Claims"><ol>{rows}</ol>'
        f'<p class="facts">{" · ".join(counts)}</p></nav></header>'
    )


def _section(out: Path, result: Result) -> str:
    text = "".join(f"<p>{_inline(part)}</p>" for part in paragraphs(result.text))
    figures = "".join(_figure(out, figure) for figure in result.figures)
    tables = "".join(_table(table) for table in result.tables)
    name = f"claim-{result.claim}"
    took = f'<p class="facts">Took {duration(result.took)}</p>' if result.took else ""
    return (
        f'<section id="{name}" aria-labeledby="{name}-title">'
        f'<p class="eyebrow">Claim {result.claim} {_chip(result)}</p>'
        f'<h2 id="{name}-title">{_inline(result.title)}</h2>'
        f'<div class="text">{text}</div>{figures}{tables}{took}</section>'
    )


def _chip(result: Result) -> str:
    kind = result.verdict.replace(" ", "-")
    sign = SIGNS[result.verdict]
    return f'<span class="chip {kind}"><b aria-hidden="true">{sign}</b> {result.verdict}</span>'


def _figure(out: Path, figure: Figure) -> str:
    png = (out / figure.path).read_bytes()
    width, height = png_size(png, figure.path)
    data = base64.b64encode(png).decode()
    # The label names what is seen; the caption below reads on from it.
    return (
        f'<figure><img src="data:image/png;base64,{data}" alt="{html.escape(figure.title)}" '
        f'width="{width}" height="{height}">'
        f"<figcaption><strong>{_inline(figure.title)}.</strong> {_inline(figure.caption)}"
        "</figcaption></figure>"
    )


def _table(table: Table) -> str:
    numeric = [
        all(is_number(row[i]) for row in table.rows if row[i] != "")
        for i in range(len(table.columns))
    ]
    kinds = [' class="n"' if number else "" for number in numeric]
    head = "".join(
        f'<th scope="col"{kind}>{_inline(name)}</th>'
        for name, kind in zip(table.columns, kinds, strict=True)
    )
    rows = "".join(
        "<tr>"
        + "".join(
            f"<td{kind}>{_inline(str(cell))}</td>" for cell, kind in zip(row, kinds, strict=True)
        )
        + "</tr>"
        for row in table.rows
    )
    return (
        f'<div class="table" role="region" aria-label="{html.escape(table.title)}" tabindex="0">'
        f"<table><caption>{_inline(table.title)}</caption>"
        f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _footer(about: Mapping[str, Any]) -> str:
    machine = about.get("machine") or {}
    packages = machine.get("packages") or {}
    gpus = machine.get("gpus") or []
    facts = {
        "bagssl_fast": " ".join(
            str(machine[key]) for key in ("bagssl_fast", "git") if machine.get(key)
        ),
        "processor": machine.get("cpu"),
        "cores": machine.get("cores"),
        "memory": f"{machine['memory_gb']} GiB" if machine.get("memory_gb") else None,
        "graphics": ", ".join(gpus) if gpus else ("none" if machine else None),
        "Python, torch": ", ".join(
            str(v) for v in (machine.get("python"), packages.get("torch")) if v
        ),
        "wall time": duration(float(about["seconds"])) if "seconds" in about else None,
    }
    rows = "".join(
        f"<div><dt>{html.escape(key)}</dt><dd>{html.escape(str(value))}</dd></div>"
        for key, value in facts.items()
        if value
    )
    command = html.escape(str(about.get("command", "python -m bagssl_fast.analyze")))
    return (
        f"<footer><h2>How and where it was measured</h2><dl>{rows}</dl>"
        f"<p>Made by <code>{command}</code>. The numbers behind every figure "
        "are in <code>results.json</code> beside this page.</p></footer>"
    )


# --- text -----------------------------------------------------------------------------------------


def paragraphs(text: str) -> list[str]:
    """The paragraphs of a text: what stands between blank lines, each on one line."""
    return [" ".join(part.split()) for part in re.split(r"\n\s*\n", text.strip()) if part.strip()]


def _inline(text: str) -> str:
    """Escaped text; `code` and **bold** as in Markdown."""
    text = html.escape(text, quote=False)
    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", text)
    return re.sub(r"\*\*([^*]+)\*\*", r"<strong>\1</strong>", text)


def is_number(cell: str | int | float) -> bool:
    """Whether a cell is a number, with or without a spread, unit or sign of its own."""
    if not isinstance(cell, str):
        return True
    number = r"[-+−]?\d[\d,.]*(e[-+]?\d+)?"
    return re.fullmatch(rf"{number}( ?± ?{number})? ?(%|s|x|°)?", cell.strip()) is not None


def duration(seconds: float) -> str:
    """Wall time for people: "48 s", "12 min", "1 h 05 min"."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def png_size(png: bytes, name: str) -> tuple[int, int]:
    """Width and height of a PNG, so that the page does not jump while it is laid out.

    Raises:
        ValueError: If the bytes are no PNG.
    """
    if png[:8] != b"\x89PNG\r\n\x1a\n" or len(png) < 24:
        raise ValueError(f"{name} is no PNG: figures are saved by figures.save")
    width, height = struct.unpack(">II", png[16:24])
    return width, height


def _plural(count: int, word: str) -> str:
    return f"{count} {word}" + ("s" if count != 1 else "")
