"""The report: Markdown for a repository, and the same text as one self-contained page.

The page is the Markdown rendered by markdown-it-py into `report.html`, its figures as data URIs;
nothing is fetched and there is no script.
"""

from __future__ import annotations

import base64
import html
import importlib.util
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

from bagssl_fast.analyze.study import Figure, Result, Table, escape, plural

if TYPE_CHECKING:
    from markdown_it.token import Token

# Verdicts do not rely on color alone.
SIGNS = {"holds": "✓", "does not hold": "✗", "undecided": "≈"}
CHIPS = {f"{sign} {verdict}": verdict.replace(" ", "-") for verdict, sign in SIGNS.items()}
PAPER = (
    "[Bag of Image Patch Embedding Behind the Success of Self-Supervised Learning]"
    "(https://arxiv.org/abs/2206.08954)"
)
PACKAGES = {"matplotlib": "matplotlib", "markdown_it": "markdown-it-py"}  # module -> package


def check_packages() -> None:
    """Says what the figures and the page need, before anything is trained for them.

    Raises:
        ValueError: If a package is missing.
    """
    missing = [name for module, name in PACKAGES.items() if not importlib.util.find_spec(module)]
    if missing:
        raise ValueError(f"the report needs {', '.join(missing)}: pip install {' '.join(missing)}")


# --- Markdown -------------------------------------------------------------------------------------


def markdown(results: Sequence[Result], about: Mapping[str, Any]) -> str:
    """Verdicts, texts, figures and tables as Markdown.

    Args:
        results: In order.
        about: command, data, seeds, quick, seconds (wall-clock), machine (of `machine.report`);
            each may be missing.
    """
    data = escape(about.get("data", "images"))
    facts = [data]
    if "seeds" in about:
        facts.append(plural(int(about["seeds"]), "seed") + " per setting")
    if "seconds" in about:
        facts.append(duration(float(about["seconds"])))
    verdicts: list[list[str | int | float]] = [
        [r.claim, f"[{r.title}](#{anchor(_heading(r))})", _verdict(r)] for r in results
    ]
    counts = [f"{sum(r.verdict == verdict for r in results)} {verdict}" for verdict in SIGNS]
    parts = [
        f"# The paper's claims on {data}",
        f"The claims of {PAPER}, each tested on the images of one data set. A verdict is computed "
        "from the numbers of its claim: a difference counts beyond two standard errors.",
        " · ".join(facts),
    ]
    if about.get("quick"):
        parts.append(
            "> **A quick look, not a measurement:** short trainings on few images, one seed. "
            "Run it without `--quick` for numbers to rely on."
        )
    if results:
        title = f"Verdicts: {' · '.join(counts)}"
        parts.append(Table(title, ["", "claim", "verdict"], verdicts).markdown(plain=False))
    parts += [_section(result) for result in results]
    parts.append(_origin(about))
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _heading(result: Result) -> str:
    return f"{result.claim}. {result.title}"


def _verdict(result: Result) -> str:
    return f"**{SIGNS[result.verdict]} {result.verdict}**"


def _section(result: Result) -> str:
    parts = [f"## {_heading(result)}", f"Verdict: {_verdict(result)}", result.text]
    parts += [_figure(figure) for figure in result.figures]
    parts += [table.markdown() for table in result.tables]
    if result.took:
        parts.append(f"Took {duration(result.took)}.")
    return "\n\n".join(part.strip() for part in parts)


def _figure(figure: Figure) -> str:
    title = escape(figure.title)
    return f"![{title}]({figure.path})\\\n**{title}.** {figure.caption}"


