"""Toy runs that are killed at random and started again until they are done: for test_faults.py and benchmarks/faults.py."""

from __future__ import annotations

import os
import random
import re
import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from toy_run import numbers, start, start_ranks

from vlpfast.training import checkpoint

HANGS = 40  # seconds after which a process that should have ended hangs


def storm(
    folder: Path, kills: int, ranks: int, seed: int, *overrides: str, say: Callable[[str], None] = lambda text: None, **how: Any
) -> dict[str, Any]:
    """Kills one process of a run, `kills` times: at a random moment, or while a checkpoint is being written.

    After each kill the others have to end by themselves, and every checkpoint that is not named .tmp has to be whole. Runs that
    came to their end are compared with one that was not broken; then another one begins, until there were enough kills.
    overrides, how: as toy_run.start takes them. -> what was met. AssertionError: a promise is broken; names the seed.
    """
    draws, met = random.Random(seed), Counter()
    unbroken = _begin(folder / "whole", ranks, overrides, how)
    began = time.perf_counter()
    assert _ended(unbroken, folder / "whole") == [0] * ranks, _said(folder / "whole")
    usual, steps = time.perf_counter() - began, _newest(folder / "whole")
    while met["kills"] < kills:
        broken = folder / f"broken-{met['runs']}"
        met["runs"] += 1
        codes: list[int] = []
        while codes != [0] * ranks:
            before, newest = _half_written(broken), _newest(broken)
            processes = _begin(broken, ranks, overrides, how)
            victim = draws.choice(processes)
            if met["kills"] < kills:
                # Two of three kills wait for one more checkpoint, so that the run gets on; the others come at any moment.
                if draws.random() < 2 / 3:
                    _wait(processes, partial(_got_on, broken, newest), HANGS)
                at_save = draws.random() < 0.5
                saving = partial(_is_saving, broken, before | _half_written(broken)) if at_save else lambda: False
                _wait(processes, saving, usual if at_save else draws.uniform(0, usual / 3))
                time.sleep(draws.uniform(0, 0.01) if at_save else 0)
                victim.kill()
            codes = _ended(processes, broken)
            _look(broken, met)
            if victim.exitcode == -signal.SIGKILL:
                met["kills"] += 1
                say(f"kill {met['kills']} of {kills}: run {met['runs']}, after step {len(_lines(broken))}")
                assert 0 not in codes or _newest(broken) == steps, f"seed {seed}: {codes}: one ended as if nothing had happened"
            else:
                assert codes == [0] * ranks, f"seed {seed}: {codes}: {_said(broken)}"
        assert numbers(broken) == numbers(folder / "whole"), f"seed {seed}: {broken} has other metrics"
        assert _model(broken) == _model(folder / "whole"), f"seed {seed}: {broken} came to another model"
    return {"seed": seed, "ranks": ranks, "overrides": list(overrides), "steps": steps, **met}


def _begin(folder: Path, ranks: int, overrides: Sequence[str], how: dict[str, Any]) -> list[BaseProcess]:
    for old in folder.glob("log*"):
        old.unlink()
    if ranks == 1:
        return [start(folder, *overrides, **how)]
    processes = start_ranks(folder, ranks, *overrides, **how)
    # They have met: without torchrun, one that waits there for a dead one does so for train.timeout_minutes.
    _wait(processes, lambda: "parameters" in _said(folder), HANGS)
    return processes


def _wait(processes: list[BaseProcess], done: Callable[[], bool], seconds: float) -> None:
    """At most so long, or until one ends."""
    until = time.perf_counter() + seconds
    while time.perf_counter() < until and all(process.is_alive() for process in processes) and not done():
        time.sleep(0.001)


def _half_written(folder: Path) -> set[tuple[str, int]]:
    found = set()
    for path in (folder / "run" / "checkpoints").glob("*.tmp"):
        with suppress(FileNotFoundError):
            found.add((path.name, path.stat().st_ctime_ns))
    return found


def _newest(folder: Path) -> int:
    return max((int(path.name[5:]) for path in (folder / "run" / "checkpoints").glob("step-" + "[0-9]" * 8)), default=0)


def _got_on(folder: Path, newest: int) -> bool:
    return _newest(folder) > newest


def _is_saving(folder: Path, before: set[tuple[str, int]]) -> bool:
    return bool(_half_written(folder) - before)


def _ended(processes: list[BaseProcess], folder: Path) -> list[int]:
    until = time.perf_counter() + HANGS
    for process in processes:
        process.join(max(0.0, until - time.perf_counter()))
    codes = [process.exitcode for process in processes]
    for process in processes:
        if process.is_alive():
            os.kill(process.pid, signal.SIGABRT)
            process.join(5)
            process.kill()
    assert None not in codes, f"{codes}: a process hangs\n{_said(folder)}"
    return codes


def _look(folder: Path, met: Counter[str]) -> None:
    """What the last start found and left."""
    met["starts"] += 1
    met["went on from a checkpoint"] += "going on from " in _said(folder)
    met["passed over a half-written one"] += "is half-written: passed over" in _said(folder)
    for path in (folder / "run" / "checkpoints").glob("step-*"):
        if re.fullmatch(r"step-\d+", path.name):
            assert checkpoint.damaged(path) == "", f"{path} is torn: {checkpoint.damaged(path)}"
    assert not list((folder / "run" / "checkpoints").glob("*.damaged")), _said(folder)


def _lines(folder: Path) -> list[str]:
    path = folder / "run" / "metrics.jsonl"
    return path.read_text().splitlines() if path.exists() else []


def _model(folder: Path) -> bytes:
    return (folder / "run" / "model.safetensors").read_bytes()


def _said(folder: Path) -> str:
    return "\n".join(path.read_text() for path in sorted(folder.glob("log*")))
