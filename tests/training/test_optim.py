"""Optimisers against their papers' algorithms, skipped steps, groups, layer-wise rates, schedules, parts on several processes."""

from __future__ import annotations

import copy
import json
import math
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor, init_device_mesh
from toy_run import toy_config, toy_model, toy_trainer

from vlpfast.training import checkpoint
from vlpfast.training.apex_optimizers import build_apex, find_apex
from vlpfast.training.config import Group, Stage, TrainConfig
from vlpfast.training.ema import WeightAverage
from vlpfast.training.optim import build_optimizer, gradient_norm, layers_above, learning_rate
from vlpfast.training.optimizers import LAMB, SGD, Adafactor, Lion
from vlpfast.training.precision import BFloat16Weights, LossScale, working_weights
from vlpfast.types import UserError

SHAPES = ((), (1,), (5,), (4, 3), (2, 3, 2, 2))
NAMES = ("adamw", "lamb", "lion", "adafactor", "sgd")
BETAS, EPS, LR, DECAY = (0.9, 0.98), 1e-6, 0.05, 0.1


def parameters(dtype: torch.dtype = torch.float32, shapes: tuple[tuple[int, ...], ...] = SHAPES) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    return [nn.Parameter(t.contiguous(memory_format=torch.channels_last) if t.ndim == 4 else t) for t in tensors]


def give_gradients(params: list[nn.Parameter], step: int, bad: bool = False) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for parameter in params:
        grad = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 10.0 ** (step % 3 - 1)
        parameter.grad = torch.empty_like(parameter).copy_(torch.full_like(grad, math.nan) if bad else grad)


def make(name: str, params: Any) -> torch.optim.Optimizer:
    return {
        "adamw": lambda: torch.optim.AdamW(params, lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY, fused=True),
        "lamb": lambda: LAMB(params, lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY),
        "lion": lambda: Lion(params, lr=LR, betas=BETAS, weight_decay=DECAY),
        "adafactor": lambda: Adafactor(params, lr=LR, weight_decay=DECAY),
        "sgd": lambda: SGD(params, lr=LR, momentum=0.9, weight_decay=DECAY),
    }[name]()


