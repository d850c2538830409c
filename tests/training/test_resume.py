"""A run that is killed and started again is the run that was not."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest
from toy_run import CONFIG, numbers, start, toy_config, toy_trainer

SETTINGS = ("train.steps=40", "train.checkpoint_every=3", "train.batch_size=4")


def test_killed_at_any_moment_the_run_is_the_same(tmp_path: Path) -> None:
    broken, whole, seed = tmp_path / "broken", tmp_path / "whole", random.randrange(1000)
    unbroken = start(whole, *SETTINGS)
    draws = random.Random(seed)
    first, second, third = sorted(draws.sample(range(4, 30), 3))
    for kill in ({"kill_after": 2}, {"kill_after": first}, {"kill_in_save": second}, {"kill_after": third}):
        process = start(broken, *SETTINGS, **kill)
        process.join(60)
        assert process.exitcode == -signal.SIGKILL, (broken / "log").read_text()
    for _ in range(4):  # and from outside, wherever it happens to be
        process = start(broken, *SETTINGS, seconds=0.01)
        time.sleep(draws.uniform(0.1, 0.8))
        process.kill()
        process.join(60)
    with open(broken / "run" / "metrics.jsonl", "a") as file:
        file.write('{"step": 4')  # a line that was never finished
    for process in (start(broken, *SETTINGS), unbroken):
        process.join(60)
        assert process.exitcode == 0, (broken / "log").read_text()
    assert [record["step"] for record in numbers(broken)] == list(range(1, 41)), f"seed {seed}"
    assert numbers(broken) == numbers(whole), f"seed {seed}"
    exported = [(folder / "run" / "model.safetensors").read_bytes() for folder in (broken, whole)]
    assert exported[0] == exported[1]


@pytest.mark.parametrize("stop", [2, 3, 5])
def test_across_stages(tmp_path: Path, stop: int) -> None:
    """Stopped within the first stage, at its very end, within the second."""
    text = CONFIG + "stages: {a: {steps: 3, mode: fit}, b: {steps: 4, trainable: ['text.*'], groups: {'*.bias': {lr: 0.5}}}}\n"
    for name in ("whole", "stopped"):
        (tmp_path / name).mkdir()
    toy_trainer(toy_config(tmp_path / "whole", text=text)).fit()
    config = toy_config(tmp_path / "stopped", text=text)
    trainer = toy_trainer(config)
    after_step = trainer.model.after_step

    def stop_here() -> None:
        after_step()
        if trainer.model.calls[1] == stop:
            os.kill(os.getpid(), signal.SIGTERM)

    trainer.model.after_step = stop_here
    assert not trainer.fit()
    assert len(numbers(tmp_path / "stopped")) == stop
    assert toy_trainer(config).fit()
    assert numbers(tmp_path / "stopped") == numbers(tmp_path / "whole")


def test_sigterm_from_outside(tmp_path: Path) -> None:
    process = start(tmp_path, *SETTINGS, seconds=0.05)
    metrics = tmp_path / "run" / "metrics.jsonl"
    while process.is_alive() and not (metrics.exists() and metrics.stat().st_size):
        time.sleep(0.01)
    process.terminate()
    process.join(60)
    said = (tmp_path / "log").read_text()
    assert process.exitcode == 75, said
    steps = len(numbers(tmp_path))
    assert 0 < steps < 40 and f"SIGTERM: stopped after step {steps} and saved" in said
    assert (tmp_path / "run" / "checkpoints" / f"step-{steps:08d}" / "manifest.json").exists()