def _origin(about: Mapping[str, Any]) -> str:
    """How and where it was measured."""
    machine = about.get("machine") or {}
    packages = machine.get("packages") or {}
    gpus = ", ".join(machine.get("gpus") or []) or ("none" if machine else "")
    facts = {
        "processor": machine.get("cpu"),
        "cores": machine.get("cores"),
        "GPUs": gpus,
        "torch": packages.get("torch"),
        "revision": machine.get("git"),
        "wall-clock time": duration(float(about["seconds"])) if "seconds" in about else None,
    }
    lines = [f"- {name}: {escape(value)}" for name, value in facts.items() if value]
    command = code(about.get("command", "python -m bagssl_fast.analyze"))
    return "\n".join(
        [
            "## How and where it was measured\n",
            *lines,
            f"\nMade by {command}. The numbers behind every figure are in `results.json`.",
        ]
    )


def code(text: str) -> str:
    """A line of text as a Markdown code span, whatever is in it."""
    text = " ".join(text.split())
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    space = " " if "`" in (text[:1], text[-1:]) else ""
    return f"{fence}{space}{text}{space}{fence}"


def anchor(heading: str) -> str:
    """The id of a heading, by the rule of GitHub's READMEs."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def duration(seconds: float) -> str:
    """Wall-clock time for people: "48 s", "12 min", "1 h 05 min"."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


# --- the page -------------------------------------------------------------------------------------


def page(text: str, folder: Path) -> str:
    """The Markdown of a report as one HTML page.

    Args:
        text: From `markdown`.
        folder: Where the figures are.

    Raises:
        OSError: If a figure is missing.
        ValueError: If one is not a PNG, or markdown-it-py is not installed.
    """
    check_packages()
    from markdown_it import MarkdownIt

    parser = MarkdownIt("commonmark", {"html": False, "xhtmlOut": False}).enable("table")
    tokens = parser.parse(text)
    here = Path(__file__)
    return Template(here.with_name("report.html").read_text(encoding="utf-8")).substitute(
        title=html.escape(_plain(tokens[1])),  # of the first heading
        style=here.with_name("report.css").read_text(encoding="utf-8"),
        body=parser.renderer.render(list(_finished(tokens, folder)), parser.options, {}),
    )


def _finished(tokens: Sequence[Token], folder: Path) -> Iterator[Token]:
    """Headings that can be linked to, and a frame that scrolls around each table."""
    from markdown_it.token import Token

    for i, token in enumerate(tokens):
        if token.type == "heading_open":
            token.attrSet("id", anchor(_plain(tokens[i + 1])))
        elif token.type == "inline":
            _finish_line(token.children or [], folder)
        elif token.type == "table_open":
            title = html.escape(_plain(tokens[i - 2]))  # the paragraph above
            frame = f'<div class="table" role="region" aria-label="{title}" tabindex="0">\n'
            yield Token("html_block", "", 0, content=frame)
        yield token
        if token.type == "table_close":
            yield Token("html_block", "", 0, content="</div>\n")


def _finish_line(tokens: Sequence[Token], folder: Path) -> None:
    """Figures become data URIs of known size, verdicts get their color."""
    for i, token in enumerate(tokens):
        if token.type == "image":
            name = str(token.attrs["src"])
            png = (folder / name).read_bytes()
            width, height = png_size(png, name)
            data = f"data:image/png;base64,{base64.b64encode(png).decode()}"
            token.attrs |= {"src": data, "width": width, "height": height}
        elif token.type == "strong_open" and (verdict := CHIPS.get(tokens[i + 1].content)):
            token.attrSet("class", f"chip {verdict}")


def _plain(line: Token) -> str:
    """A line of Markdown without its markup."""
    return "".join(token.content for token in line.children or [])


def png_size(png: bytes, name: str) -> tuple[int, int]:
    """Width and height of a PNG, so that the page does not jump while it loads.

    Raises:
        ValueError: If the bytes are not a PNG.
    """
    if png[:8] != b"\x89PNG\r\n\x1a\n" or len(png) < 24:
        raise ValueError(f"{name} is not a PNG: save figures with figures.save")
    width, height = struct.unpack(">II", png[16:24])
    return width, height
