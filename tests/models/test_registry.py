from __future__ import annotations

import subprocess
import sys

import pytest

from vlpfast import models
from vlpfast.types import UserError


def test_get_and_names() -> None:
    assert "clip" in models.names()
    assert models.get("clip").__name__ == "CLIP"


def test_unknown_name_names_the_nearest() -> None:
    with pytest.raises(UserError, match=r"unknown model 'clp'; did you mean 'clip'\? \(known: .*clip.*\)"):
        models.get("clp")
    with pytest.raises(UserError, match=r"unknown model 'zzzzzzzz' \(known: "):
        models.get("zzzzzzzz")


def test_importing_the_registry_imports_no_model() -> None:
    code = "import sys, vlpfast.models; print([m for m in sys.modules if m.startswith('vlpfast.models.')])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"
