from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from toy_run import start, toy_config, toy_model, toy_trainer

from vlpfast.training import checkpoint
from vlpfast.types import UserError


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run of 8 steps with checkpoints of the steps 4 and 8."""
    assert toy_trainer(toy_config(tmp_path, "train.steps=8")).fit()
    return tmp_path / "run"


def damage(path: Path, how: str) -> None:
    data = path.read_bytes()
    if how == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif how == "bit flipped":
        path.write_bytes(data[:100] + bytes([data[100] ^ 4]) + data[101:])
    elif how == "empty":
        path.write_bytes(b"")
    else:
        path.unlink()


@pytest.mark.parametrize("how", ["truncated", "bit flipped", "empty", "missing"])
@pytest.mark.parametrize("file", ["__0_0.distcp", ".metadata", "state.json", "manifest.json"])
def test_a_damaged_checkpoint_is_named_and_the_older_one_used(
    run: Path, capfd: pytest.CaptureFixture[str], file: str, how: str
) -> None:
    newest = run / "checkpoints" / "step-00000008"
    damage(newest / file, how)
    found, notes = checkpoint.find_newest(run / "checkpoints")
    assert found.name == "step-00000004"
    assert len(notes) == 1 and f"{newest} is damaged (" in notes[0]
    assert file in notes[0] or file == "manifest.json"  # where the manifest is wrong, it may be another file that does not fit it


def test_going_on_from_the_older_one_gives_the_same_run(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    newest = run / "checkpoints" / "step-00000008"
    whole = (newest / "__0_0.distcp").read_bytes()
    damage(newest / "__0_0.distcp", "truncated")
    (run / "checkpoints" / "step-00000011.tmp").mkdir()
    assert toy_trainer(toy_config(run.parent, "train.steps=8")).fit()
    said = capfd.readouterr().err
    assert f"{newest} is damaged" in said and "step-00000011.tmp is half-written" in said and "4 steps left" in said
    assert (newest / "__0_0.distcp").read_bytes() == whole  # every tensor bit for bit
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert names == ["step-00000004", "step-00000008", "step-00000008.damaged"]


def test_never_silently_afresh(run: Path) -> None:
    for path in (run / "checkpoints").iterdir():
        damage(path / "state.json", "truncated")
    metrics = (run / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match=r"no checkpoint in .* is whole: .*step-00000008 is damaged.*step-00000004 is damaged"):
        toy_trainer(toy_config(run.parent, "train.steps=8")).fit()
    assert (run / "metrics.jsonl").read_bytes() == metrics and len(list((run / "checkpoints").iterdir())) == 2


def test_half_written_first_checkpoint_starts_from_the_beginning_and_says_so(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run" / "checkpoints" / "step-00000004.tmp").mkdir(parents=True)
    assert toy_trainer(toy_config(tmp_path, "train.steps=1")).fit()
    assert "step-00000004.tmp is half-written" in capfd.readouterr().err


def test_checkpoint_of_another_model(run: Path) -> None:
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=r"step-00000008 holds another model .*: preset:  -> small; head.width: 16 -> 4"):
        toy_trainer(toy_config(run.parent, "model.preset=small")).fit()
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_checkpoint_of_a_stage_that_is_no_more(run: Path) -> None:
    with pytest.raises(UserError, match="was saved in stage 'train'; the configuration has warm"):
        toy_trainer(toy_config(run.parent, "stages.warm.steps=3")).fit()


def test_frozen_now_but_trained_then(run: Path) -> None:
    with pytest.raises(UserError, match=r"has optimiser state for 'text.weight', which this configuration does not train"):
        toy_trainer(toy_config(run.parent, "stages.train={frozen: ['text.*']}", "train.steps=9")).fit()


def test_newer_format(run: Path) -> None:
    path = run / "checkpoints" / "step-00000008"
    text = (path / "state.json").read_text()
    (path / "state.json").write_text(text.replace('"format": 1', '"format": 2'))
    with pytest.raises(UserError, match="has checkpoint format 2; this version reads format 1"):
        checkpoint.read_state(path, {})


@pytest.mark.parametrize("what", ["nothing", "text", "empty run", "damaged"])
def test_weights_that_cannot_be_loaded(run: Path, tmp_path: Path, what: str) -> None:
    model = toy_model(toy_config(tmp_path))
    path = tmp_path / what
    expected = "no such file or folder"
    if what == "text":
        path.write_text("not tensors")
        expected = "is not a whole .safetensors file"
    elif what == "empty run":
        path.mkdir()
        expected = "it has no checkpoint"
    elif what == "damaged":
        path = run / "checkpoints" / "step-00000008"
        damage(path / "state.json", "missing")
        expected = "is damaged: state.json is missing"
    with pytest.raises(UserError, match=expected):
        checkpoint.load_weights(path, model)


def test_weights_of_another_shape(run: Path, tmp_path: Path) -> None:
    model = toy_model(toy_config(tmp_path, "model.head.width=4"))
    before = model.text.weight.clone()
    with pytest.raises(UserError, match=r"does not fit Toy: it image.0.weight has shape \[16, 6\] where the model has \[4, 6\]"):
        checkpoint.load_weights(run, model)
    assert torch.equal(model.text.weight, before)


def test_exported_tied_weights(tmp_path: Path) -> None:
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(2, 2), "b": torch.nn.Linear(2, 2)})
    model["b"].weight = model["a"].weight
    checkpoint.export(model, tmp_path / "model.safetensors")
    other = torch.nn.ModuleDict({"a": torch.nn.Linear(2, 2), "b": torch.nn.Linear(2, 2)})
    checkpoint.load_weights(tmp_path / "model.safetensors", other)
    assert torch.equal(other["b"].weight, model["a"].weight)


def test_disk_full_while_saving(run: Path, tmp_path: Path) -> None:
    folder = run / "checkpoints"
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    process = start(tmp_path, "train.steps=12", largest_file=40_000)  # room for the metrics, not for the tensors
    process.join(60)
    said = (tmp_path / "log").read_text()
    assert process.exitcode == 2, said
    assert f"error: checkpoint {folder / 'step-00000012'} could not be saved: File too large" in said and "Traceback" not in said
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    process = start(tmp_path, "train.steps=12")
    process.join(60)
    said = (tmp_path / "log").read_text()
    assert process.exitcode == 0 and f"going on from {folder / 'step-00000008'}: 4 steps left" in said


def test_disk_full_while_logging(tmp_path: Path) -> None:
    process = start(tmp_path, largest_file=1000)
    process.join(60)
    said = (tmp_path / "log").read_text()
    assert process.exitcode == 2 and "File too large; the checkpoints are untouched" in said and "Traceback" not in said


def test_a_checkpoint_appears_when_it_is_whole(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = os.rename

    def refuse(source: Path, target: Path) -> None:
        if Path(target).name != "step-00000009":  # torch renames a file of its own
            rename(source, target)
            return
        assert checkpoint.damaged(Path(source)) == "" and not Path(target).exists()
        raise PermissionError(13, "Permission denied", str(source))

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(UserError, match="step-00000009 could not be saved: Permission denied"):
        toy_trainer(toy_config(run.parent, "train.steps=9")).fit()
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-00000004", "step-00000008"]


def test_killed_while_an_old_one_is_removed(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is left of it is no checkpoint, damaged or not, and is gone after the next start."""

    class Killed(BaseException):
        pass

    def remove_half(path: Path, **_: bool) -> None:
        if (path / "manifest.json").exists():
            (path / "manifest.json").unlink()
            raise Killed

    folder = run / "checkpoints"
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.shutil, "rmtree", remove_half)
        with pytest.raises(Killed):
            toy_trainer(toy_config(run.parent, "train.steps=9")).fit()
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000004.old", "step-00000008", "step-00000009"]
    found, notes = checkpoint.find_newest(folder)
    assert found.name == "step-00000009" and not notes
    assert toy_trainer(toy_config(run.parent, "train.steps=10")).fit()
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000009", "step-00000010"]