def bits(params: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> list[bytes]:
    """Every byte of parameters and state: torch.equal would take -0 for 0."""
    tensors = [p.detach() for p in params] + [t for p in params for t in optimizer.state[p].values()]
    return [tensor.contiguous().numpy().tobytes() for tensor in tensors]


# --- the papers' algorithms, one parameter at a time in plain torch ------------------------------------------------------


def lion_by_the_paper(x: Tensor, g: Tensor, state: dict[str, Any]) -> Tensor:
    m = state.get("m", torch.zeros_like(x))
    update = torch.sign(BETAS[0] * m + (1 - BETAS[0]) * g)
    state["m"] = BETAS[1] * m + (1 - BETAS[1]) * g
    return x - LR * (update + DECAY * x)


def lamb_by_the_paper(x: Tensor, g: Tensor, state: dict[str, Any]) -> Tensor:
    t = state["t"] = state.get("t", 0) + 1
    state["m"] = BETAS[0] * state.get("m", torch.zeros_like(x)) + (1 - BETAS[0]) * g
    state["v"] = BETAS[1] * state.get("v", torch.zeros_like(x)) + (1 - BETAS[1]) * g * g
    r = (state["m"] / (1 - BETAS[0] ** t)) / ((state["v"] / (1 - BETAS[1] ** t)).sqrt() + EPS) + DECAY * x
    length, size = x.norm().item(), r.norm().item()
    return x - LR * (length / size if length > 0 and size > 0 else 1.0) * r


@pytest.mark.parametrize(("name", "rule"), [("lion", lion_by_the_paper), ("lamb", lamb_by_the_paper)])
def test_lion_and_lamb_follow_the_paper(name: str, rule: Callable[..., Tensor]) -> None:
    params = parameters(torch.float64, shapes=(*SHAPES, (0, 3)))
    expected, states = [p.detach().clone() for p in params], [{} for _ in params]
    optimizer = make(name, params)
    for step in range(6):
        give_gradients(params, step)
        grads = [p.grad.clone() for p in params]
        optimizer.step()
        expected = [rule(x, g, state) for x, g, state in zip(expected, grads, states, strict=True)]
        torch.testing.assert_close([p.detach() for p in params], expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_is_that_of_torch(momentum: float) -> None:
    ours, theirs = parameters(torch.float64), parameters(torch.float64)
    optimizers = [kind(p, lr=LR, momentum=momentum, weight_decay=DECAY) for kind, p in ((SGD, ours), (torch.optim.SGD, theirs))]
    for step in range(4):
        for params, optimizer in zip((ours, theirs), optimizers, strict=True):
            give_gradients(params, step)
            optimizer.step()
        torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-13)
    assert len(optimizers[0].state[ours[0]]) == (momentum > 0)


def test_lamb_where_a_norm_is_zero() -> None:
    zero, still, alone = (nn.Parameter(torch.tensor(value)) for value in ([0.0, 0.0], [1.0, 2.0], [3.0]))
    optimizer = LAMB([{"params": [zero, still, alone], "weight_decay": 0.0}], lr=0.5, betas=BETAS, eps=0.0)
    zero.grad, still.grad, alone.grad = torch.tensor([4.0, -4.0]), torch.zeros(2), torch.tensor([7.0])
    for group in optimizer.param_groups:
        group["eps"] = 1e-12  # with 0 a gradient of zero would be 0 / 0 in the paper too
    optimizer.step()
    torch.testing.assert_close(zero.detach(), torch.tensor([-0.5, 0.5]))  # |x| = 0: the quotient is 1, Adam's first step
    assert still.tolist() == [1.0, 2.0]  # |r| = 0
    torch.testing.assert_close(alone.detach(), torch.tensor([1.5]))  # |x| / |r| = 3


def test_parameters_without_a_gradient_are_left_out() -> None:
    for name in NAMES:
        params = parameters()
        optimizer = make(name, params)
        for step in range(2):
            give_gradients(params, step)
            params[3].grad = None if step == 0 else params[3].grad
            before = params[3].detach().clone()
            optimizer.step()
            assert torch.equal(params[3], before) == (step == 0), name
    alone = parameters()[3:4]
    fresh = make("lamb", alone)
    give_gradients(alone, 0)
    fresh.step()
    assert fresh.state[alone[0]]["step"] == 1
    make("lion", parameters()).step()  # no gradient at all


@pytest.mark.parametrize("name", ["lamb", "lion", "sgd"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_parameters_have_float32_state_and_are_rounded_once(name: str, dtype: torch.dtype) -> None:
    params = parameters(dtype)
    shadow = [nn.Parameter(p.detach().float()) for p in params]
    optimizer, exact = make(name, params), make(name, shadow)
    for step in range(3):
        give_gradients(params, step)
        for p, s in zip(params, shadow, strict=True):
            s.data.copy_(p.detach())
            s.grad = p.grad.float()
        optimizer.step()
        exact.step()
        assert all(torch.equal(p, s.to(dtype)) for p, s in zip(params, shadow, strict=True))
    kinds = {key: value.dtype for p in params for key, value in optimizer.state[p].items()}
    assert set(kinds.values()) == {torch.float32} and kinds


# --- skipped steps -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("skipped", [0, 2])
def test_a_skipped_step_leaves_every_bit_as_it_is(name: str, skipped: int) -> None:
    """Whether the first or a later one; and the run after it is that of one that never saw it."""
    results = []
    for steps in ([0, 1, 3, 4], [0, 1, 3, 4]):
        params = parameters()
        params[2].data[0] = -0.0
        optimizer = make(name, params)
        for number, step in enumerate(steps):
            if len(results) == 1 and number == skipped:
                before = bits(params, optimizer) if skipped else [p.detach().numpy().tobytes() for p in params]
                give_gradients(params, step, bad=True)
                optimizer.found_inf = torch.ones(())
                optimizer.step()
                after = bits(params, optimizer)
                assert after[: len(before)] == before
                state = [value for p in params for value in optimizer.state[p].values()]
                assert all(value.isfinite().all() for value in state)
                assert skipped or not any(value.any() for value in state)  # not memory that nobody wrote
            give_gradients(params, step)
            optimizer.found_inf = torch.zeros(())
            optimizer.step()
        results.append(bits(params, optimizer))
    assert results[0] == results[1]


# --- which optimiser, with which groups ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_built_as_configured(tmp_path: Path, name: str) -> None:
    model = toy_model(toy_config(tmp_path))
    train = TrainConfig(optimizer=name, lr=0.3, betas=[0.8, 0.9], eps=1e-5, momentum=0.7, weight_decay=0.2)
    optimizer = build_optimizer(model, train, "s", Stage(groups={"text.*": Group(lr=0.5)}))
    kinds = {"adamw": torch.optim.AdamW, "lamb": LAMB, "lion": Lion, "adafactor": Adafactor, "sgd": SGD}
    assert type(optimizer) is kinds[name]
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = {names[p]: (g["factor"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    assert found["text.weight"] == (0.5, 0.2) and found["text.bias"] == (0.5, 0.0) and found["image.0.weight"] == (1.0, 0.2)
    wanted = {"betas": (0.8, 0.9), "eps": 1e-5, "momentum": 0.7}
    takes = {"adamw": ("betas", "eps"), "lamb": ("betas", "eps"), "lion": ("betas",), "adafactor": (), "sgd": ("momentum",)}
    assert all(group[key] == wanted[key] for key in takes[name] for group in optimizer.param_groups)


def tower(blocks: int) -> nn.Module:
    return nn.ModuleDict(
        {
            "patch_embed": nn.Linear(2, 2, bias=False),
            "norm_pre": nn.LayerNorm(2, bias=False),
            "transformer": nn.ModuleDict({"blocks": nn.ModuleList(nn.Linear(2, 2, bias=False) for _ in range(blocks))}),
            "norm": nn.LayerNorm(2, bias=False),
        }
    )


class TwoTowers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.vision, self.text, self.logit_scale = tower(3), tower(1), nn.Parameter(torch.tensor(1.0))


def test_layers_are_read_from_the_names_tower_by_tower() -> None:
    assert layers_above(TwoTowers()) == {
        "vision.patch_embed.weight": 4,
        "vision.norm_pre.weight": 4,
        "vision.transformer.blocks.0.weight": 3,
        "vision.transformer.blocks.1.weight": 2,
        "vision.transformer.blocks.2.weight": 1,
        "vision.norm.weight": 0,
        "text.patch_embed.weight": 2,
        "text.norm_pre.weight": 2,
        "text.transformer.blocks.0.weight": 1,
        "text.norm.weight": 0,
    }
    assert layers_above(tower(1)["transformer"]) == {"blocks.0.weight": 1}
    layers = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    plain = nn.ModuleDict({"embed": nn.Linear(2, 2), "layers": layers, "head": nn.Linear(2, 2)})
    assert list(layers_above(plain).values()) == [3, 3, 2, 2, 1, 1, 0, 0]
    both = nn.ModuleDict({"a": nn.ModuleDict({"embed": nn.Linear(2, 2), "x": tower(1), "y": tower(1)})})
    assert not any(name.startswith("a.embed") for name in layers_above(both))  # of both towers, so of neither


def test_layer_decay_multiplies_the_groups_rate_and_a_model_may_say_its_own_depths() -> None:
    def factors(train: TrainConfig, stage: Stage) -> dict[str, tuple[float, float]]:
        names = {parameter: name for name, parameter in model.named_parameters()}
        groups = build_optimizer(model, train, "s", stage).param_groups
        return {names[p]: (g["factor"], g["weight_decay"]) for g in groups for p in g["params"]}

    model = TwoTowers()
    stage = Stage(groups={"vision.*": Group(lr=0.1, weight_decay=0.3)})
    found = factors(TrainConfig(layer_decay=0.5), stage)
    assert found["vision.transformer.blocks.1.weight"] == (0.1 * 0.25, 0.3) and found["vision.norm.weight"] == (0.1, 0.0)
    assert found["text.transformer.blocks.0.weight"] == (0.5, 0.2) and found["logit_scale"] == (1.0, 0.0)
    stage.groups["vision.*"].layer_decay = 0.25  # of this tower alone
    found = factors(TrainConfig(), stage)
    assert found["vision.transformer.blocks.1.weight"] == (0.1 * 0.0625, 0.3)
    assert found["text.transformer.blocks.0.weight"] == (1.0, 0.2)

    model.layer_depth = lambda name: (2, 5) if name.startswith("vision") else (5, 5)
    assert set(layers_above(model).values()) == {3, 0}
    model = nn.Linear(2, 2)
    for train, groups in ((TrainConfig(layer_decay=0.5), {}), (TrainConfig(), {"weight": Group(layer_decay=0.5)})):
        with pytest.raises(UserError, match=r"layer_decay=0.5: no parameter of Linear has a numbered block in its name"):
            build_optimizer(model, train, "s", Stage(groups=groups))


def test_layer_depths_of_clip() -> None:
    from vlpfast.models.clip import CLIP

    above = layers_above(CLIP(CLIP.Config.tiny()))
    assert above["vision.position"] == above["vision.norm_pre.weight"] == above["vision.patch_embed.0.weight"] == 4
    assert above["vision.transformer.blocks.2.fc1.weight"] == 1 and above["vision.norm_post.weight"] == 0
    assert above["text.token_embed.weight"] == above["text.position"] == 3 and above["text.norm.bias"] == 0
    assert not any("projection" in name or name == "logit_scale" for name in above)


# --- schedules and clipping ----------------------------------------------------------------------------------------------


def rates(steps: int, **settings: Any) -> list[float]:
    train = TrainConfig(**{"lr": 1.0, "warmup_steps": 0, **settings})
    return [learning_rate(step, steps, train) for step in range(steps)]


def test_schedules_end_where_they_should() -> None:
    assert rates(4, schedule="linear", min_lr=0.2) == pytest.approx([1.0, 0.8, 0.6, 0.4])
    assert rates(4, min_lr=0.5) == pytest.approx([0.5 + 0.25 * (1 + math.cos(math.pi * k / 4)) for k in range(4)])
    assert rates(5, schedule="polynomial", power=0.9) == pytest.approx([(1 - k / 5) ** 0.9 for k in range(5)])
    assert rates(4, schedule="polynomial", power=2.0, min_lr=0.1) == pytest.approx(
        [0.1 + 0.9 * (1 - k / 4) ** 2 for k in range(4)]
    )
    one = [1.0, 0.75, 0.25]
    assert rates(9, cycle_steps=3) == pytest.approx(3 * one)
    assert rates(8, cycle_steps=3, warmup_steps=2, warmup_lr=0.5) == pytest.approx([0.5, 0.75, *one, *one])


def test_steps_fall_at_shares_of_the_stage_and_by_periods() -> None:
    assert rates(10, schedule="steps", decay_at=[0.5, 0.8]) == pytest.approx([1.0] * 5 + [0.1] * 3 + [0.01] * 2)
    assert rates(100, schedule="steps", decay_at=[0.07])[6:8] == pytest.approx([1.0, 0.1])  # 0.07 * 100 is a little above 7
    assert rates(6, schedule="steps", decay_every=2, decay_factor=0.9) == pytest.approx([1, 1, 0.9, 0.9, 0.81, 0.81])
    assert rates(6, schedule="steps", decay_every=2, decay_factor=0.5, min_lr=0.3)[4:] == [0.3, 0.3]


def test_warm_up_from_a_rate() -> None:
    assert rates(5, warmup_steps=4, warmup_lr=0.2, schedule="constant") == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates(3, warmup_steps=2, warmup_lr=0.0, schedule="constant") == [0.0, 0.5, 1.0]


def test_cosine_by_epoch_at_epochs_0_1_2() -> None:
    settings = {"lr": 0.002, "schedule": "cosine_by_epoch", "warmup_epochs": 1, "warmup_lr": 1e-5}
    train = TrainConfig(**settings)
    expected = [1e-5] + [0.001 * (1 + math.cos(math.pi * (e - 1) / 50)) for e in range(1, 50)]
    found = [learning_rate(step, 50 * 6, train, 6) for step in range(50 * 6)]
    assert found == pytest.approx([rate for rate in expected for _ in range(6)])
    assert found[0] == 1e-5 and found[6] == 0.002  # half a cosine over T epochs, of which T - 1 are left
    half = TrainConfig(**settings, min_lr=0.001)
    assert learning_rate(6 * 26, 300, half, 6) == pytest.approx(0.0015)
    assert learning_rate(6, 7, train, 6) == 0.002  # the last epoch of two is cut short
    assert rates(4, schedule="cosine_by_epoch") == pytest.approx([0.5 * (1 + math.cos(math.pi * k / 4)) for k in range(4)])


def test_a_run_goes_by_its_loaders_epochs(tmp_path: Path) -> None:
    own = "{optimizer: sgd, lr: 0.1, schedule: cosine_by_epoch, warmup_epochs: 1, warmup_lr: 0.001, warmup_steps: 0}"
    config = toy_config(tmp_path, f"stages={{a: {{steps: 3}}, b: {{steps: 12, train: {own}}}}}", "train.schedule=constant")
    toy_trainer(config).fit()
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    cosine = [0.05 * (1 + math.cos(math.pi * e / 3)) for e in (0, 1)]  # of 3 epochs of 5 steps
    assert [line["lr"] for line in lines[3:]] == pytest.approx([0.001] * 5 + [cosine[0]] * 5 + [cosine[1]] * 2)
    assert lines[2]["lr"] == 0.01  # the first stage has the run's own


def test_clipping_by_value_comes_after_the_norm() -> None:
    layer = nn.Linear(2, 1, bias=False)
    layer.weight.grad = torch.tensor([[3.0, -4.0]])
    assert gradient_norm(layer, 0.0, 3.5) == 5.0 and layer.weight.grad.tolist() == [[3.0, -3.5]]
    layer.weight.grad = torch.tensor([[3.0, -4.0]])
    assert gradient_norm(layer, 1.0, 0.7) == 5.0
    torch.testing.assert_close(layer.weight.grad, torch.tensor([[0.6, -0.7]]))
    layer.weight.grad = torch.tensor([[math.inf, 1.0]])
    assert gradient_norm(layer, 0.0, 1.0).isinf()  # clipped or not, the step is skipped


def test_a_run_clips_by_value(tmp_path: Path) -> None:
    plain = ("train={optimizer: sgd, momentum: 0, weight_decay: 0, lr: 1, warmup_steps: 0}", "train.steps=1")
    config = toy_config(tmp_path, *plain, "train.clip_grad_norm=0", "train.clip_grad_value=1e-3")
    before = toy_model(config).image[0].weight.detach()
    trainer = toy_trainer(config)
    trainer.fit()
    moved = (trainer.model.image[0].weight.detach() - before).abs()
    assert moved.max() == pytest.approx(1e-3, rel=1e-3) and moved.min() < 1e-3


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.optimizer=adam", r"train.optimizer: Invalid value 'adam', expected one of \['adamw', 'lamb'"),
        ("train.layer_decay=1.1", "train.layer_decay: expected a number above 0 and at most 1, got 1.1"),
        ("train.layer_decay=0", "train.layer_decay: expected a number above 0, got 0"),
        ("train.decay_factor=2", "train.decay_factor: expected a number above 0 and at most 1, got 2"),
        ("train.momentum=1", "train.momentum: expected a number from 0 to below 1, got 1"),
        ("train.ema_decay=1", "train.ema_decay: expected a number from 0 to below 1, got 1"),
        ("train.min_lr=1", "train.min_lr: expected a number from 0 to train.lr=0.01, got 1"),
        ("train.warmup_lr=-1", "train.warmup_lr: expected a number from 0 to train.lr=0.01, got -1"),
        ("train.clip_grad_value=-1", "train.clip_grad_value: expected 0 or more, got -1"),
        ("train.loss_scale=0", "train.loss_scale: expected a number above 0, got 0"),
        ("train.decay_at=[0.5]", "train.decay_at belongs to train.schedule=steps, got train.schedule=cosine"),
        ("train.power=2", "train.power belongs to train.schedule=polynomial, got train.schedule=cosine"),
        ("train={schedule: linear, cycle_steps: 3}", "train.cycle_steps belongs to train.schedule=cosine"),
        ("train={schedule: steps, decay_at: [0.8, 0.5]}", "train.decay_at: expected growing shares of the stage between 0 and 1"),
        ("train={schedule: steps, decay_at: [16]}", "train.decay_at: expected growing shares of the stage between 0 and 1"),
        (
            "stages.s.groups={x: {layer_decay: 0}}",
            "stages.s.groups.x.layer_decay: expected a number above 0 and at most 1, got 0",
        ),
        ("train.warmup_epochs=1", "train.warmup_epochs belongs to train.schedule=cosine_by_epoch, got train.schedule=cosine"),
        (
            "train={schedule: cosine_by_epoch, warmup_epochs: 1, warmup_steps: 0}",
            "train.warmup_lr: expected the rate of the first",
        ),
        ("train.schedule=cosine_by_epoch", "train.warmup_steps=3: train.schedule=cosine_by_epoch has train.warmup_epochs"),
        ("stages.s.train={batch_size: 3}", "stages.s.train: batch_size is of the whole run; a stage may change optimizer"),
        ("stages.s.train={lrr: 3}", "stages.s.train: unknown key 'lrr'; did you mean 'lr'"),
        ("stages.s.train={lr: 0}", "stages.s.train.lr: expected a number above 0, got 0"),
        ("stages.s.train={momentum: 1}", "stages.s, with its train: train.momentum: expected a number from 0 to below 1"),
        ("train.schedule=steps", "expected train.decay_at or train.decay_every, got neither"),
        ("train={optimizer: lion, optimizer_backend: apex}", "apex has adamw and lamb, got train.optimizer=lion"),
    ],
)
def test_settings_that_make_no_sense(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        toy_config(tmp_path, override)


# --- apex ----------------------------------------------------------------------------------------------------------------


class FusedAdam(torch.optim.Optimizer):
    """With apex's conventions (capturable): the step counted in the group by the flag seen last, the rate a tensor, the flag of a
    scaler read on the device, no arguments to zero_grad."""

    def __init__(
        self, params: Any, lr: float, betas: Any, eps: float, adam_w_mode: bool, capturable: bool, weight_decay: float = 0
    ) -> None:
        super().__init__(params, {"lr": torch.tensor(lr), "betas": betas, "eps": eps, "weight_decay": weight_decay})
        assert adam_w_mode and capturable
        self._dummy_overflow_buf = torch.zeros(1, dtype=torch.int32)

    def zero_grad(self) -> None:
        raise AssertionError("the trainer's argument would not fit")

    @torch.no_grad()
    def step(self, closure: Any = None, grad_scaler: Any = None) -> None:
        for group in self.param_groups:
            assert isinstance(group["lr"], Tensor)
            if "step" in group:
                group["step"] += (self._dummy_overflow_buf != 1).to(torch.int32)
            else:
                group["step"] = torch.ones(1, dtype=torch.int32)
            device = group["params"][0].device
            self._dummy_overflow_buf.copy_(grad_scaler._check_inf_per_device(self)[device])
            assert grad_scaler._get_scale_async().tolist() == [1.0]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if len(state) == 0:
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
                if self._dummy_overflow_buf == 0:
                    m, v, t, (b1, b2) = state["exp_avg"], state["exp_avg_sq"], int(group["step"]), group["betas"]
                    m.lerp_(p.grad, 1 - b1)
                    v.mul_(b2).addcmul_(p.grad, p.grad, value=1 - b2)
                    update = m / (1 - b1**t) / ((v / (1 - b2**t)).sqrt() + group["eps"]) + group["weight_decay"] * p
                    p.sub_(group["lr"] * update)


class FusedLAMB(torch.optim.Optimizer):
    """With apex's conventions: the step on the host, no flag."""

    def __init__(self, params: Any, lr: float, betas: Any, eps: float, max_grad_norm: float, use_nvlamb: bool) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})
        assert use_nvlamb and max_grad_norm == math.inf

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            assert isinstance(group["lr"], float)
            group["step"] = group["step"] + 1 if "step" in group else 1
            assert isinstance(group["step"], int)
            params = [p for p in group["params"] if p.grad is not None]
            settings = {key: group[key] for key in ("lr", "betas", "eps", "weight_decay")}
            plain = LAMB(params, **settings)
            for p in params:
                if len(self.state[p]) == 0:
                    self.state[p].update(exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
                plain.state[p] = {**self.state[p], "step": torch.tensor(group["step"] - 1.0)}
            plain.step()


@pytest.fixture
def apex(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    modules = {name: ModuleType(name) for name in ("apex", "apex.optimizers", "apex.multi_tensor_apply")}
    modules["apex.optimizers"].FusedAdam, modules["apex.optimizers"].FusedLAMB = FusedAdam, FusedLAMB
    modules["apex.multi_tensor_apply"].multi_tensor_applier = type("Applier", (), {"available": True})
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    yield modules["apex.multi_tensor_apply"]


@pytest.mark.parametrize("name", ["adamw", "lamb"])
@pytest.mark.parametrize("skipped", [0, 2])
def test_apex_steps_skips_and_resumes_as_torch(apex: ModuleType, tmp_path: Path, name: str, skipped: int) -> None:
    ours, theirs = (nn.ParameterDict({str(i): p for i, p in enumerate(parameters(shapes=SHAPES[2:4]))}) for _ in range(2))
    reference = make(name, [{"params": [ours["0"]]}, {"params": [ours["1"]]}])

    def build() -> torch.optim.Optimizer:
        groups = [{"params": [theirs["0"]], "weight_decay": DECAY}, {"params": [theirs["1"]], "weight_decay": DECAY}]
        return build_apex(name, groups, LR, BETAS, EPS)

    fused = build()
    for step in range(5):
        for model, optimizer in ((ours, reference), (theirs, fused)):
            give_gradients(list(model.values()), step, bad=step == skipped)
            optimizer.found_inf = torch.tensor(float(step == skipped))
            for group in optimizer.param_groups:
                group["lr"] = LR * (1 - step / 10)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        torch.testing.assert_close(list(theirs.values()), list(ours.values()), rtol=1e-5, atol=1e-6)
        if step == 2:  # through a checkpoint into a new one: the count goes on
            folder = checkpoint.save(tmp_path, step, theirs, fused, {"model": {}}, 1)
            fused = build()
            checkpoint.load(folder, theirs, fused)
    assert all(fused.state[theirs[key]]["step"] == reference.state[ours[key]]["step"] == 4 for key in ours)


def test_apex_is_known_by_its_modules(apex: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Linear(2, 2)
    assert find_apex("adamw") is FusedAdam and find_apex("lamb") is FusedLAMB and find_apex("lion") is None
    assert type(build_optimizer(model, TrainConfig(), "s", Stage())) is torch.optim.AdamW  # auto, but no GPU
    with pytest.raises(UserError, match=r"train.optimizer_backend=apex: its kernels need a GPU; expected auto or torch"):
        build_optimizer(model, TrainConfig(optimizer_backend="apex"), "s", Stage())
    monkeypatch.setattr(apex.multi_tensor_applier, "available", False)  # built without CUDA
    assert find_apex("adamw") is None
    monkeypatch.setitem(sys.modules, "apex", ModuleType("apex"))  # another package of that name
    monkeypatch.delitem(sys.modules, "apex.optimizers")
    monkeypatch.delitem(sys.modules, "apex.multi_tensor_apply")
    assert find_apex("adamw") is None
    with pytest.raises(UserError, match=r"apex.optimizers of NVIDIA apex, built with its CUDA extensions, is not here"):
        build_optimizer(model, TrainConfig(optimizer_backend="apex"), "s", Stage())


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["adamw", "lamb"])
def test_apex_on_a_gpu(name: str) -> None:
    if find_apex(name) is None:
        pytest.skip("waits for NVIDIA apex")
    runs = []
    for backend in ("torch", "apex"):
        model = nn.ParameterDict({str(i): p for i, p in enumerate(parameters(shapes=SHAPES[1:4]))}).cuda()
        train = TrainConfig(optimizer=name, optimizer_backend=backend, lr=LR)
        optimizer = build_optimizer(model, train, "s", Stage())
        for step in range(5):
            give_gradients(list(model.values()), step, bad=step in (0, 2))
            optimizer.found_inf = torch.tensor(float(step in (0, 2)), device="cuda")
            optimizer.step()
        runs.append(list(model.values()))
    torch.testing.assert_close(runs[1], runs[0], rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_on_a_gpu_as_on_the_cpu(name: str) -> None:
    runs = []
    for device in ("cpu", "cuda"):
        params = [nn.Parameter(p.detach().to(device)) for p in parameters()]
        optimizer = make(name, params)
        average = WeightAverage(nn.ParameterList(params), 0.9)
        for step in range(5):
            give_gradients(params, step, bad=step in (0, 2))
            optimizer.found_inf = torch.tensor(float(step in (0, 2)), device=device)
            optimizer.step()
            average.update(step, optimizer.found_inf)
        runs.append([tensor.detach().cpu() for tensor in [*params, *average.averages.values()]])
    torch.testing.assert_close(runs[1], runs[0], rtol=1e-4, atol=1e-6)


# --- parameters spread over processes ------------------------------------------------------------------------------------


def spread_as_whole(rank: int, world: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=world)
    mesh = init_device_mesh("cpu", (world,))
    shapes = ((), (1,), (5,), (4, 3), (7, 2))  # of the second one process has nothing; FSDP2 leaves scalars whole
    for name in ("lamb", "lion", "sgd", "adamw"):
        models = []
        for spread in (True, False):
            params = parameters(shapes=shapes)
            model = nn.ParameterList(
                nn.Parameter(distribute_tensor(p.detach(), mesh, [Shard(0)])) if spread and p.ndim else p for p in params
            )
            optimizer, average = make(name, list(model)[name == "adamw" :]), WeightAverage(model, 0.9)
            for step in range(4):
                give_gradients(params, step)
                for parameter, whole in zip(model, copy.deepcopy([p.grad for p in params]), strict=True):
                    parameter.grad = distribute_tensor(whole, mesh, [Shard(0)]) if isinstance(parameter, DTensor) else whole
                norm = gradient_norm(model, 0.5, 0.3)
                optimizer.found_inf = torch.tensor(float(step == 1))
                optimizer.step()
                average.update(step, optimizer.found_inf)
            with average.applied():
                averages = [p.detach().clone() for p in model]
            whole = [t.full_tensor() if isinstance(t, DTensor) else t for t in [*(p.detach() for p in model), *averages, norm]]
            models.append(whole)
        torch.testing.assert_close(models[0], models[1], rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")
    sharded = nn.ParameterList([nn.Parameter(distribute_tensor(torch.ones(4, 2), mesh, [Shard(0)]))])
    with pytest.raises(UserError, match=r"train.optimizer=adafactor: torch's does not take FSDP's parameters"):
        build_optimizer(sharded, TrainConfig(optimizer="adafactor"), "s", Stage())
    with pytest.raises(UserError, match=r"train.precision=bf16_params: FSDP.s forwards hold bf16 weights anyway"):
        working_weights(sharded, "bf16_params")

    sharded.append(nn.Parameter(torch.ones(())))  # as FSDP2 leaves a temperature
    for parameter in sharded:
        parameter.grad = torch.full_like(parameter, 256.0)
    LossScale(TrainConfig(precision="fp16", loss_scale=256.0), torch.device("cpu")).unscale_(sharded)
    assert sharded[0].grad.to_local().tolist() == [[1.0, 1.0]] * 2 and sharded[1].grad == 1

    torch.manual_seed(0)
    layer = nn.Linear(6, 5)
    with (weights := BFloat16Weights(layer)):
        parallel = nn.parallel.DistributedDataParallel(layer)
    data = torch.randn(world, 3, 6)
    for _ in range(2):  # bf16 gradients are averaged and then summed in float32
        with weights, torch.autocast("cpu", torch.bfloat16):
            parallel(data[rank]).square().mean().backward()
    alone = copy.deepcopy(layer)
    alone.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        alone(data.flatten(0, 1)).square().mean().mul(2).backward()
    torch.testing.assert_close(layer.weight.grad, alone.weight.grad, rtol=0.02, atol=2e-3)
    assert layer.weight.grad.dtype == torch.float32
    dist.destroy_process_group()


def test_parameters_spread_over_processes_move_as_whole_ones(tmp_path: Path) -> None:
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[2])])
    context = multiprocessing.get_context("forkserver")  # torch is imported once, by the server
    context.set_forkserver_preload(["toy_run"])
    processes = [context.Process(target=spread_as_whole, args=(rank, 2, tmp_path)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        if process.is_alive():
            process.kill()
    assert [process.exitcode for process in processes] == [0, 0]
