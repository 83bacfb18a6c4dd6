"""`bench/readme.py` writes README.md only when asked to, and the committed README is up to date."""

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
    assert after.endswith("|\n<!-- /performance -->\nb\n")
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
