"""Where the numbers of a run go: JSON lines, TensorBoard, Weights & Biases, and a line for whoever watches."""

from __future__ import annotations

import json
import math
import os
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from vlpfast.types import UserError


class JsonLines:
    """One JSON object a line, appended. Every line reaches the operating system at once; sync() sees it onto the disk.

    keep(record): whether a line of an earlier start stays. The file is cut at the first that does not, and at a half-written one.
    """

    def __init__(self, path: Path, keep: Callable[[dict[str, Any]], bool]) -> None:
        if path.exists():
            os.truncate(path, _kept_bytes(path, keep))
        self._file = open(path, "a", buffering=1)  # noqa: SIM115

    def write(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps(_finite(record)) + "\n")

    def sync(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def _kept_bytes(path: Path, keep: Callable[[dict[str, Any]], bool]) -> int:
    kept = 0
    with open(path, "rb") as file:
        for line in file:
            try:
                stays = line.endswith(b"\n") and keep(json.loads(line))
            except (ValueError, KeyError, TypeError):
                stays = False
            if not stays:
                break
            kept += len(line)
    return kept


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


class TensorBoard:
    """Scalars for TensorBoard where that package is installed; elsewhere, or with every=0, nothing."""

    def __init__(self, folder: Path, every: int, start: int) -> None:
        self.every = every
        self._writer = None
        if every:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                return
            self._writer = SummaryWriter(str(folder), purge_step=start + 1)  # steps that are taken again replace the old ones

    def write(self, step: int, values: dict[str, Any], prefix: str = "train") -> None:
        if self._writer is not None:
            for key, value in _scalars(values, prefix):
                self._writer.add_scalar(key, value, step)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class WeightsAndBiases:
    """The same scalars for Weights & Biases, in `project`; with "" nothing. A run folder is one run there, however often it is
    started: its id is kept in run_dir/wandb-id. UserError: the package is not installed."""

    def __init__(self, project: str, run_dir: Path, config: dict[str, Any]) -> None:
        self._run = None
        if not project:
            return
        try:
            import wandb
        except ImportError as error:
            raise UserError(f"train.wandb={project} needs the package wandb: pip install 'vlpfast[wandb]' ({error})") from error
        kept = run_dir / "wandb-id"
        if not kept.exists():
            kept.write_text(uuid.uuid4().hex)
        name = run_dir.resolve().name
        self._run = wandb.init(project=project, name=name, id=kept.read_text(), resume="allow", dir=str(run_dir), config=config)

    def write(self, step: int, values: dict[str, Any], prefix: str = "train") -> None:
        if self._run is not None:
            self._run.log(dict(_scalars(values, prefix)), step=step)

    def close(self) -> None:
        if self._run is not None:
            self._run.finish()


def _scalars(values: dict[str, Any], prefix: str) -> Iterator[tuple[str, float]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _scalars(value, f"{prefix}/{key}")
        elif isinstance(value, (int, float)):
            yield f"{prefix}/{key}", value


class Display:
    """On a terminal a progress line, elsewhere a line of text every log_seconds. All on stderr: stdout is for results."""

    def __init__(self, done: int, total: int, log_seconds: float) -> None:
        self._first, self._total = done, total
        self._samples = self._seconds = self._wait = self._used = 0.0  # since the last line
        self._started = self._shown = time.perf_counter()
        self._bar: Progress | None = None
        self._every = log_seconds
        console = Console(stderr=True, highlight=False)
        if console.is_terminal:
            columns = (
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[text]}"),
                TextColumn("ETA"),
            )
            self._bar = Progress(*columns, TimeRemainingColumn(), console=console)
            self._task = self._bar.add_task("training", total=total, completed=done, text="")
            self._bar.start()
            self._every = 0.2

    def step(self, record: dict[str, Any], samples: int) -> None:
        step, now = record["step"], time.perf_counter()
        seconds = samples / record["samples_per_s"]
        self._samples += samples
        self._seconds += seconds
        self._wait += record["data_wait"] * seconds
        self._used += record.get("mfu", 0.0) * seconds
        if now - self._shown < self._every and self._first + 1 < step < self._total:
            return
        loss = f"{record['loss']:.4f}" if math.isfinite(record["loss"]) else "not finite"
        rate, wait = self._samples / self._seconds, 100 * self._wait / self._seconds
        text = f"loss {loss}  lr {record['lr']:.2e}  {rate:,.0f} samples/s  data wait {wait:.0f}%"
        if "mfu" in record:
            text += f"  MFU {100 * self._used / self._seconds:.3g}%"
        if self._bar:
            self._bar.update(self._task, completed=step, text=text)
        else:
            left = int((now - self._started) / (step - self._first) * (self._total - step))
            self.say(f"step {step}/{self._total}  {text}  ETA {left // 60}:{left % 60:02d}")
        self._samples = self._seconds = self._wait = self._used = 0.0
        self._shown = now

    def say(self, text: str) -> None:
        if self._bar:
            self._bar.console.print(text, markup=False)
        else:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._bar:
            self._bar.stop()
