from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

from vlpfast.cli import doctor
from vlpfast.ops import backends, selfcheck


def test_the_command_finds_everything_right() -> None:
    compiled = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}  # which takes a minute
    done = subprocess.run([sys.executable, "-m", "vlpfast.cli.doctor"], capture_output=True, text=True, env=compiled)
    assert done.returncode == 0, done.stdout + done.stderr
    for heading in ("machine", "packages", "native libraries", "operator back ends", "operators against their reference"):
        assert f"\n{heading}" in "\n" + done.stdout
    assert "\x1b" not in done.stdout and "WRONG" not in done.stdout
    assert done.stdout.splitlines()[-1].endswith("checks are right")
    assert torch.__version__ in done.stdout


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> list[selfcheck.Check]:
    """What the operators' check answers."""
    found = [selfcheck.Check("clip_loss", "cpp", torch.float32, True, "largest error 1e-7")]
    monkeypatch.setattr(selfcheck, "check", lambda: found)
    return found


def test_json(checks: list[selfcheck.Check], capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main(["--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] and report["backends"] == backends.available()
    assert report["checks"] == [
        {"op": "clip_loss", "backend": "cpp", "dtype": "float32", "ok": True, "detail": "largest error 1e-7"}
    ]
    versions = {package["name"]: package["version"] for package in report["packages"]}
    assert versions["torch"] == torch.__version__
    assert report["machine"]["cores"] >= 1 and report["machine"]["memory GiB"] > 0
    assert set(report["libraries"]) == {"vlpfast/_C.so (operators)", "vlpfast/_host (shards)"}


def test_a_wrong_back_end_is_an_error(checks: list[selfcheck.Check], capsys: pytest.CaptureFixture[str]) -> None:
    checks.append(selfcheck.Check("clip_loss", "triton", torch.bfloat16, False, "gradient of x off by 3 %"))
    assert doctor.main([]) == 1
    out = capsys.readouterr().out
    assert "WRONG   gradient of x off by 3 %" in out and out.splitlines()[-1] == "1 of 2 checks are WRONG"
    assert doctor.main(["--json"]) == 1


def test_an_operator_that_a_back_end_does_not_have(checks: list[selfcheck.Check], capsys: pytest.CaptureFixture[str]) -> None:
    checks.append(selfcheck.Check("pair_softplus", "triton", None, True, "pair_softplus has no triton kernel"))
    assert doctor.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines if "pair_softplus" in line] == [
        ["pair_softplus", "triton", "absent", "pair_softplus", "has", "no", "triton", "kernel"]
    ]
    assert lines[-1] == "all 1 checks are right"
    assert doctor.main(["--json"]) == 0
    assert json.loads(capsys.readouterr().out)["checks"][1]["dtype"] is None


def test_tables_on_a_terminal(checks: list[selfcheck.Check], monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(doctor, "Console", lambda: Console(file=screen, force_terminal=True, width=200, color_system="standard"))
    checks.append(selfcheck.Check("clip_loss", "cpp", torch.float64, False, "shape [3, 4]"))
    assert doctor.main([]) == 1
    assert "\x1b[31mWRONG" in screen.getvalue() and "shape [3, 4]" in screen.getvalue() and "┃" in screen.getvalue()


def test_a_package_that_is_missing_says_how_to_get_it(
    checks: list[selfcheck.Check], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    extras = {"av": "video", "soundfile": "audio", "pydicom": "medical", "nibabel": "medical", "trimesh": "points"}
    extras |= {"pyarrow": "build", "wandb": "wandb", "transformers": "llm"}
    found = doctor.version
    monkeypatch.setattr(
        doctor, "version", lambda names: "1.0" if names[0] == "av" else found(names) if names == ("rich",) else None
    )
    assert doctor.main([]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line.startswith("  ")}
    assert "pip install" not in lines["av"] and "pip install" not in lines["rich"] and " 1.0 " in lines["av"]
    for name in extras.keys() - {"av"}:
        assert " absent " in lines[name] and lines[name].endswith(f"pip install 'vlpfast[{extras[name]}]'")
    assert lines["tensorboard"].endswith("pip install tensorboard")


def test_every_extra_that_is_named_brings_the_package() -> None:
    """What the doctor says is what pyproject.toml does, and no package of an extra for users is left out."""
    tomllib = pytest.importorskip("tomllib", reason="waits for Python 3.11")
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    brought = {
        extra: {re.split(r"[<>=;\s]", requirement)[0] for requirement in requirements}
        for extra, requirements in project["optional-dependencies"].items()
        if extra != "dev"
    }
    for names, (_, install) in doctor.PACKAGES.items():
        if extra := re.fullmatch(r"pip install 'vlpfast\[(\w+)\]'", install):
            assert names[0] in brought[extra[1]], names
        elif install == "pip install vlpfast":
            assert any(requirement.startswith(names[0]) for requirement in project["dependencies"]), names
    known = {names[0] for names in doctor.PACKAGES}
    assert {extra: packages - known for extra, packages in brought.items() if packages - known} == {}


def test_another_package_by_the_name_of_apex(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex/__init__.py").write_text("raise RuntimeError('imported')")
    info = tmp_path / "apex-0.9.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: apex\nVersion: 0.9\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert doctor.version(("apex",)) is None
    (tmp_path / "apex/optimizers").mkdir()
    assert doctor.version(("apex",)) == "0.9"
    assert doctor.version(("no-such-package", "rich")) is not None


def test_a_library_that_is_not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vlpfast._host", None)
    monkeypatch.setattr(backends, "available", lambda: {"cpp": "not built"})
    found = doctor.libraries()
    assert found["vlpfast/_C.so (operators)"] == "not built" and "build_ext --inplace" in found["vlpfast/_host (shards)"]
