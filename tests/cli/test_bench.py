from __future__ import annotations

from pathlib import Path

import pytest

from vlpfast.cli import bench
from vlpfast.types import UserError


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "_shared.py").write_text("raise SystemExit(9)")
    (tmp_path / "rolls.py").write_text('"""Rolls, how fast.\n\nMore."""\n')
    (tmp_path / "contrastive.py").write_text(
        '"""Contrastive losses."""\nimport sys\nprint(sys.argv[1:], flush=True)\nsys.exit(3)\n'
    )
    monkeypatch.setattr(bench, "FOLDER", tmp_path)
    return tmp_path


def test_list(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main([]) == 0
    assert capsys.readouterr().out == "contrastive  Contrastive losses.\nrolls        Rolls, how fast.\n"


def test_options_and_exit_code_pass_through(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["contrastive", "--device", "cpu", "--quick", "--help"]) == 3
    assert capfd.readouterr().out == "['--device', 'cpu', '--quick', '--help']\n"


def test_unknown_name(folder: Path) -> None:
    with pytest.raises(UserError, match="no benchmark named 'contrastiv'; did you mean contrastive"):
        bench.main(["contrastiv"])
    with pytest.raises(UserError, match="there are: contrastive, rolls"):
        bench.main(["_shared"])


def test_without_the_scripts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "FOLDER", tmp_path / "benchmarks")
    with pytest.raises(UserError, match="part of vlpfast's source, not of the installed package"):
        bench.main(["contrastive"])
