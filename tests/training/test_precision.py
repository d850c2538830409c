"""fp16 with a scaled loss, bf16 weights over float32 masters, and that every optimiser and precision trains and resumes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.checkpoint import FileSystemReader
from toy_run import Toy, ToyLoader, toy_config, toy_model, toy_trainer

from vlpfast.training.optim import learning_rate
from vlpfast.training.parallel import World
from vlpfast.training.precision import BFloat16Weights, LossScale, working_weights
from vlpfast.training.trainer import Trainer
from vlpfast.types import Batch, Progress, UserError

pytestmark = pytest.mark.filterwarnings("ignore:train.precision")


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


SETTINGS = {
    "adamw": ["train.optimizer=adamw"],
    "lamb": ["train.optimizer=lamb", "train.lr=0.03"],
    "lion": ["train.optimizer=lion", "train.lr=0.003"],
    "adafactor": ["train.optimizer=adafactor", "train.lr=0.1"],
    "sgd": ["train.optimizer=sgd", "train.lr=0.1"],
    "average": ["train.ema_decay=0.9"],
    "fp16": ["train.precision=fp16", "train.loss_scale=1048576", "train.loss_scale_interval=5"],
    "bf16": ["train.precision=bf16"],
    "bf16_params": ["train.precision=bf16_params", "train.ema_decay=0.9"],
}


@pytest.fixture
def deterministic() -> Iterator[None]:
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("name", SETTINGS)
def test_trains_skips_and_resumes_bit_for_bit(tmp_path: Path, deterministic: None, name: str, device: str) -> None:
    """Stopped after 7 of 24 steps, the fourth of them not finite, and gone on with: as if it had never stopped."""
    states: dict[str, dict[int, dict[str, Tensor]]] = {"whole": {}, "parts": {}}
    for way, stops in (("whole", [24]), ("parts", [7, 24])):
        (tmp_path / way).mkdir()
        for steps in stops:
            more = ["train.schedule=constant", "evaluation.every=1", "model.head.dropout=0.05"]
            more += ["train.deterministic=true"] * (device == "cuda")
            stage = f"stages.all={{steps: {steps}, frozen: [logit_scale]}}"  # it alone would bring the loss down without end
            trainer = toy_trainer(toy_config(tmp_path / way, *SETTINGS[name], *more, stage), poison=3, device=device)

            def remember(
                step: int, trainer: Trainer = trainer, seen: dict[int, dict[str, Tensor]] = states[way]
            ) -> dict[str, float]:
                seen[step] = {}
                for parameter_name, parameter in trainer.model.named_parameters():
                    tensors = {"": parameter.detach(), **trainer._optimizer.state.get(parameter, {})}
                    seen[step].update({f"{parameter_name}.{key}": tensor.clone() for key, tensor in tensors.items()})
                return {}

            trainer.on_evaluate = remember
            assert trainer.fit()
    whole, parts = states.values()
    assert len(whole[3]) > 8 and all(torch.equal(whole[3][key], whole[4][key]) for key in whole[3])  # the step that was skipped
    assert not all(torch.equal(whole[23][key], whole[24][key]) for key in whole[23])
    for step in (7, 8, 24):
        assert whole[step].keys() == parts[step].keys()
        assert all(torch.equal(value, parts[step][key]) for key, value in whole[step].items())
    written = [[record["loss"] for record in lines(tmp_path / way)] for way in states]
    scales = [[record.get("loss_scale") for record in lines(tmp_path / way)] for way in states]
    assert scales[0] == scales[1] and (name != "fp16" or scales[0][7] < max(scales[0][8:]))
    assert written[0] == written[1] and len(written[0]) == 24 and written[0][3] is None
    assert sum(written[0][-3:]) < 0.8 * sum(written[0][:3])
    exported = [load_file(tmp_path / way / "run" / "model.safetensors") for way in states]
    assert all(torch.equal(exported[0][key], exported[1][key]) for key in exported[0])
    assert {exported[0][key].dtype for key in exported[0] if key != "calls"} == {torch.float32}


# --- fp16 ----------------------------------------------------------------------------------------------------------------


def test_the_scale_falls_until_gradients_fit_and_grows_again(tmp_path: Path) -> None:
    seen: dict[int, Tensor] = {}

    def evaluate(step: int) -> dict[str, float]:
        seen[step] = trainer.model.text.weight.detach().clone()
        return {}

    settings = ("train.precision=fp16", "train.loss_scale=4194304", "train.loss_scale_interval=2", "evaluation.every=1")
    trainer = toy_trainer(toy_config(tmp_path, *settings, "train.max_nonfinite=0", "train.steps=16"), on_evaluate=evaluate)
    seen[0] = trainer.model.text.weight.detach().clone()
    trainer.fit()
    records = lines(tmp_path)
    scale, finite = 4194304.0, 0
    for record in records:
        assert record["loss_scale"] == scale
        skipped = record["grad_norm"] is None
        assert torch.equal(seen[record["step"]], seen[record["step"] - 1]) == skipped
        finite = 0 if skipped else finite + 1
        scale = scale / 2 if skipped else scale * (2 if finite == 2 else 1)
        finite %= 2
    skips = [record["grad_norm"] is None for record in records]
    assert any(skips[:4]) and not all(skips[:8])  # it started too large,
    assert any(a["loss_scale"] < b["loss_scale"] for a, b in pairwise(records))  # found its place and grew
    # Finding the scale is no failure: not counted, no batch kept.
    assert records[-1]["nonfinite_steps"] == 0 and not list((tmp_path / "run").glob("nonfinite-*"))


def test_gradients_are_unscaled_before_they_are_measured_and_clipped(tmp_path: Path) -> None:
    norms = []
    for name, settings in (("fp16", ["train.precision=fp16", "train.loss_scale=4096"]), ("fp32", ["train.precision=fp32"])):
        (tmp_path / name).mkdir()
        toy_trainer(toy_config(tmp_path / name, *settings, "train.steps=4", "train.clip_grad_norm=0.01")).fit()
        norms.append([record["grad_norm"] for record in lines(tmp_path / name)])
    assert norms[0] == pytest.approx(norms[1], rel=0.02) and norms[0] != norms[1]


class Rooted(Toy):
    """A finite loss with infinite gradients, however small its scale."""

    def forward(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        losses = super().forward(batch, progress)
        return {**losses, "root": (self.logit_scale * 0).sqrt()}


def test_gradients_that_no_scale_can_help_stop_the_run(tmp_path: Path) -> None:
    config = toy_config(tmp_path, "train.precision=fp16", "train.loss_scale=4", "train.max_nonfinite=1")
    trainer = Trainer(config, Rooted(config.model.config), lambda name, stage: ToyLoader(8), World())
    with pytest.raises(UserError, match=r"step 4: .*2 steps of this run were not finite, more than train.max_nonfinite=1"):
        trainer.fit()
    assert [record["loss_scale"] for record in lines(tmp_path)] == [4.0, 2.0, 1.0, 0.5]
    assert [record["nonfinite_steps"] for record in lines(tmp_path)] == [0, 0, 1, 2]


def test_a_loss_that_is_not_finite_counts_at_every_scale(tmp_path: Path) -> None:
    toy_trainer(toy_config(tmp_path, "train.precision=fp16", "train.steps=4"), poison=2).fit()
    assert [record["nonfinite_steps"] for record in lines(tmp_path)] == [0, 0, 1, 1]
    assert (tmp_path / "run" / "nonfinite-3.pt").exists()


def test_no_scale_in_other_precisions(tmp_path: Path) -> None:
    for precision in ("fp32", "bf16", "bf16_params", "auto"):
        scale = LossScale(toy_config(tmp_path, f"train.precision={precision}").train, torch.device("cpu"))
        loss = torch.tensor(3.0)
        assert scale.scaled(loss) is loss and scale.state_dict() == {}
    toy_trainer(toy_config(tmp_path, "train.steps=1")).fit()
    assert "loss_scale" not in lines(tmp_path)[0]


# --- bf16 weights over float32 masters -----------------------------------------------------------------------------------


def test_matrices_are_bf16_within_and_their_masters_outside() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.Linear(3, 2).requires_grad_(False))
    masters = [parameter.detach().clone() for parameter in model.parameters()]
    weights = working_weights(model, "bf16_params")
    with weights:
        kinds = {name: parameter.dtype for name, parameter in model.named_parameters()}
        assert kinds.pop("0.weight") == torch.bfloat16 and set(kinds.values()) == {torch.float32}  # vectors and frozen ones
        assert torch.equal(model[0].weight, masters[0].bfloat16())
        address = model[0].weight.data_ptr()
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(model.parameters(), masters, strict=True))
    with torch.no_grad():
        model[0].weight.mul_(2)
    with weights:
        assert torch.equal(model[0].weight, (2 * masters[0]).bfloat16()) and model[0].weight.data_ptr() == address
    with pytest.raises(KeyError), weights:
        raise KeyError
    assert torch.equal(model[0].weight, 2 * masters[0])


def test_tied_weights_stay_tied() -> None:
    model = nn.ModuleList([nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)])
    model[1].weight = master = model[0].weight
    weights = BFloat16Weights(model)
    with weights:
        assert model[0].weight is model[1].weight and model[0].weight.dtype == torch.bfloat16
        model[1](model[0](torch.randn(2, 3).bfloat16())).sum().backward()
    assert model[0].weight is model[1].weight is master and master.grad.abs().sum() > 0


def test_gradients_are_bf16_within_and_summed_in_float32() -> None:
    layer = nn.Linear(5, 4, bias=False)
    weights, x = BFloat16Weights(layer), torch.randn(3, 6, 5).bfloat16()
    total = torch.zeros(4, 5)
    for batch in x:
        with weights:
            layer(batch).square().sum().backward()
            assert layer.weight.grad.dtype == torch.bfloat16
            total += layer.weight.grad.float()
        assert layer.weight.grad.dtype == torch.float32 and torch.equal(layer.weight.grad, total)
    with weights:  # nothing came: what was there stays
        pass
    assert torch.equal(layer.weight.grad, total)
    layer.zero_grad()
    with weights:
        pass
    assert layer.weight.grad is None


def test_a_step_is_adamws_on_the_masters(tmp_path: Path) -> None:
    """Small steps add up in the masters, where bf16 weights alone would stand still."""
    config = toy_config(tmp_path, "train.precision=bf16_params", "train.lr=1e-6", "train.weight_decay=0", "model.head.dropout=0")
    start = toy_model(config).text.weight.detach()
    trainer = toy_trainer(config)
    trainer.fit()
    moved = trainer.model.text.weight.detach() - start
    assert trainer.model.text.weight.dtype == torch.float32 and 2e-6 < moved.abs().max() < 2e-5

    model, loader = toy_model(config), iter(ToyLoader(8))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, betas=(0.9, 0.98), eps=1e-6, weight_decay=0, fused=True)
    for step in range(12):
        optimizer.param_groups[0]["lr"] = learning_rate(step, 12, config.train)
        low = Toy(config.model.config)
        low.load_state_dict(model.state_dict())
        for parameter in low.parameters():
            parameter.data = parameter.data.bfloat16() if parameter.ndim > 1 else parameter.data
        with torch.autocast("cpu", torch.bfloat16):
            loss = sum(low(next(loader), Progress(step, 12)).values())
        loss.backward()
        for master, parameter in zip(model.parameters(), low.parameters(), strict=True):
            master.grad = None if parameter.grad is None else parameter.grad.float()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    torch.testing.assert_close(trainer.model.text.weight, model.text.weight, rtol=0, atol=1e-9)


class Watching(Toy):
    """Notes the dtype of its weights in every forward."""

    def forward(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        self.seen = (self.text.weight.dtype, self.text.bias.dtype, self.momentum.weight.dtype)
        return super().forward(batch, progress)


def test_forwards_see_bf16_weights_and_a_checkpoint_holds_the_masters(tmp_path: Path) -> None:
    config = toy_config(tmp_path, "train.precision=bf16_params", "train.steps=2")
    trainer = Trainer(config, Watching(config.model.config), lambda name, stage: ToyLoader(8), World())
    trainer.fit()
    assert trainer.model.seen == (torch.bfloat16, torch.float32, torch.float32)
    stored = FileSystemReader(tmp_path / "run" / "checkpoints" / "step-00000002").read_metadata().state_dict_metadata
    kinds = {entry.properties.dtype for name, entry in stored.items() if name not in ("model.calls",)}
    assert kinds == {torch.float32}
    assert not torch.equal(trainer.model.text.weight, trainer.model.text.weight.bfloat16().float())


@pytest.mark.parametrize("precision", ["fp16", "bf16_params"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_parameters_are_refused(precision: str, dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).to(dtype))
    with pytest.raises(UserError, match=rf"train.precision={precision}: expected float32 parameters, 1.weight is {dtype}"):
        working_weights(model, precision)
    model[1].requires_grad_(False)
    working_weights(model, precision)  # what is not trained may be
    working_weights(nn.Linear(2, 2).to(dtype), "bf16")
