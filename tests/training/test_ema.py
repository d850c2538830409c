from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from toy_run import CONFIG, toy_config, toy_model, toy_trainer

from vlpfast.training import checkpoint
from vlpfast.training.ema import WeightAverage
from vlpfast.types import UserError


def test_the_average_is_that_of_the_formula() -> None:
    model = nn.Linear(3, 2).double()
    average, weights = WeightAverage(model, 0.5), model.weight.detach().clone()
    assert torch.equal(average.averages["weight"], weights)  # it starts as a copy, in other memory
    for step in range(12):
        with torch.no_grad():
            model.weight.copy_(torch.randn(2, 3, dtype=torch.float64))
        average.update(step)
        decay = min(0.5, (1 + step) / (10 + step))  # 0.1, 0.18, ..., from step 8 on 0.5
        weights = decay * weights + (1 - decay) * model.weight.detach()
        torch.testing.assert_close(average.averages["weight"], weights, rtol=1e-14, atol=1e-14)


def test_a_skipped_step_and_frozen_and_half_precision_parameters() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).bfloat16(), nn.Linear(2, 2).requires_grad_(False))
    average = WeightAverage(model, 0.9)
    assert set(average.tensors()) == {"ema.0.weight", "ema.0.bias", "ema.1.weight", "ema.1.bias"}
    assert {tensor.dtype for tensor in average.tensors().values()} == {torch.float32}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    before = [tensor.clone() for tensor in average.averages.values()]
    average.update(100, torch.ones(()))
    assert all(torch.equal(a, b) for a, b in zip(before, average.averages.values(), strict=True))
    average.update(100, torch.zeros(()))
    torch.testing.assert_close(list(average.averages.values()), [0.9 * tensor for tensor in before])


def test_applied_and_taken_back_even_after_an_error() -> None:
    model = nn.Linear(3, 2)
    average, address = WeightAverage(model, 0.9), model.weight.data_ptr()
    with torch.no_grad():
        model.weight.mul_(3)
    own = model.weight.detach().clone()
    with pytest.raises(KeyError), average.applied():
        assert torch.equal(model.weight, average.averages["weight"]) and not torch.equal(model.weight, own)
        raise KeyError
    assert torch.equal(model.weight, own) and model.weight.data_ptr() == address


def test_a_run_evaluates_and_exports_the_average_and_trains_without_it(tmp_path: Path) -> None:
    seen: dict[int, dict[str, Tensor]] = {}
    weights: dict[str, list[Tensor]] = {}

    def evaluate(step: int) -> dict[str, float]:
        seen[step] = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
        return {}

    losses = []
    for name, decay in (("with", 0.6), ("without", 0.0)):
        (tmp_path / name).mkdir()
        config = toy_config(tmp_path / name, f"train.ema_decay={decay}", "evaluation.every=1", "train.keep_checkpoints=9")
        trainer = toy_trainer(config, poison=5, on_evaluate=evaluate)
        weights[name] = []
        after_step = trainer.model.after_step

        def remember(after_step=after_step, model=trainer.model, kept=weights[name]) -> None:  # type: ignore[no-untyped-def]
            after_step()
            kept.append(model.text.weight.detach().clone())

        trainer.model.after_step = remember
        start = trainer.model.text.weight.detach().clone()
        trainer.fit()
        lines = (tmp_path / name / "run" / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in lines])
        if name == "with":
            average, taken = start, iter(weights[name])
            for step in range(12):
                if step != 5:  # that batch holds a NaN
                    decay = min(0.6, (1 + step) / (10 + step))
                    average = decay * average + (1 - decay) * next(taken)
                torch.testing.assert_close(seen[step + 1]["text.weight"], average)
            exported = load_file(tmp_path / name / "run" / "model.safetensors")
            assert all(torch.equal(exported[key], seen[12][key]) for key in exported)
            assert torch.equal(trainer.model.text.weight, weights[name][-1])
            assert not torch.equal(exported["text.weight"], weights[name][-1])
            model = toy_model(config)
            checkpoint.load_weights(tmp_path / name / "run", model)  # as evaluation and init_from do
            assert all(torch.equal(exported[key], value) for key, value in model.state_dict().items())
    assert losses[0] == losses[1] and all(map(torch.equal, weights["with"], weights["without"]))


def test_each_stage_averages_anew_what_it_trains(tmp_path: Path) -> None:
    stages = "stages: {a: {steps: 4, trainable: ['image.*']}, b: {steps: 4, trainable: ['text.*']}}\n"
    config = toy_config(tmp_path, "train.ema_decay=0.9", "train.keep_checkpoints=9", text=CONFIG + stages)
    trainer = toy_trainer(config)
    trainer.fit()
    assert set(trainer._average.averages) == {"text.weight", "text.bias"}
    exported = load_file(tmp_path / "run" / "model.safetensors")
    assert torch.equal(exported["image.0.weight"], trainer.model.image[0].weight)  # trained before, and not swapped under b
    assert torch.equal(exported["text.weight"], trainer._average.averages["text.weight"])


def test_a_checkpoint_without_averages(tmp_path: Path) -> None:
    toy_trainer(toy_config(tmp_path, "train.steps=4")).fit()
    with pytest.raises(UserError, match=r"step-00000004 has no ema.logit_scale of shape \[\]: was train.ema_decay set"):
        toy_trainer(toy_config(tmp_path, "train.steps=8", "train.ema_decay=0.9")).fit()
