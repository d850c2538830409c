from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
import torch
from toy_run import toy_config, toy_model

from vlpfast.training import checkpoint
from vlpfast.training.saver import Saver
from vlpfast.types import UserError


@pytest.fixture
def trained(tmp_path: Path) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    model = toy_model(toy_config(tmp_path))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    model.text(torch.ones(2, 6)).square().sum().backward()
    optimizer.step()
    return model, optimizer


def test_one_at_a_time_from_the_same_memory(tmp_path: Path, trained, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = trained
    writing, most, threads = 0, 0, set()
    write = checkpoint.write

    def slow(*arguments: object) -> Path:
        nonlocal writing, most
        writing += 1
        most = max(most, writing)
        threads.add(threading.current_thread())
        time.sleep(0.05)
        path = write(*arguments)
        writing -= 1
        return path

    monkeypatch.setattr(checkpoint, "write", slow)
    saver = Saver(tmp_path / "c", keep=9, asynchronous=True)
    places, expected = [], []
    for step in range(3):
        saver.save(step, model, optimizer, {})
        places.append({name: copy.data_ptr() for name, copy in saver._copies.items()})
        expected.append(model.text.weight.clone())
        assert not saver.failed
        with torch.no_grad():
            model.text.weight += 1
    saver.close()
    assert most == 1 and len(threads) == 1 and threading.main_thread() not in threads
    assert places[0] == places[1] == places[2] and not saver._copies
    for step in range(3):
        checkpoint.load_weights(tmp_path / "c" / f"step-{step:08d}", model)
        assert torch.equal(model.text.weight, expected[step])


def test_copies_follow_the_tensors(tmp_path: Path, trained) -> None:
    """Another stage has other optimiser states; a layout in memory other than row by row is kept."""
    model, optimizer = trained
    saver = Saver(tmp_path / "c", keep=9, asynchronous=True)
    saver.save(1, model, optimizer, {})
    model.text.weight.data = model.text.weight.data.t().contiguous().t()
    other = torch.optim.SGD(model.parameters(), lr=0.1)
    saver.save(2, model, other, {})
    saver.wait()
    assert set(saver._copies) == {f"model.{name}" for name in model.state_dict()}
    assert saver._copies["model.text.weight"].stride() == model.text.weight.stride()
    found = torch.clone(model.text.weight)
    model.text.weight.data.zero_()
    checkpoint.load(tmp_path / "c" / "step-00000002", model, other)
    assert torch.equal(model.text.weight, found)
    saver.close()


def test_an_error_is_raised_once_and_the_way_out_only_logs_it(tmp_path: Path, trained, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    saver = Saver(tmp_path / "file", keep=9, asynchronous=True)
    saver.save(7, *trained, {})
    with pytest.raises(UserError, match="step-00000007 could not be saved: File exists"):
        saver.save(8, *trained, {})
    assert not saver.failed
    saver.wait()
    saver.save(9, *trained, {})
    saver.close()
    assert ["step-00000009 could not be saved" in record.message for record in caplog.records if "vlpfast" in record.name] == [
        True
    ]


def test_state_that_cannot_be_written_is_refused_at_once(tmp_path: Path, trained) -> None:
    model, optimizer = trained
    saver = Saver(tmp_path / "c", keep=9, asynchronous=True)
    with pytest.raises(TypeError, match="not JSON serializable"):
        saver.save(1, model, optimizer, {"position": object()})
    optimizer.state[model.text.weight]["count"] = 3
    with pytest.raises(TypeError, match=r"optimizer.state\['text.weight'\]\['count'\]: expected a tensor, .*, got int"):
        saver.save(1, model, optimizer, {})
    saver.close()
    assert not (tmp_path / "c").exists()
