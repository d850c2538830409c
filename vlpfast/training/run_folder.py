"""The folder of a run: whose it is, and what it was made with."""

from __future__ import annotations

import errno
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import yaml

import vlpfast
from vlpfast.training.config import MAY_CHANGE, RunConfig, differences, to_dict, to_yaml
from vlpfast.training.together import on_first
from vlpfast.types import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

PACKAGES = ("numpy", "omegaconf", "tokenizers", "safetensors", "pillow", "nvidia-dali-cuda130", "triton", "transformers")


def has_begun(run_dir: Path) -> bool:
    """Whether there is a checkpoint to go on from, whole or not. Until then a start in the same folder makes everything anew."""
    return any((run_dir / "checkpoints").glob("step-*[0-9]"))


@contextmanager
def full_disk_named(run_dir: Path) -> Iterator[None]:
    """Turns the system's error for a full disk, or one that cannot be used, into a UserError."""
    try:
        yield
    except OSError as error:
        cures = {
            **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "make room"),
            **dict.fromkeys((errno.EACCES, errno.EPERM), "allow access to it"),
            errno.EROFS: "make it writable",
            **dict.fromkeys((errno.EIO, errno.ESTALE), "mend the disk"),
        }
        if error.errno not in cures:
            raise
        where = error.filename or run_dir
        cure = cures[error.errno]
        raise UserError(f"{where}: {error.strerror}; the checkpoints are untouched: {cure} and start again") from error


@contextmanager
def opened(config: RunConfig) -> Iterator[Path]:
    """Makes or enters the run folder, writes config.yaml and environment.json, and keeps other runs out.

    Where a process group exists, process 0 does it for all of them.
    UserError: a run with other settings has begun there, another process is at work there, or the folder cannot be written.
    """
    run_dir = Path(config.train.run_dir)
    with ExitStack() as held, full_disk_named(run_dir):
        on_first(lambda: held.enter_context(_opened(config, run_dir)))
        yield run_dir


@contextmanager
def _opened(config: RunConfig, run_dir: Path) -> Iterator[None]:
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = open(run_dir / ".lock", "a")  # noqa: SIM115
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(f"train.run_dir: {run_dir} cannot be used as a folder: {error.strerror}") from error
    with lock:
        if fcntl is not None:
            # A POSIX lock is the process's own: gone with it however it ends, and not inherited by what it starts.
            try:
                fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError) as error:
                raise UserError(f"train.run_dir: another process is training in {run_dir}") from error
            except OSError as error:
                if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
                    raise
                print(
                    f"{run_dir} is on a file system without locks ({error.strerror}): make sure that no other run uses it",
                    file=sys.stderr,
                )
        if has_begun(run_dir):
            _check_same(config, run_dir)
        replace(run_dir / "config.yaml", to_yaml(config))
        replace(run_dir / "environment.json", json.dumps(environment(), indent=1) + "\n")
        yield


def replace(path: Path, text: str) -> None:
    """Writes a file aside and renames it."""
    aside = path.with_suffix(".tmp")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)


def environment() -> dict[str, Any]:
    """What the run is made with, as plain JSON values."""
    return {
        "vlpfast": vlpfast.__version__,
        "commit": _commit(),
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
    }


def _check_same(config: RunConfig, run_dir: Path) -> None:
    path = run_dir / "config.yaml"
    try:
        before = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"{run_dir} has checkpoints and no readable config.yaml: choose another train.run_dir") from error
    changed = differences(before, to_dict(config), MAY_CHANGE)
    if changed:
        shown = "; ".join(changed[:10]) + (f"; and {len(changed) - 10} more" if len(changed) > 10 else "")
        raise UserError(
            f"{run_dir} holds a run with other settings: {shown}. Choose another train.run_dir, or start with the settings that "
            "it has (its config.yaml can be given as CONFIG)"
        )


def _commit() -> str | None:
    root = Path(vlpfast.__file__).parents[1]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
