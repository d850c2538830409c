"""N processes of a process group that run the same checks."""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

Check = Callable[[int, int], None]  # of rank and world; asserts between its collectives only what fails on all ranks or on none


def _main(rank: int, world: int, folder: Path, backend: str, checks: Sequence[Check]) -> None:
    torch.set_num_threads(1)
    report = folder / f"rank{rank}"
    if backend == "nccl":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        backend, init_method=f"file://{folder}/store", rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )
    for check in checks:
        try:
            check(rank, world)
        except Exception:
            with report.open("a") as file:
                file.write(f"{getattr(check, '__name__', check)}, rank {rank} of {world}: {traceback.format_exc()}\n")
    dist.barrier()
    dist.destroy_process_group()
    with report.open("a") as file:
        file.write("done")


def run(world: int, folder: Path, checks: Sequence[Check], backend: str = "gloo") -> None:
    """Fails with what the ranks have to say, also of a rank that dies. Functions of test modules, which each process imports."""
    reports = [folder / f"rank{rank}" for rank in range(world)]
    for old in [*reports, folder / "store"]:
        old.unlink(missing_ok=True)
    context = multiprocessing.get_context("forkserver")  # forks a clean process that has imported torch already
    context.set_forkserver_preload(["torch", "torch.distributed", "vlpfast.ops.flops", "vlpfast.ops.contrastive"])
    processes = [context.Process(target=_main, args=(rank, world, folder, backend, checks)) for rank in range(world)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(180)
        process.kill()
    texts = [report.read_text() if report.exists() else "ended without a report" for report in reports]
    if texts != ["done"] * world:
        pytest.fail("\n".join(texts), pytrace=False)
