"""The report page: well formed, self-contained, and what a browser makes of it."""

import base64
import io
import json
import re
import shutil
import subprocess
from html import escape, unescape
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from bagssl_fast.analyze import report
from bagssl_fast.analyze.analysis import examine
from bagssl_fast.analyze.study import Figure, Result, Study, Table, is_number

VOID = {"meta", "img", "br", "hr", "link", "input"}
# Attributes through which a page can fetch.
SOURCES = {"src", "srcset", "href", "data", "poster", "action", "background", "xlink:href"}
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
WIDE = "a table of many columns"


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two figures."""
    folder = tmp_path_factory.mktemp("report")
    Image.new("RGB", (1080, 435), "#3366aa").save(folder / "curve.png")
    Image.new("RGB", (300, 200), "#aa6633").save(folder / "small.png")
    return folder


def results() -> list[Result]:
    table = Table(
        "Accuracy, %",
        ["space", "kNN", "patches"],
        [["h <trained>", "61.2 ± 0.4", 16], ["z & more", "58.0 ± 1.1", 4], ["chance", "", 1]],
    )
    wide = Table(WIDE, [f"column {i}" for i in range(20)], [[f"{i}.5" for i in range(20)]])
    curve = Figure("A curve", "curve.png", "Accuracy against patches, `h` and **z**.")
    small = Figure('A "small" one', "small.png", "Nothing.")
    text = "First a < b & c.\n\nThen\nmore, `code`."
    return [
        Result(1, "Patches are enough", "holds", text, [table], [curve], seconds=61.0),
        Result(4, "h is local", "does not hold", "No.", [wide], [small]),
        Result(5, "Co-occurrence", "undecided", "Maybe."),
    ]


def about(**changes) -> dict:
    machine = {"cpu": "A <CPU>", "cores": 2, "gpus": [], "packages": {"torch": "2.9"}, "git": "abc"}
    facts = {"data": "cifar10-train.tar", "seeds": 2, "quick": False, "seconds": 3725.0}
    return (
        facts | {"command": "python -m bagssl_fast.analyze --seeds 2", "machine": machine} | changes
    )


class Page(HTMLParser):
    """Reads a page: checks nesting, collects sources, ids, text and the rows of tables."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[tuple[str, str]] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        self.tags.append((tag, dict(attrs)))
        self.sources += [(tag, value or "") for name, value in attrs if name in SOURCES]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", "".join(self.words))


def rendered(out: Path, results: list[Result], about: dict) -> str:
    return report.page(report.markdown(results, about), out)


@pytest.fixture(scope="module")
def page(out: Path) -> str:
    return rendered(out, results(), about())


def test_every_tag_is_closed_and_every_claim_has_its_section(page):
    parsed = Page(page)
    claims = ["1-patches-are-enough", "4-h-is-local", "5-co-occurrence"]
    assert set(claims) <= {attrs.get("id") for tag, attrs in parsed.tags if tag == "h2"}
    inner = [value[1:] for tag, value in parsed.sources if value.startswith("#")]
    assert inner == claims
    assert all(attrs.get("alt") for tag, attrs in parsed.tags if tag == "img")


def test_nothing_is_fetched(page):
    parsed = Page(page)
    for tag, value in parsed.sources:
        assert value.startswith(("data:image/png;base64,", "#")) or (tag == "a"), (tag, value)
    style = re.search(r"<style>(.*?)</style>", page, re.S)
    assert style and "url(" not in style[1] and "@import" not in style[1]
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in parsed.tags}


def test_figures_are_the_files_with_their_sizes(page, out):
    images = [attrs for tag, attrs in Page(page).tags if tag == "img"]
    for attrs, name in zip(images, ("curve.png", "small.png"), strict=True):
        data = base64.b64decode((attrs["src"] or "").partition(",")[2])
        assert data == (out / name).read_bytes()
        size = Image.open(io.BytesIO(data)).size
        assert (attrs["width"], attrs["height"]) == tuple(map(str, size))


def test_words_verdicts_and_machine_stand_in_the_text(page):
    text = Page(page).text
    for words in ("First a < b & c.", "Then more, code.", "h <trained>", "z & more", "A <CPU>"):
        assert words in text, words
    for words in ("✓ holds", "✗ does not hold", "≈ undecided", "1 h 02 min", "2 seeds per setting"):
        assert words in text, words
    assert "1 holds · 1 does not hold · 1 undecided" in text
    assert "--seeds 2" in text
    for words in ("A curve. Accuracy against patches, h and z.", "Took 61 s.", "torch: 2.9"):
        assert words in text, words
    assert "<code>code</code>" in page and "<strong>z</strong>" in page


def test_a_quick_look_says_so(out, page):
    words = "A quick look, not a measurement"
    assert words not in page
    assert words in rendered(out, results(), about(quick=True))


def test_numbers_are_set_to_the_right(page):
    cells = re.findall(r"<td( style=\"text-align:right\")?>([^<]*)", page)
    right = {text: bool(kind) for kind, text in cells}
    assert right["61.2 ± 0.4"] and right["16"]
    assert not right["chance"]


@pytest.mark.parametrize(
    ("cell", "expected"),
    [
        *[(cell, True) for cell in (3, 0.5, "3", "-1.5", "+3.1 ± 0.8", "1.2e-06", "54%", "1,024")],
        *[(cell, False) for cell in ("", "3 patches", "h", "1/16", "e5")],
    ],
    ids=str,
)
def test_what_a_number_is(cell, expected):
    assert is_number(cell) is expected


def test_durations_are_for_people():
    needed = {8.4: "8 s", 89: "89 s", 150: "2 min", 3599: "1 h 00 min", 3725: "1 h 02 min"}
    assert {seconds: report.duration(seconds) for seconds in needed} == needed


