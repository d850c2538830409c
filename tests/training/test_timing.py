from __future__ import annotations

import multiprocessing
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
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
    marks.waited(arrived)
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


class Late(torch.autograd.Function):
    """Its backward takes its time."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, seconds: float) -> torch.Tensor:
        ctx.seconds = seconds
        return x.clone()

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple:
        time.sleep(ctx.seconds)
        return grad, None


def rank_main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=timedelta(seconds=20)
    )
    model = nn.Linear(4, 4)
    spread = nn.parallel.DistributedDataParallel(model)
    last = LastGradient(model, CPU)
    for _ in range(2):  # the second counts: both ranks have set up by then
        dist.barrier()
        marks = Marks(CPU)
        out = Late.apply(spread(torch.ones(2, 4)), 0.2 * rank).sum()
        marks.passed("forward")
        out.backward()
        marks.passed("backward")
        marks.waited(last.moment)
    (folder / f"rank{rank}").write_text(repr(marks.seconds()))
    dist.destroy_process_group()


def test_a_rank_waits_for_the_late_one(tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed"])
    processes = [context.Process(target=rank_main, args=(rank, tmp_path)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        process.kill()
    early, late = (eval((tmp_path / f"rank{rank}").read_text()) for rank in range(2))
    assert early["communication"] > 0.15 and early["backward"] < 0.1
    assert late["communication"] < 0.1 and late["backward"] > 0.19
