"""Toy runs that are killed at random and started again until they are done: for test_faults.py and benchmarks/faults.py."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from toy_run import numbers, process, start, start_ranks, toy_config

from vlpfast.training import checkpoint

HANGS = 120  # seconds after which a process that should have ended hangs


def storm(
    folder: Path,
    kills: int,
    ranks: int,
    seed: int,
    *overrides: str,
    seconds: float,
    torchrun: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Kills one process of a run, `kills` times: at a random moment, or while a checkpoint is being written.

    After each kill the others have to end by themselves, and every checkpoint that is not named .tmp has to be whole. Runs that
    came to their end are compared with one that was not broken; then another one begins, until there were enough kills.
    seconds: how long each batch takes. torchrun: starts the ranks, instead of this process; it ends those that a kill leaves.
    -> what was met. AssertionError: a promise is broken; names the seed.
    """
    begin = partial(_by_torchrun if torchrun else _begin, ranks=ranks, overrides=overrides, seconds=seconds)
    draws, met = random.Random(seed), Counter()
    unbroken = begin(folder / "whole")
    began = time.perf_counter()
    assert _ended(unbroken, folder / "whole") == [0] * len(unbroken), _said(folder / "whole")
    usual, steps = time.perf_counter() - began, _newest(folder / "whole")
    while met["kills"] < kills:
        broken = folder / f"broken-{met['runs']}"
        met["runs"] += 1
        finished = False
        while not finished:
            before, newest = _half_written(broken), _newest(broken)
            processes = begin(broken)
            victim = draws.randrange(ranks)
            if met["kills"] < kills:
                # Two of three kills wait for one more checkpoint, so that the run gets on; the others come at any moment.
                if draws.random() < 2 / 3:
                    _wait(processes, partial(_got_on, broken, newest), HANGS)
                at_save = draws.random() < 0.5
                saving = partial(_is_saving, broken, before | _half_written(broken)) if at_save else lambda: False
                _wait(processes, saving, usual if at_save else draws.uniform(0, usual / 3))
                time.sleep(draws.uniform(0, 0.01) if at_save else 0)
                _kill(broken, processes, victim)
            codes = _ended(processes, broken)
            _look(broken, met)
            finished = not any(codes)
            if met["kills"] < kills and not finished:
                assert -signal.SIGKILL in codes or "Signal 9 (SIGKILL)" in _said(broken), f"seed {seed}: {codes}: {_said(broken)}"
                assert 0 not in codes or _newest(broken) == steps, f"seed {seed}: {codes}: one ended as if nothing had happened"
                met["kills"] += 1
                say(f"kill {met['kills']} of {kills}: run {met['runs']}, after step {len(_lines(broken))}")
            else:
                assert finished, f"seed {seed}: {codes}: {_said(broken)}"
        assert numbers(broken) == numbers(folder / "whole"), f"seed {seed}: {broken} has other metrics"
        assert _model(broken) == _model(folder / "whole"), f"seed {seed}: {broken} came to another model"
    return {"seed": seed, "ranks": ranks, "overrides": list(overrides), "steps": steps, **met}


def _begin(folder: Path, ranks: int, overrides: Sequence[str], seconds: float) -> list[BaseProcess]:
    _forget(folder)
    if ranks == 1:
        return [start(folder, *overrides, seconds=seconds)]
    processes = start_ranks(folder, ranks, *overrides, seconds=seconds)
    # They have met: without torchrun, one that waits there for a dead one does so for train.timeout_minutes.
    _wait(processes, lambda: "parameters" in _said(folder), HANGS)
    return processes


def _by_torchrun(folder: Path, ranks: int, overrides: Sequence[str], seconds: float) -> list[BaseProcess]:
    folder.mkdir(exist_ok=True)
    toy_config(folder)
    _forget(folder)
    (folder / "log-torchrun").touch()
    return [process(_run_torchrun, folder, ranks, overrides, seconds)]


def _run_torchrun(folder: Path, ranks: int, overrides: Sequence[str], seconds: float) -> None:
    script = Path(__file__).parent / "toy_run.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", str(script)]
    with open(folder / "log-torchrun", "w") as log:
        sys.exit(subprocess.run([*command, str(folder), str(seconds), *overrides], stderr=log).returncode)


def _forget(folder: Path) -> None:
    for old in (*folder.glob("log*"), *folder.glob("pid-*")):
        old.unlink()


def _kill(folder: Path, processes: list[BaseProcess], rank: int) -> None:
    if not (folder / "log-torchrun").exists():
        processes[rank].kill()
        return
    _wait(processes, (folder / f"pid-{rank}").exists, HANGS)
    with suppress(ProcessLookupError, FileNotFoundError, ValueError):  # it came to its end, or has not written its number yet
        os.kill(int((folder / f"pid-{rank}").read_text()), signal.SIGKILL)


def _wait(processes: list[BaseProcess], done: Callable[[], bool], seconds: float) -> None:
    """At most so long, or until one ends."""
    until = time.perf_counter() + seconds
    while time.perf_counter() < until and all(one.is_alive() for one in processes) and not done():
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
    for one in processes:
        one.join(max(0.0, until - time.perf_counter()))
    codes = [one.exitcode for one in processes]
    for one in processes:
        if one.is_alive():
            os.kill(one.pid, signal.SIGABRT)
            one.join(5)
            one.kill()
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
