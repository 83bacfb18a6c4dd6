"""`bench/readme.py` writes README.md only when asked to, and the committed README is up to date."""

import json
import math
from pathlib import Path

import pytest

import readme


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with an outdated README and the committed results."""
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "results").symlink_to(readme.ROOT / "bench" / "results")
    (tmp_path / "README.md").write_text("a\n<!-- performance -->\nold\n<!-- /performance -->\nb\n")
    monkeypatch.setattr(readme, "ROOT", tmp_path)
    return tmp_path


def test_committed_readme_shows_the_committed_results() -> None:
    assert readme.main(["--check"]) == 0, "README.md is out of date: run `python bench/readme.py`"


def test_check_says_that_it_is_out_of_date_and_changes_nothing(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (root / "README.md").read_text()
    assert readme.main(["--check"]) == 1
    assert "run `python bench/readme.py`" in capsys.readouterr().err
    assert (root / "README.md").read_text() == before
    assert readme.main([]) == 0
    after = (root / "README.md").read_text()
    assert after.startswith("a\n<!-- performance -->\nMeasured side by side")
    assert after.count("\n| ") > 10 and after.endswith("\n<!-- /performance -->\nb\n")
    assert readme.main(["--check"]) == 0


@pytest.mark.parametrize(("flag", "code"), [("--help", 0), ("--chekc", 2), ("README.md", 2)])
def test_help_and_wrong_flags_change_nothing(root: Path, flag: str, code: int) -> None:
    before = (root / "README.md").read_text()
    with pytest.raises(SystemExit) as end:
        readme.main([flag])
    assert end.value.code == code
    assert (root / "README.md").read_text() == before


def test_a_readme_without_its_section_is_refused(root: Path) -> None:
    (root / "README.md").write_text("nothing")
    with pytest.raises(SystemExit, match="expected one section <!-- performance -->"):
        readme.main([])


def row(
    bench: str, provider: str, value: float | None, metric: str, unit: str
) -> dict[str, object]:
    return {
        "bench": bench,
        "case": "c",
        "provider": provider,
        "metric": metric,
        "value": math.inf if value is None else value,
        "unit": unit,
    }


def test_ours_is_compared_with_the_best_plain_pytorch_first() -> None:
    rates = {"bagssl_fast": 6.0, "emp_ssl": 9.0, "torch": 1.0, "torch_kornia_compile": 3.0}
    found = [row("throughput", n, v, "images per second", "images/s") for n, v in rates.items()]
    text = readme.tables(found)
    assert "| times faster than the best plain PyTorch |" in text
    assert "| c | 6 images/s | 2 (torch_kornia_compile) | emp_ssl 0.667," in text


def test_times_to_accuracy_say_what_compilation_they_include() -> None:
    seconds = {"bagssl_fast": 5.0, "torch": None, "torch_kornia": 12.0, "torch_kornia_compile": 9.0}
    found = [row("time_to_accuracy", n, v, "seconds to 50% kNN", "s") for n, v in seconds.items()]
    assert "| 5 s | 1.8 (torch_kornia_compile) | torch (not reached)," in readme.tables(found)
    assert readme.compilation(found) == ""
    for name, value in (("bagssl_fast", 0.0), ("torch_kornia_compile", 4.0)):
        found.append(row("time_to_accuracy", name, value, "compilation", "s"))
    assert "include compilation: torch_kornia_compile 4 s." in readme.compilation(found)


def test_results_of_one_machine_need_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files in subfolders are not shown, and none has to be there."""
    results = tmp_path / "bench" / "results"
    results.mkdir(parents=True)
    full = row("throughput", "bagssl_fast", 2.0, "images per second", "images/s")
    (results / "throughput.json").write_text(json.dumps([full | {"machine": "A, git 1"}]))
    monkeypatch.setattr(readme, "ROOT", tmp_path)
    assert [r["machine"] for r in readme.rows()] == ["A, git 1"]
    (results / "avx512").mkdir()
    (results / "avx512" / "b.json").write_text(json.dumps([full | {"machine": "B, git 1"}]))
    assert [r["machine"] for r in readme.rows()] == ["A, git 1"]
