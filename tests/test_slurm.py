"""scripts/slurm.sh without SLURM: an srun and an scontrol that behave as theirs are described, and two tasks."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from vlpfast.data import ShardWriter

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "scripts/slurm.sh"
CONFIG = (
    "model: {name: clip, preset: tiny, vision: {layers: 1, width: 32}, text: {layers: 1, width: 32, vocab_size: 300}}\n"
    "data: {source: shards, loader: plain, threads: 1}\n"
    "train: {steps: 100000, batch_size: 4, checkpoint_every: 0, precision: fp32, tensorboard_every: 0, warmup_steps: 0}\n"
)

# Each minute takes a quarter of a second. The largest code of a task is srun's; a task that a signal ended has 128 + its number.
SRUN = """\
import os, subprocess, sys, time
options, command = {}, sys.argv[1:]
while command[0].startswith("--"):
    key, _, value = command.pop(0).partition("=")
    options[key] = value
tasks = range(int(os.environ["SLURM_NTASKS"]))
here = {**os.environ, "MASTER_ADDR": os.environ.get("MEET_AT", os.environ["MASTER_ADDR"])}
running = [subprocess.Popen(command, env={**here, "SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)}) for i in tasks]
open(os.environ["PIDS"], "w").write(" ".join(str(task.pid) for task in running))
first = None
while any(task.poll() is None for task in running):
    codes = [task.returncode for task in running if task.returncode is not None]
    first = time.monotonic() if codes and first is None else first
    late = first is not None and time.monotonic() - first > int(options["--wait"]) / 240
    if late or any(codes) and options["--kill-on-bad-exit"] != "0":
        for task in running:
            task.terminate()
    time.sleep(0.01)
sys.exit(max(code if code >= 0 else 128 - code for code in (task.returncode for task in running)))
"""
SCONTROL = """\
#!/usr/bin/env bash
case "$1 $2" in
    "show hostnames") printf 'node-%s\\n' 7 8 ;;
    "show job") echo "   JobState=$STATE Reason=None" ;;
    *) echo "$@" >>"$REQUEUED" ;;
esac
"""
# Ends as ENDS says: "code:seconds" of each rank.
ENDING = """\
#!/usr/bin/env bash
echo "$RANK/$WORLD_SIZE/$LOCAL_RANK $MASTER_ADDR:$MASTER_PORT cpus=${SRUN_CPUS_PER_TASK:-} $*" >>"$SEEN"
read -ra ends <<<"$ENDS"
sleep "${ends[RANK]#*:}"
exit "${ends[RANK]%:*}"
"""


@pytest.fixture
def job(tmp_path: Path) -> dict[str, str]:
    """The environment of the batch script."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in (("srun", f"#!{sys.executable}\n{SRUN}"), ("scontrol", SCONTROL), ("python3", ENDING)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    names = {name: str(tmp_path / name.lower()) for name in ("PIDS", "REQUEUED", "SEEN")}
    slurm = {"SLURM_JOB_ID": "123456", "SLURM_JOB_NODELIST": "node-[7-8]", "SLURM_NTASKS": "2", "STATE": "RUNNING"}
    return {**os.environ, **names, **slurm, "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"}


def lines(path: str) -> list[str]:
    return sorted(Path(path).read_text().splitlines()) if Path(path).exists() else []


def test_is_valid_and_starts_each_task_as_torchrun_would(job: dict[str, str]) -> None:
    subprocess.run(["bash", "-n", SCRIPT], check=True)
    job |= {"ENDS": "0:0 0:0", "SLURM_CPUS_PER_TASK": "6"}
    assert subprocess.run([SCRIPT, "a.yaml", "model.name='a b'"], env=job).returncode == 0
    rest = "node-7:23456 cpus=6 -m vlpfast.cli.train a.yaml model.name='a b'"
    assert lines(job["SEEN"]) == [f"0/2/0 {rest}", f"1/2/1 {rest}"]
    assert lines(job["REQUEUED"]) == []


@pytest.mark.parametrize(
    ("ends", "state", "code", "again"),
    [
        ("75:0 75:0.3", "RUNNING", 75, True),  # the second has not yet saved when the first ends
        ("75:0 75:0", "CANCELLED", 75, False),
        ("2:0 2:0", "RUNNING", 2, False),
        ("143:0 143:0", "RUNNING", 143, False),  # told to stop before there was anything to save
        ("1:0 0:60", "RUNNING", 143, False),  # a crash: the other waits for it, and is ended
    ],
)
def test_queued_again_only_after_a_warning(job: dict[str, str], ends: str, state: str, code: int, again: bool) -> None:
    ended = subprocess.run([SCRIPT, "a.yaml"], env={**job, "ENDS": ends, "STATE": state}, timeout=30)
    assert ended.returncode == code
    assert lines(job["REQUEUED"]) == (["requeue 123456"] if again else [])


def test_two_tasks_save_when_warned(job: dict[str, str], tmp_path: Path) -> None:
    picture = io.BytesIO()
    Image.new("RGB", (40, 40), "red").save(picture, "JPEG")
    with ShardWriter(tmp_path, "train", samples_per_shard=20) as writer:
        for i in range(20):
            writer.write(f"{i:02d}", {"jpg": picture.getvalue(), "txt": f"picture {i} is red".encode()})
    (tmp_path / "clip.yaml").write_text(CONFIG)
    (tmp_path / "bin/python3").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    run = tmp_path / "run"
    job |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MEET_AT": "127.0.0.1"}
    command = [SCRIPT, tmp_path / "clip.yaml", f"data.train=['{tmp_path}/train-*.tar']", f"train.run_dir={run}"]
    with open(tmp_path / "log", "w") as log, subprocess.Popen(command, env=job, stderr=log) as batch:
        deadline = time.monotonic() + 120
        while not (run / "metrics.jsonl").exists() or (run / "metrics.jsonl").read_text().count("\n") < 2:
            assert batch.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.05)
        for pid in Path(job["PIDS"]).read_text().split():
            os.kill(int(pid), signal.SIGUSR1)
        assert batch.wait(60) == 75, (tmp_path / "log").read_text()
    assert lines(job["REQUEUED"]) == ["requeue 123456"]
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    assert [path.name for path in (run / "checkpoints").iterdir()] == [f"step-{last:08d}"]
