from __future__ import annotations

import time

import pytest
import torch
from torch import nn

from vlpfast.training.timing import LastGradient, Marks, peak_memory

CPU = torch.device("cpu")


def test_parts_are_the_time_between_marks() -> None:
    marks = Marks(CPU)
    time.sleep(0.02)
    marks.passed("forward")
    for _ in range(2):  # parts of the same name are added up
        time.sleep(0.01)
        marks.passed("backward")
    assert list(marks.seconds()) == ["forward", "backward"]
    assert all(0.02 <= seconds < 0.2 for seconds in marks.seconds().values())
    assert marks.seconds() == marks.seconds()


def test_waiting_is_split_off() -> None:
    last = LastGradient([], CPU)
    last.moment = time.perf_counter()  # of what came before the step
    time.sleep(0.02)
    marks = Marks(CPU, last)
    begin = time.perf_counter()
    marks.passed("forward")  # no gradient has come yet
    time.sleep(0.02)
    last.moment = arrived = time.perf_counter()
    time.sleep(0.03)
    marks.passed("backward")
    end = time.perf_counter()
    marks.passed("optimizer")
    found = marks.seconds()
    assert list(found) == ["forward", "backward", "communication", "optimizer"]
    assert found["communication"] == pytest.approx(end - arrived, abs=5e-3) and found["communication"] >= 0.03
    assert found["backward"] == pytest.approx(arrived - begin, abs=5e-3) and found["forward"] < 5e-3


def test_last_gradient() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[0].weight.requires_grad_(False)
    last = LastGradient(model.parameters(), CPU)
    assert last.moment is None
    before = time.perf_counter()
    model(torch.ones(2, 3)).sum().backward()
    arrived, after = last.moment, time.perf_counter()
    assert before < arrived < after
    assert last.until(after) == [(arrived, after)] and last.until(after) == []
    last.close()
    model(torch.ones(2, 3)).sum().backward()
    assert last.moment is None


def test_peak_memory_of_a_process_grows_with_what_it_touches() -> None:
    before = peak_memory(CPU)
    held = torch.ones(before // 4 + 2**28)  # as many bytes as before, and more
    assert peak_memory(CPU) >= before + held.nbytes // 2
    assert before > 50 * 2**20
