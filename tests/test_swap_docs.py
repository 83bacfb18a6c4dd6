"""Every Python snippet of docs/swap-in.md runs."""

import re
import sys
from pathlib import Path
from types import ModuleType

import hosts
import pytest
import torch

from bagssl_fast.integrations import _patching

TEXT = (Path(__file__).resolve().parent.parent / "docs" / "swap-in.md").read_text()
SNIPPETS = re.findall(r"```python ?(\S*)\n(.*?)```", TEXT, re.S)


@pytest.fixture
def reverted(monkeypatch):
    """Whatever a snippet replaces is put back."""
    handles = []
    commit = _patching.Handle.commit

    def watched(self, *args):
        handles.append(self)
        return commit(self, *args)

    monkeypatch.setattr(_patching.Handle, "commit", watched)
    yield
    for handle in reversed(handles):
        handle.revert()


def test_every_host_has_its_snippet():
    assert [host for host, _ in SNIPPETS] == ["lightly", "vicreg", "solo-learn", "EMP-SSL", ""]


@pytest.mark.parametrize(("host", "code"), SNIPPETS, ids=[host or "data" for host, _ in SNIPPETS])
def test_snippet_runs(host, code, reverted, monkeypatch):
    real = host in ("vicreg", "solo-learn", "EMP-SSL")
    module = hosts.load(host, "real") if real else None
    # EMP-SSL's lines stand in its script and see the script's names.
    snippet = module if host == "EMP-SSL" else ModuleType("snippet")
    monkeypatch.setitem(sys.modules, snippet.__name__, snippet)
    names = vars(snippet)
    names["torch"] = torch
    exec(code, names)
    if "loss" in names:
        assert torch.isfinite(names["loss"])
