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
    marks = Marks(CPU)
    time.sleep(0.02)
    arrived = time.perf_counter()
    time.sleep(0.03)
    marks.passed("backward")
    marks.waited(None)
    whole = marks.seconds()["backward"]
    last = LastGradient(nn.Linear(2, 2), CPU)
    marks.waited(last)  # no gradient has come yet
    assert list(marks.seconds()) == ["backward"]
    last.moment = arrived
    marks.waited(last)
    marks.passed("optimizer")
    found = marks.seconds()
    assert list(found) == ["backward", "communication", "optimizer"]
    assert found["backward"] + found["communication"] == pytest.approx(whole) and found["communication"] >= 0.03


def test_last_gradient() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[0].weight.requires_grad_(False)
    last = LastGradient(model, CPU)
    assert last.moment is None
    before = time.perf_counter()
    model(torch.ones(2, 3)).sum().backward()
    assert before < last.moment < time.perf_counter()
    moment = last.moment
    last.close()
    model(torch.ones(2, 3)).sum().backward()
    assert last.moment == moment


def test_peak_memory_of_a_process_grows_with_what_it_touches() -> None:
    before = peak_memory(CPU)
    held = torch.ones(before // 4 + 2**28)  # as many bytes as before, and more
    assert peak_memory(CPU) >= before + held.nbytes // 2
    assert before > 50 * 2**20
