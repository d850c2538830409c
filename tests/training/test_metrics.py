from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from toy_run import toy_config, toy_trainer

from vlpfast.training.metrics import Display, JsonLines, TensorBoard


@pytest.mark.parametrize("tail", [b"", b'{"step": 3, "lo', b"\n\n", b'{"step": 9}\n{"step": 3}\n', b"[]\n", b"\xff\xfe\n"])
def test_json_lines_keep_what_belongs_and_drop_the_rest(tmp_path: Path, tail: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n' + tail)
    lines = JsonLines(path, lambda line: line["step"] <= 4)
    lines.write({"step": 3, "loss": float("nan"), "inner": {"x": float("inf"), "y": 0.1}})
    written = [json.loads(line) for line in path.read_text().splitlines()]  # before it is closed: every line is written at once
    assert written == [{"step": 1}, {"step": 2}, {"step": 3, "loss": None, "inner": {"x": None, "y": 0.1}}]
    lines.sync()
    lines.close()


def record(step: int, **more: float) -> dict[str, float]:
    return {"step": step, "loss": 1.5, "lr": 1e-3, "samples_per_s": 200.0, "data_wait": 0.25, **more}


def test_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    display = Display(0, 10, log_seconds=1000.0)
    for step in range(1, 11):
        display.step(record(step, loss=float("nan") if step == 10 else 1.5), samples=100)
    display.close()
    captured = capsys.readouterr()
    assert captured.out == ""
    first, last = captured.err.splitlines()
    assert first.startswith("step 1/10  loss 1.5000  lr 1.00e-03  200 samples/s  data wait 25%  ETA ")
    assert last.startswith("step 10/10  loss not finite")


def test_progress_line_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "160")
    display = Display(0, 2, log_seconds=1000.0)
    assert sys.stderr is not None
    display.say("[not markup]")
    display.step(record(1), samples=100)
    display.step(record(2), samples=100)
    display.close()
    shown = capsys.readouterr().err
    assert "[not markup]" in shown and "2/2" in shown and "200 samples/s" in shown and "data wait 25%" in shown and "ETA" in shown


def test_tensorboard_goes_on_after_a_resume(tmp_path: Path) -> None:
    reader = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="waits for the package tensorboard"
    )
    for steps in (6, 7):
        config = toy_config(tmp_path, f"train.steps={steps}", "train.tensorboard_every=1")
        toy_trainer(config, on_evaluate=lambda step: {"m": step}).fit()
        newest = tmp_path / "run" / "checkpoints" / "step-00000006"
        (newest / "state.json").unlink(missing_ok=True)  # so that the steps 5 and 6 are taken twice
    board = reader.EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    board.Reload()
    written = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [event.step for event in board.Scalars("train/loss")] == list(range(1, 8))
    assert [event.value for event in board.Scalars("train/losses/fit")] == pytest.approx([r["losses"]["fit"] for r in written])
    assert [event.step for event in board.Scalars("evaluation/m")] == [7]


def test_no_tensorboard_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    board = TensorBoard(tmp_path / "board", every=1, start=0)
    board.write(1, {"loss": 1.0})
    board.close()
    assert not (tmp_path / "board").exists()
