from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from toy_run import Toy, toy_config

from vlpfast.training import run_folder
from vlpfast.training.config import load_config
from vlpfast.types import UserError


def begin(tmp_path: Path, *overrides: str) -> Path:
    with run_folder.opened(toy_config(tmp_path, *overrides)) as run_dir:
        (run_dir / "checkpoints" / "step-00000004").mkdir(parents=True, exist_ok=True)
    return run_dir


def test_what_is_written(tmp_path: Path) -> None:
    run_dir = begin(tmp_path)
    assert load_config(run_dir / "config.yaml", [], lambda name: Toy) == toy_config(tmp_path)
    environment = json.loads((run_dir / "environment.json").read_text())
    assert environment["python"].startswith("3.") and environment["packages"]["omegaconf"] and environment["cpu"]
    assert environment["torch"] and isinstance(environment["gpus"], list) and environment["commit"] != ""


def test_another_run_is_refused_with_the_keys_that_differ(tmp_path: Path) -> None:
    run_dir = begin(tmp_path)
    before = (run_dir / "config.yaml").read_bytes()
    with pytest.raises(
        UserError, match=r"other settings: model.head.width: 16 -> 3; train.batch_size: 8 -> 9; train.seed: 0 -> 1\."
    ):
        begin(tmp_path, "train.seed=1", "model.head.width=3", "train.batch_size=9")
    assert (run_dir / "config.yaml").read_bytes() == before


def test_what_may_change_on_resume(tmp_path: Path) -> None:
    run_dir = begin(tmp_path)
    begin(
        tmp_path, "train.steps=99", "train.checkpoint_every=1", "train.keep_checkpoints=5", "data.threads=1", "evaluation.every=2"
    )
    assert "steps: 99" in (run_dir / "config.yaml").read_text()


def test_before_the_first_checkpoint_settings_are_free(tmp_path: Path) -> None:
    with run_folder.opened(toy_config(tmp_path)) as run_dir:
        assert not run_folder.has_begun(run_dir)
    begin(tmp_path, "train.seed=1")
    assert run_folder.has_begun(run_dir) and "seed: 1" in (run_dir / "config.yaml").read_text()


def test_checkpoints_without_a_config(tmp_path: Path) -> None:
    (begin(tmp_path) / "config.yaml").unlink()
    with pytest.raises(UserError, match=r"has checkpoints and no readable config.yaml"):
        begin(tmp_path)


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(UserError, match=r"train.run_dir: .*run cannot be used as a folder: File exists"):
        begin(tmp_path)


@pytest.mark.skipif(sys.platform == "win32", reason="waits for a system with POSIX locks")
def test_one_process_at_a_time(tmp_path: Path) -> None:
    run_dir = begin(tmp_path)
    hold = "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.lockf(f, fcntl.LOCK_EX); print('held', flush=True); input()"
    command = [sys.executable, "-c", hold, str(run_dir / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=f"another process is training in {run_dir}"):
            begin(tmp_path)
        other.kill()
    begin(tmp_path)  # a killed process leaves no lock behind


def test_full_disk_anywhere_in_a_run(tmp_path: Path) -> None:
    expected = r"somewhere/tokenizer.json: No space left on device; the checkpoints are untouched"
    with pytest.raises(UserError, match=expected), run_folder.opened(toy_config(tmp_path)):
        raise OSError(errno.ENOSPC, "No space left on device", "somewhere/tokenizer.json")


@pytest.mark.parametrize(
    ("number", "cure"), [(errno.EROFS, "make it writable"), (errno.EACCES, "allow access to it"), (errno.EIO, "mend the disk")]
)
def test_a_disk_that_fails_later(tmp_path: Path, number: int, cure: str) -> None:
    expected = f"metrics.jsonl: {os.strerror(number)}; the checkpoints are untouched: {cure} and start again"
    with pytest.raises(UserError, match=expected), run_folder.opened(toy_config(tmp_path)):
        raise OSError(number, os.strerror(number), "metrics.jsonl")


def test_read_only_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", refuse)
    expected = r"train.run_dir: .*run cannot be used as a folder: Read-only file system"
    with pytest.raises(UserError, match=expected), run_folder.opened(toy_config(tmp_path)):
        raise AssertionError("it was opened")


@pytest.mark.skipif(sys.platform == "win32", reason="waits for a system with POSIX locks")
def test_file_system_without_locks_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(run_folder.fcntl, "lockf", refuse)
    begin(tmp_path)
    assert "is on a file system without locks (No locks available)" in capsys.readouterr().err
