from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from toy_run import CONFIG, Toy, ToyLoader, toy_config, toy_model, toy_trainer

from vlpfast.training import checkpoint
from vlpfast.training.parallel import World
from vlpfast.training.trainer import Trainer
from vlpfast.types import Batch, Progress, UserError


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_leaves_what_it_should(tmp_path: Path) -> None:
    config = toy_config(tmp_path, "train.steps=6", "train.checkpoint_every=2", "train.keep_checkpoints=2")
    trainer = toy_trainer(config)
    assert trainer.fit()
    run = tmp_path / "run"
    records = lines(run / "metrics.jsonl")
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]  # counted from 1 over the whole run
    first = records[0]
    assert first["loss"] == pytest.approx(first["losses"]["fit"] + first["losses"]["size"])
    assert first["lr"] == pytest.approx(0.01 / 3) and first["stage"] == "train" and first["epoch"] == 0.2
    assert first["logit_scale"] == pytest.approx(2.71828) and first["grad_norm"] > 0 and first["skipped_samples"] == 0
    assert 0 < first["data_wait"] < 1 and first["samples_per_s"] > 0
    assert set(first["seconds"]) == {"data", "forward", "backward", "optimizer"}
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-00000004", "step-00000006"]
    exported = load_file(run / "model.safetensors")
    assert set(exported) == set(trainer.model.state_dict())
    assert torch.equal(exported["text.weight"], trainer.model.text.weight)
    assert trainer.model.calls.tolist() == [6, 6]


