"""scripts/sanitize.sh runs every test file that reaches the C++."""

import re
from pathlib import Path

from bagssl_fast import ops

TESTS = Path(__file__).resolve().parent
# Of what these reach, other files test more: the loader within longer programs.
LEFT_OUT = {
    "test_choices.py",
    "test_cli.py",
    "test_long_load.py",
    "test_sanitize.py",
    "test_train.py",
}


def test_every_test_file_of_the_extension_is_sanitized() -> None:
    script = (TESTS.parent / "scripts" / "sanitize.sh").read_text()
    listed = set(re.findall(r"tests/(test_\w+\.py)", script)) - {"test_sanitize.py"}
    assert all((TESTS / name).is_file() for name in listed)
    reaching = re.compile(r"\b_C\b|^from (bags|pictures) import", re.M)
    reach = {path.name for path in TESTS.glob("test_*.py") if reaching.search(path.read_text())}
    reach |= {f"test_{op}.py" for op, (_, cpu, _) in ops.DISPATCH.items() if cpu == "cpu"}
    without_cpp = {"test_linear_bn_relu.py", "test_tcr.py", "test_vicreg.py"}
    missing = reach - listed - LEFT_OUT - without_cpp
    assert not missing, f"add to scripts/sanitize.sh: {sorted(missing)}"
