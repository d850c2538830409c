from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from toy_run import toy_config, toy_trainer

from vlpfast.training.metrics import Display, JsonLines, TensorBoard
from vlpfast.types import UserError


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


class FakeWandb(ModuleType):
    """The three calls of the package that are made, and what came."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.began: list[dict[str, Any]] = []
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.finished = 0

    def init(self, **options: Any) -> FakeWandb:
        self.began.append(options)
        return self

    def log(self, values: dict[str, float], step: int) -> None:
        self.logged.append((step, values))

    def finish(self) -> None:
        self.finished += 1


def test_weights_and_biases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for steps in (2, 3):
        config = toy_config(tmp_path, f"train.steps={steps}", "train.wandb=pictures")
        toy_trainer(config, on_evaluate=lambda step: {"m": step}).fit()
    first, second = fake.began
    assert first["project"] == "pictures" and first["name"] == "run" and first["config"]["model"]["inputs"] == 6
    assert (
        first["id"] == second["id"] and len(first["id"]) == 32 and second["resume"] == "allow"
    )  # one run, however often started
    written = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    training = [(step, values) for step, values in fake.logged if "train/loss" in values]
    assert [step for step, _ in training] == [1, 2, 3]
    for (_, values), line in zip(training, written, strict=True):
        assert values["train/loss"] == line["loss"] and values["train/mfu"] == line["mfu"]
        assert values["train/seconds/backward"] == line["seconds"]["backward"] and "train/step" not in values
        assert all(isinstance(value, (int, float)) for value in values.values())
    assert [(step, values) for step, values in fake.logged if "evaluation/m" in values] == [
        (2, {"evaluation/m": 2}),
        (3, {"evaluation/m": 3}),
    ]
    assert fake.finished == 2


def test_weights_and_biases_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"train.wandb=pictures needs the package wandb: pip install 'vlpfast\[wandb\]'"):
        toy_trainer(toy_config(tmp_path, "train.wandb=pictures")).fit()
    assert toy_trainer(toy_config(tmp_path, "train.steps=1")).fit()


def test_mfu_is_shown_where_it_is_known(capsys: pytest.CaptureFixture[str]) -> None:
    display = Display(0, 3, log_seconds=1000.0)
    display.step(record(1, mfu=0.5), samples=100)
    display.step(record(2, mfu=0.5, samples_per_s=100.0), samples=100)
    display.step(record(3, mfu=0.2), samples=100)  # half as long as the one before
    display.close()
    first, last = capsys.readouterr().err.splitlines()
    assert "data wait 25%  MFU 50%  ETA" in first and "MFU 40%" in last