def test_steps_follow_plain_torch(tmp_path: Path) -> None:
    config = toy_config(tmp_path, "train.steps=3", "model.head.dropout=0", "train.clip_grad_norm=0.5", "train.weight_decay=0")
    toy_trainer(config).fit()
    model, loader = toy_model(config), iter(ToyLoader(8))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, betas=(0.9, 0.98), eps=1e-6, weight_decay=0)
    for step, record in enumerate(lines(tmp_path / "run" / "metrics.jsonl")):
        optimizer.param_groups[0]["lr"] = 0.01 * (step + 1) / 3
        loss = sum(model(next(loader), Progress(step, 3)).values())
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        assert record["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert record["grad_norm"] == pytest.approx(norm.item(), rel=1e-5)


def test_starting_again_does_nothing_more_and_more_steps_go_on(tmp_path: Path) -> None:
    assert toy_trainer(toy_config(tmp_path, "train.steps=4")).fit()
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    assert toy_trainer(toy_config(tmp_path, "train.steps=4")).fit()
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
    assert toy_trainer(toy_config(tmp_path, "train.steps=6")).fit()
    assert [record["step"] for record in lines(tmp_path / "run" / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]


STAGES = """
stages:
  first: {steps: 3, mode: fit, trainable: ["image.*"]}
  second: {steps: 4, mode: both, frozen: ["image.*", logit_scale], losses: {size: 0.5}}
"""


def test_stages(tmp_path: Path) -> None:
    config = toy_config(tmp_path, "train.keep_checkpoints=9", text=CONFIG + STAGES)
    start = {name: tensor.clone() for name, tensor in toy_model(config).state_dict().items()}
    trainer = toy_trainer(config)
    trainer.fit()
    records = lines(tmp_path / "run" / "metrics.jsonl")
    assert [(record["step"], record["stage"]) for record in records] == [(n, "first" if n < 4 else "second") for n in range(1, 8)]
    assert set(records[0]["losses"]) == {"fit"}
    last = records[-1]
    assert last["loss"] == pytest.approx(last["losses"]["fit"] + 0.5 * last["losses"]["size"])
    assert records[0]["lr"] == records[3]["lr"] == pytest.approx(0.01 / 3)  # each stage has its own schedule
    model = toy_model(config)
    checkpoint.load_weights(tmp_path / "run" / "checkpoints" / "step-00000003", model)  # saved at the end of the first stage
    after_first = model.state_dict()
    assert torch.equal(after_first["text.weight"], start["text.weight"])
    assert not torch.equal(after_first["image.0.weight"], start["image.0.weight"])
    final = trainer.model.state_dict()
    assert torch.equal(final["image.0.weight"], after_first["image.0.weight"])
    assert not torch.equal(final["text.weight"], start["text.weight"])
    assert torch.equal(final["momentum.weight"], start["momentum.weight"])


def test_init_from_another_run_and_from_safetensors(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    source = toy_trainer(toy_config(tmp_path / "a", "train.steps=2"))
    source.fit()
    for path in (tmp_path / "a" / "run", tmp_path / "a" / "run" / "model.safetensors"):
        model = toy_model(toy_config(tmp_path / "b"))
        checkpoint.load_weights(path, model)
        assert torch.equal(model.text.weight, source.model.text.weight)
    renamed = tmp_path / "foreign.safetensors"
    save_file({f"module.{name}": tensor for name, tensor in source.model.state_dict().items()}, renamed)
    config = toy_config(tmp_path / "b", f"stages.s={{steps: 1, init_from: {renamed}, trainable: [logit_scale]}}")
    trainer = toy_trainer(config)
    trainer.model.convert = lambda tensors: {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    trainer.fit()
    assert torch.equal(trainer.model.text.weight, source.model.text.weight)
    with pytest.raises(UserError, match=r"foreign.safetensors does not fit Toy: it lacks .*; it .*, and \d+ more"):
        checkpoint.load_weights(renamed, model)


def test_a_step_that_is_not_finite_changes_nothing_and_its_batch_is_kept(tmp_path: Path) -> None:
    saved: dict[int, dict[str, torch.Tensor]] = {}

    def remember(step: int) -> dict[str, float]:
        saved[step] = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
        saved[step].update({f"{i}": s["exp_avg"].clone() for i, s in enumerate(trainer._optimizer.state.values())})
        return {"seen": float(step)}

    trainer = toy_trainer(toy_config(tmp_path, "train.steps=6", "evaluation.every=1"), poison=3, on_evaluate=remember)
    assert trainer.fit()
    before, after = saved[3], saved[4]
    assert all(torch.equal(before[name], after[name]) for name in before if name != "calls")
    assert after["calls"].tolist() == [4, 3]  # before_step of the skipped step ran, after_step did not
    assert not torch.equal(saved[4]["text.weight"], saved[5]["text.weight"])
    records = lines(tmp_path / "run" / "metrics.jsonl")
    assert records[3]["loss"] is None and records[3]["nonfinite_steps"] == records[5]["nonfinite_steps"] == 1
    kept = torch.load(tmp_path / "run" / "nonfinite-4.pt", weights_only=True)
    assert kept["step"] == 4 and bool(kept["batch"]["image"].isnan().any()) and kept["batch"]["key"] == ["k"] * 8


def test_too_many_steps_that_are_not_finite_stop_the_run(tmp_path: Path) -> None:
    class Diverging(Toy):
        def forward(self, batch: Batch, progress: Progress) -> dict[str, torch.Tensor]:
            return {name: loss / 0 if progress.step >= 3 else loss for name, loss in super().forward(batch, progress).items()}

    config = toy_config(tmp_path, "train.max_nonfinite=2", "train.checkpoint_every=2")
    trainer = Trainer(config, Diverging(config.model.config), lambda name, stage: ToyLoader(8), World())
    with pytest.raises(
        UserError, match=r"step 6: loss inf.*3 steps of this run were not finite, more than train.max_nonfinite=2"
    ):
        trainer.fit()
    assert sorted(path.name for path in (tmp_path / "run").glob("nonfinite-*.pt")) == [f"nonfinite-{n}.pt" for n in (4, 5, 6)]
    assert checkpoint.find_newest(tmp_path / "run" / "checkpoints")[0].name == "step-00000004"


def test_evaluation_is_written_and_leaves_the_training_as_it_is(tmp_path: Path) -> None:
    def evaluate(step: int) -> dict[str, float]:
        assert not trainer.model.training
        torch.rand(5), np.random.rand(5)
        return {"score": step / 10}

    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    toy_trainer(toy_config(tmp_path / "a")).fit()
    trainer = toy_trainer(toy_config(tmp_path / "b", "evaluation.every=5"), on_evaluate=evaluate)
    trainer.fit()
    assert lines(tmp_path / "b" / "run" / "evaluation.jsonl") == [{"step": n, "score": n / 10} for n in (5, 10, 12)]
    losses = [[r["loss"] for r in lines(tmp_path / name / "run" / "metrics.jsonl")] for name in ("a", "b")]
    assert losses[0] == losses[1]
    trainer = toy_trainer(toy_config(tmp_path / "b", "evaluation.every=5"), on_evaluate=evaluate)
    trainer.fit()  # finished already: only the last evaluation is made again, and stands there once
    assert [line["step"] for line in lines(tmp_path / "b" / "run" / "evaluation.jsonl")] == [5, 10, 12]


@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_and_stops(tmp_path: Path, kind: signal.Signals) -> None:
    class Signalled(Toy):
        def after_step(self) -> None:
            super().after_step()
            if self.calls[1] == 5:
                os.kill(os.getpid(), kind)

    config = toy_config(tmp_path, "train.checkpoint_every=0")
    before = signal.getsignal(kind)
    loader = ToyLoader(8)
    assert not Trainer(config, Signalled(config.model.config), lambda name, stage: loader, World()).fit()
    assert signal.getsignal(kind) == before and loader.closed
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000005"]
    assert not (tmp_path / "run" / "model.safetensors").exists()
    assert toy_trainer(config).fit()
    assert len(lines(tmp_path / "run" / "metrics.jsonl")) == 12


def test_prepare_epoch_is_called_at_the_start_of_each_epoch(tmp_path: Path) -> None:
    seen = []

    class Prepared(Toy):
        def prepare_epoch(self, loader: ToyLoader) -> None:
            seen.append(loader.cursor)

    config = toy_config(tmp_path)
    Trainer(config, Prepared(config.model.config), lambda name, stage: ToyLoader(8), World()).fit()
    assert seen == [0, 5, 10]  # the loader has five batches an epoch


@pytest.mark.filterwarnings("ignore:train.precision=bf16")
def test_precision_compile_and_determinism_reach_the_model(tmp_path: Path) -> None:
    seen = []

    class Watching(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(6, 6)

        def forward(self, batch: Batch, progress: Progress) -> dict[str, torch.Tensor]:
            seen.append(self.layer(batch["image"]).dtype)
            return {"loss": self.layer(batch["image"]).float().square().mean()}

    config = toy_config(tmp_path, "train.steps=1", "train.precision=bf16", "train.deterministic=true")
    try:
        trainer = Trainer(config, Watching(), lambda name, stage: ToyLoader(8), World())
        trainer.fit()
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    assert seen == [torch.bfloat16] and trainer.model.layer.weight.dtype == torch.float32
    compiled = []
    watching = Watching()
    watching.compile = lambda: compiled.append(True)
    Trainer(toy_config(tmp_path, "train.compile=step"), watching, lambda name, stage: ToyLoader(8), World())
    assert compiled == [True]


@pytest.mark.gpu
def test_on_a_gpu_the_same_files_without_waiting(tmp_path: Path) -> None:
    """Numbers are read a step late there: skipped steps, the lines and a resumed run must not show it."""
    results = []
    for name, stops in (("whole", [12]), ("parts", [5, 12])):
        (tmp_path / name).mkdir()
        try:
            for steps in stops:
                config = toy_config(
                    tmp_path / name, f"train.steps={steps}", "train.deterministic=true", "train.schedule=constant"
                )
                assert toy_trainer(config, poison=3, device="cuda").fit()
        finally:
            torch.use_deterministic_algorithms(False)
        written = lines(tmp_path / name / "run" / "metrics.jsonl")
        assert [line["step"] for line in written] == list(range(1, 13))
        assert [line["nonfinite_steps"] for line in written] == [0] * 3 + [1] * 9
        assert all(set(line["seconds"]) == {"data", "forward", "backward", "optimizer"} for line in written)
        assert (tmp_path / name / "run" / "nonfinite-4.pt").exists()
        results.append(([line["loss"] for line in written], load_file(tmp_path / name / "run" / "model.safetensors")))
    assert results[0][0] == results[1][0]
    assert all(torch.equal(results[0][1][name], results[1][1][name]) for name in results[0][1])
