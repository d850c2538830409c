"""Choosing a backend, the package without its library, the library's symbols, the self-check."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vlpfast.ops import _library, backends, selfcheck
from vlpfast.ops.contrastive import clip_loss
from vlpfast.ops.contrastive.autograd import PairLogsumexp

needs_library = pytest.mark.skipif(bool(_library.MISSING), reason="waits for the compiled library vlpfast/_C.so")
CPU = torch.device("cpu")


def python(script: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=cwd, env=os.environ | environment)


def test_every_backend_is_there_or_has_a_reason() -> None:
    reasons = backends.available()
    assert tuple(reasons) == ("reference", "cpp", "triton", "cuda")
    assert reasons["reference"] == "" and reasons["cuda"] == "the library was built without CUDA kernels"


@needs_library
def test_forcing_and_going_back() -> None:
    assert backends.choose("an op", {"cpp": "cpu"}, CPU) == "cpp"
    with backends.use("reference"):
        assert backends.choose("an op", {"cpp": "cpu"}, CPU) == "reference"
        with backends.use(None):
            assert backends.choose("an op", {"cpp": "cpu"}, CPU) == "cpp"
        with pytest.raises(KeyError), backends.use("cpp"):
            raise KeyError
        assert backends.choose("an op", {"cpp": "cpu"}, CPU) == "reference"
    assert backends.choose("an op", {"cpp": "cpu"}, CPU) == "cpp"


@needs_library
def test_forcing_what_is_not_there() -> None:
    with pytest.raises(ValueError, match="expected one of reference, cpp, triton, cuda, got 'gpu'"), backends.use("gpu"):
        pass
    with (
        pytest.raises(RuntimeError, match="backend 'cuda' is forced, but it is not there: the library was built"),
        backends.use("cuda"),
    ):
        pass
    with (
        backends.use("cpp"),
        pytest.raises(RuntimeError, match="an op has no such kernel for cuda tensors; it has reference, cpp"),
    ):
        backends.choose("an op", {"cpp": "cpu"}, torch.device("cuda"))


def test_what_the_environment_forces_is_checked_at_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_forced", "fast")
    with pytest.raises(ValueError, match="expected one of reference, cpp, triton, cuda, got 'fast'"):
        clip_loss(torch.eye(3), torch.eye(3), 10.0)
    monkeypatch.setattr(backends, "_forced", "cuda")
    with pytest.raises(RuntimeError, match="backend 'cuda' is forced, but it is not there"):
        clip_loss(torch.eye(3), torch.eye(3), 10.0)


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(_library, "MISSING", "not built")
    assert backends.available()["cpp"] == "not built"
    assert backends.choose("an op", {"cpp": "cpu"}, CPU) == "reference"
    with pytest.raises(RuntimeError, match="backend 'cpp' is forced, but it is not there: not built"), backends.use("cpp"):
        pass
    assert clip_loss(torch.eye(3), torch.eye(3), 10.0) > 0
    assert all(check.ok and check.backend in ("reference", "triton") for check in selfcheck.check())


def test_a_library_that_is_absent_or_damaged_has_its_reason(tmp_path: Path) -> None:
    assert "was not built" in _library.load(tmp_path / "_C.so")
    (tmp_path / "_C.so").write_bytes(b"no library")
    assert "does not load" in _library.load(tmp_path / "_C.so")


def test_a_checkout_without_the_library_says_so_once_and_works(tmp_path: Path) -> None:
    package = Path(_library.__file__).parents[1]
    shutil.copytree(package / "ops", tmp_path / "vlpfast/ops")
    (tmp_path / "vlpfast/__init__.py").touch()
    script = (
        "import torch; from vlpfast.ops import backends, contrastive\n"
        "for scale in (5.0, 10.0): loss = contrastive.clip_loss(torch.eye(3), torch.eye(3), scale)\n"
        "print(float(loss), backends._forced)"
    )
    done = python(script, tmp_path)
    assert done.returncode == 0 and done.stdout.startswith("9.07") and done.stdout.endswith("None\n")
    assert done.stderr.count("vlpfast runs its operators on the slow `reference` backend") == 1
    asked_for = python(script, tmp_path, VLPFAST_BACKEND="reference")
    assert asked_for.stdout.endswith("reference\n") and "vlpfast runs" not in asked_for.stderr


def test_the_import_is_light() -> None:
    script = (
        "import sys, vlpfast, vlpfast.ops.contrastive, vlpfast.ops.linear_cross_entropy\n"
        "print([m for m in ('triton', 'transformers', 'nvidia.dali', 'omegaconf') if m in sys.modules])"
    )
    assert python(script).stdout.strip() == "[]"


@needs_library
def test_the_library_keeps_to_the_stable_abi() -> None:
    if shutil.which("nm") is None:
        pytest.skip("waits for the program nm (binutils)")
    symbols = subprocess.run(["nm", "-DC", str(_library.PATH)], capture_output=True, text=True, check=True).stdout
    assert "torch_library_impl" in symbols
    assert not re.findall(r".*\b(?:c10|at)::.*", symbols)


@pytest.fixture
def no_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's would take a minute for what test_conformance.py runs as well."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def test_the_selfcheck_passes_here(no_interpreter: None) -> None:
    checks = selfcheck.check()
    there = [name for name, reason in backends.available().items() if not reason]
    assert {(c.op, c.backend) for c in checks if c.dtype is not None} == {
        (op, name) for op, (_, kernels) in selfcheck._CASES.items() for name in there if name in ("reference", *kernels)
    }
    assert all(check.ok for check in checks), checks


def test_a_backend_without_an_operator_is_absent_for_it_alone(monkeypatch: pytest.MonkeyPatch, no_interpreter: None) -> None:
    case, _ = selfcheck._CASES["sigmoid_loss"]
    monkeypatch.setattr(selfcheck, "_CASES", {"clip_loss": selfcheck._CASES["clip_loss"], "sigmoid_loss": (case, {})})
    checks = selfcheck.check()
    absent = [check for check in checks if check.dtype is None]
    there = [name for name, reason in backends.available().items() if not reason and name != "reference"]
    assert absent == [selfcheck.Check("sigmoid_loss", name, None, True, f"sigmoid_loss has no {name} kernel") for name in there]
    assert all(check.ok for check in checks)
    assert {c.backend for c in checks if c.op == "sigmoid_loss" and c.dtype is not None} == {"reference"}


@needs_library
def test_the_selfcheck_finds_a_wrong_kernel_and_a_broken_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    right = PairLogsumexp.apply

    def off_by_a_little(*arguments):
        rows, *rest = right(*arguments)
        return rows * 1.001, *rest

    monkeypatch.setattr(PairLogsumexp, "apply", off_by_a_little)
    there = {name for name in ("cpp", "triton") if not backends.available()[name]}
    assert {check.backend for check in selfcheck.check() if not check.ok} == there

    def broken(*arguments):
        raise RuntimeError("no such thing")

    monkeypatch.setattr(PairLogsumexp, "apply", broken)
    failed = [check for check in selfcheck.check() if not check.ok]
    assert failed and all(check.detail == "RuntimeError: no such thing" for check in failed)
