"""Kills, full disks, foreign locks, clocks that jump: nothing is lost, nothing hangs, and the message is clear."""

from __future__ import annotations

import fcntl
import json
import os
import pickle
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from storm import storm
from toy_run import numbers, process, start, start_ranks, toy_config, toy_trainer

from vlpfast.training import checkpoint
from vlpfast.types import UserError

ROOT = Path(__file__).resolve().parents[2]
KILLS = int(os.environ.get("VLPFAST_TEST_KILLS", "3"))  # of one process; benchmarks/faults.py is the long form
STEPS = ("train.steps=40", "train.checkpoint_every=3", "train.batch_size=4")


def wait_for(folder: Path, pattern: str) -> Path:
    """Until something of that name is in the folder."""
    until = time.perf_counter() + 60
    while time.perf_counter() < until:
        if found := list(folder.glob(pattern)):
            return found[0]
        time.sleep(0.002)
    raise AssertionError(f"no {pattern} in {folder}")


@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_at_random_it_is_the_same_run(tmp_path: Path, ranks: int) -> None:
    kills = KILLS if ranks == 1 else max(1, KILLS // 3)
    settings = (*STEPS, "train.async_checkpoint=true", "train.strategy=fsdp")  # the other tests of two ranks: ddp
    met = storm(tmp_path, kills, ranks, random.randrange(1000), *settings, seconds=0.005)
    assert met["kills"] == kills and met["starts"] > kills


def test_background_saving_writes_the_same(tmp_path: Path) -> None:
    for name, background in (("at-once", False), ("background", True)):
        (tmp_path / name).mkdir()
        assert toy_trainer(toy_config(tmp_path / name, "train.keep_checkpoints=9", f"train.async_checkpoint={background}")).fit()
    assert numbers(tmp_path / "at-once") == numbers(tmp_path / "background")
    files = sorted(path.relative_to(tmp_path / "at-once") for path in (tmp_path / "at-once").rglob("step-*/*"))
    assert len(files) == 12 and not list(tmp_path.rglob("*.tmp"))
    for file in files:
        if file.name not in (".metadata", "manifest.json"):  # the former holds a number of the writer's own
            assert (tmp_path / "at-once" / file).read_bytes() == (tmp_path / "background" / file).read_bytes()


def test_killed_while_writing_in_the_background(tmp_path: Path) -> None:
    killed = start(tmp_path, *STEPS, "train.async_checkpoint=true", kill_in_save=6, seconds=0.01)
    killed.join(60)
    assert killed.exitcode == -signal.SIGKILL
    folder = tmp_path / "run" / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000003", "step-00000006.tmp"]
    found, notes = checkpoint.find_newest(folder)
    assert found.name == "step-00000003" and notes == [f"{folder / 'step-00000006.tmp'} is half-written: passed over"]


@pytest.mark.parametrize("ranks", [1, 2])
def test_full_disk_in_the_background_ends_the_run_at_the_next_step(tmp_path: Path, ranks: int) -> None:
    settings = ("train.steps=400", "train.checkpoint_every=12", "train.async_checkpoint=true")
    if ranks == 1:
        processes = [start(tmp_path, *settings, largest_file=20_000, seconds=0.05)]
    else:
        processes = start_ranks(tmp_path, ranks, *settings, last={"largest_file": 20_000}, seconds=0.05)
    for one in processes:
        one.join(60)
    said = [path.read_text() for path in sorted(tmp_path.glob("log*"))]
    assert [one.exitcode for one in processes] == [2] * ranks, said
    assert "step-00000012 could not be saved: " in said[-1] and "File too large; the earlier checkpoints" in said[-1]
    assert not any("Traceback" in text for text in said) and (ranks == 1 or "error:" not in said[0])  # one says it
    assert not list((tmp_path / "run" / "checkpoints").iterdir())
    assert 12 <= len(numbers(tmp_path)) < 24  # it does not wait for the next checkpoint


@pytest.mark.parametrize("ranks", [1, 2])
def test_sigterm_while_writing_in_the_background(tmp_path: Path, ranks: int) -> None:
    settings = (*STEPS[1:], "train.steps=1000", "train.async_checkpoint=true", "train.keep_checkpoints=99")
    how = {"seconds": 0.01, "save_seconds": 0.3}
    processes = [start(tmp_path, *settings, **how)] if ranks == 1 else start_ranks(tmp_path, ranks, *settings, **how)
    wait_for(tmp_path / "run" / "checkpoints", "step-*.tmp")
    processes[-1].terminate()  # one of them
    for one in processes:
        one.join(60)
    said = "".join(path.read_text() for path in tmp_path.glob("log*"))
    assert [one.exitcode for one in processes] == [75] * ranks, said
    steps = len(numbers(tmp_path))
    found, notes = checkpoint.find_newest(tmp_path / "run" / "checkpoints")
    assert found.name == f"step-{steps:08d}" and not notes and f"stopped after step {steps} and saved" in said
    assert (tmp_path / "run" / "checkpoints" / "step-00000003").exists()


def test_clocks_that_jump(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The time of day plays no part in what is trained, found or kept."""
    jumps = random.Random(0)
    (tmp_path / "steady").mkdir()
    toy_trainer(toy_config(tmp_path / "steady")).fit()
    (tmp_path / "jumping").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: jumps.uniform(0, 4e9))
        patch.setattr(time, "time_ns", lambda: int(jumps.uniform(0, 4e18)))
        toy_trainer(toy_config(tmp_path / "jumping", "train.steps=9")).fit()
        folder = tmp_path / "jumping" / "run" / "checkpoints"
        for age, path in enumerate(sorted(folder.iterdir())):  # the newest is the oldest by its date
            os.utime(path, (4e9 - 1e9 * age,) * 2)
        assert checkpoint.find_newest(folder)[0].name == "step-00000009"
        toy_trainer(toy_config(tmp_path / "jumping", "train.steps=12", "train.schedule=cosine")).fit()
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000009", "step-00000012"]
    assert [line["step"] for line in numbers(tmp_path / "jumping")] == list(range(1, 13))
    assert [line["loss"] for line in numbers(tmp_path / "jumping")[:4]] == [
        line["loss"] for line in numbers(tmp_path / "steady")[:4]
    ]


# --- through the command ------------------------------------------------------------------------------------------------


def command(folder: Path, largest_file: int, user: int) -> None:
    """vlpfast-train into folder/run, as another user or on a disk that is full after so many bytes of a file."""
    with open(folder / "log", "w") as log:
        os.dup2(log.fileno(), 2)
    from vlpfast.cli.train import entry

    if largest_file:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    if user:
        os.setuid(user)
    sys.argv = ["vlpfast-train", str(ROOT / "configs" / "clip.yaml"), f"train.run_dir={folder / 'run'}"]
    entry()


def ended(folder: Path, largest_file: int = 0, user: int = 0) -> str:
    """What the command says before it ends with 2."""
    started = process(command, folder, largest_file, user)
    started.join(60)
    said = (folder / "log").read_text()
    assert started.exitcode == 2 and "Traceback" not in said and said.count("error: ") == 1, said
    return said


def test_full_disk_at_the_start(tmp_path: Path) -> None:
    said = ended(tmp_path, largest_file=800)
    assert "config.tmp: File too large" in said or "run: File too large" in said
    assert "make room and start again" in said and not (tmp_path / "run" / "config.yaml").exists()


@pytest.mark.skipif(os.getuid() != 0, reason="waits for a user who can become another")
def test_folder_of_another_user(tmp_path: Path) -> None:
    for path in (tmp_path, *tmp_path.parents[:2]):
        path.chmod(0o755)
    assert f"train.run_dir: {tmp_path / 'run'} cannot be used as a folder: Permission denied" in ended(tmp_path, user=65534)


def test_run_folder_in_use_and_a_lock_that_nobody_holds(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    lock = tmp_path / "run" / ".lock"
    with open(lock, "a") as held:
        fcntl.lockf(held, fcntl.LOCK_EX)
        assert f"train.run_dir: another process is training in {tmp_path / 'run'}" in ended(tmp_path)
    assert lock.exists()
    assert "File too large" in ended(tmp_path, largest_file=800)  # the file alone is no lock: it came further


# --- files from strangers -----------------------------------------------------------------------------------------------


class Trap:
    """Runs a command where a pickle of it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def resealed(step: Path) -> None:
    """Makes the manifest fit the files, as whoever gives away a checkpoint can."""
    prints = {path.name: checkpoint._fingerprint(path) for path in step.iterdir() if path.name != "manifest.json"}
    (step / "manifest.json").write_text(json.dumps(prints))


@pytest.mark.parametrize("where", ["pickle", "bytes", "tensor"])
def test_nothing_that_a_checkpoint_says_is_run(tmp_path: Path, where: str) -> None:
    trainer = toy_trainer(toy_config(tmp_path, "train.steps=1"))
    trainer.fit()
    step, sprung = tmp_path / "run" / "checkpoints" / "step-00000001", tmp_path / "sprung"
    if where == "pickle":
        (step / ".metadata").write_bytes(pickle.dumps(Trap(sprung)))
        expected = "is not the description of a checkpoint's tensors: it names posix.mkdir"
    elif where == "bytes":  # what torch reads with weights_only=False
        for path in step.iterdir():
            path.unlink()
        tensors = {f"model.{name}": value for name, value in trainer.model.state_dict().items()}
        torch.distributed.checkpoint.save({**tensors, "model.text.bias": Trap(sprung)}, checkpoint_id=step)
        expected = "metadata.BytesStorageMetadata, which a checkpoint of tensors has no use for"
    else:  # torch reads tensors with weights_only=True
        (part,) = step.glob("*.distcp")
        trap = pickle.dumps(Trap(sprung))
        part.write_bytes(trap + part.read_bytes()[len(trap) :])
        expected = "cannot be read: .*[Ww]eights.only"
    resealed(step)
    assert checkpoint.damaged(step) == ""
    with pytest.raises(UserError, match=expected):
        checkpoint.load_weights(step, trainer.model)
    assert not sprung.exists()


def test_torchrun_starts_a_killed_run_again(tmp_path: Path) -> None:
    """One of two ranks is killed; the same torchrun's second attempt goes on from the last checkpoint."""
    (tmp_path / "whole").mkdir()
    (tmp_path / "killed").mkdir()
    assert toy_trainer(toy_config(tmp_path / "whole", *STEPS)).fit()
    toy_config(tmp_path / "killed", *STEPS)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    command += [str(Path(__file__).parent / "toy_run.py"), str(tmp_path / "killed"), "0.05", *STEPS]
    with open(tmp_path / "log", "w") as log, subprocess.Popen(command, stderr=log) as torchrun:
        wait_for(tmp_path / "killed", "run/checkpoints/step-00000006")
        os.kill(int((tmp_path / "killed" / "pid-1").read_text()), signal.SIGKILL)
        assert torchrun.wait(120) == 0, (tmp_path / "log").read_text()
    steps = [record["step"] for record in numbers(tmp_path / "killed")]
    assert steps == [record["step"] for record in numbers(tmp_path / "whole")]
    assert "going on from" in (tmp_path / "killed" / "log-0").read_text()  # the second attempt's