def test_a_page_without_facts_or_results_is_a_page(out):
    assert "<main>" in rendered(out, [], {})
    Page(rendered(out, results(), {}))


def test_what_is_no_figure_is_refused(out):
    (out / "text.png").write_text("text")
    broken = Result(1, "t", "holds", "x", figures=[Figure("f", "text.png", "c")])
    with pytest.raises(ValueError, match=r"text\.png is not a PNG"):
        rendered(out, [broken], {})
    missing = Result(1, "t", "holds", "x", figures=[Figure("f", "missing.png", "c")])
    with pytest.raises(OSError, match=r"missing\.png"):
        rendered(out, [missing], {})


NAMES = [
    "<b>cats</b> & dogs.tar",
    "a|b*c*_d_.tar",
    "[a](http://b).tar",
    r"`a``b` \\ $c$ ~~d~~ &lt; \|",
]


@pytest.mark.parametrize("name", NAMES)
def test_names_of_data_are_shown_as_they_are(out, name):
    """What a user calls a folder is text, never markup: neither of Markdown nor of HTML."""
    facts = about(data=name, command=f"python -m bagssl_fast.analyze --data {name}")
    results = [Result(1, "t", "holds", "x", tables=[Table(name, [name, "n"], [[name, 1]])])]
    page = rendered(out, results, facts)
    parsed = Page(page)
    text = "".join(parsed.words)
    assert f"The paper's claims on {name}" in text
    assert f"--data {name}" in text
    assert text.count(name) == 7  # title, heading, facts, the table's three, command
    assert not {"b", "em", "del"} & {tag for tag, _ in parsed.tags}
    assert [value for tag, value in parsed.sources if "//b" in value] == []
    cells = [tag for tag, _ in parsed.tags if tag in ("th", "td")]
    assert len(cells) == 6 + 4  # no name makes a column


def test_what_is_not_installed_is_named_before_a_study_runs(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    words = r"needs matplotlib, markdown-it-py: pip install matplotlib markdown-it-py"
    with pytest.raises(ValueError, match=words):
        report.page("# t", tmp_path)
    study = Study("s", 3, "t", lambda _: pytest.fail("the study ran"))
    with pytest.raises(ValueError, match=words):
        examine(study, SimpleNamespace(out=tmp_path, settings=dict))


# --- a real browser -------------------------------------------------------------------------------

# Appended to a copy of the page, whose policy gives way to it: what the browser made of the page.
PROBE = """
<script>
addEventListener("load", () => {
  const background = getComputedStyle(document.body).backgroundColor;
  const images = [...document.images].map(i => [
    i.complete, i.naturalWidth, i.naturalHeight, Math.round(i.getBoundingClientRect().width),
    Math.round(i.getBoundingClientRect().height)]);
  const fetched = performance.getEntriesByType("resource")
    .map(e => e.name).filter(n => !n.startsWith("data:"));
  const root = document.documentElement;
  const report = {images, fetched, background, width: root.clientWidth,
    content: root.scrollWidth, claims: document.querySelectorAll("h2 + p > .chip").length};
  document.body.setAttribute("data-report", JSON.stringify(report));
});
</script>
"""


# Copies the report out of a frame: a headless window is never as narrow as a phone.
FRAME = """<!doctype html>
<iframe srcdoc="{inner}" width="375" height="700" style="border: 0"></iframe>
<script>
addEventListener("load", () => {{
  const inner = document.querySelector("iframe").contentDocument;
  document.body.setAttribute("data-report", inner.body.getAttribute("data-report"));
}});
</script>
"""


def probed(page: str) -> str:
    """The page with the probe in it."""
    return re.sub(r"<meta http-equiv[^>]*>", "", page).replace("</body>", PROBE + "</body>")


def browse(markup: str, folder: Path, *flags: str) -> dict:
    """What a browser reports of some markup."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"no browser here (looked for {', '.join(BROWSERS)})")
    path = folder / "probe.html"
    path.write_text(markup, encoding="utf-8")
    command = [
        *(browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
        *(f"--user-data-dir={folder / 'profile'}", "--window-size=1200,900", *flags),
        *("--virtual-time-budget=5000", "--dump-dom", path.as_uri()),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    dom = re.search(r'<body data-report="([^"]*)"', done.stdout)
    assert dom, f"the browser gave no report: {done.stderr[-2000:]}"
    report: dict = json.loads(unescape(dom[1]))
    return report


def test_a_browser_shows_the_figures_and_fetches_nothing(page, tmp_path):
    report = browse(probed(page), tmp_path)
    assert [complete for complete, *_ in report["images"]] == [True, True]
    assert [sizes[:2] for _, *sizes in report["images"]] == [[1080, 435], [300, 200]]
    for _, natural_width, natural_height, width, height in report["images"]:
        assert 250 < width <= natural_width + 2  # shown, and never blown up
        assert width / height == pytest.approx(natural_width / natural_height, rel=0.02)
    assert report["fetched"] == []
    assert report["claims"] == 3


def test_a_phone_shows_all_of_it_without_scrolling_sideways(page, tmp_path):
    report = browse(FRAME.format(inner=escape(probed(page))), tmp_path)
    assert report["content"] <= report["width"] <= 375
    assert all(0 < width <= 375 for *_, width, _ in report["images"])


def test_a_dark_screen_gets_a_dark_page(page, tmp_path):
    light = browse(probed(page), tmp_path)["background"]
    dark = browse(
        probed(page), tmp_path, "--force-dark-mode", "--blink-settings=preferredColorScheme=0"
    )
    assert sum(map(int, re.findall(r"\d+", light))) > 3 * 200
    assert sum(map(int, re.findall(r"\d+", dark["background"]))) < 3 * 60
