from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from toy_run import toy_config, toy_model

from vlpfast.training.config import Group, Stage, TrainConfig
from vlpfast.training.optim import build_optimizer, gradient_norm, learning_rate, set_learning_rate
from vlpfast.training.precision import autocast_dtype, choose_device, is_fast
from vlpfast.training.stages import select_trainable, set_mode, weighted_sum
from vlpfast.types import UserError


@pytest.fixture
def model(tmp_path: Path) -> torch.nn.Module:
    return toy_model(toy_config(tmp_path))


def trained(model: torch.nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_trainable_and_frozen_patterns(model: torch.nn.Module) -> None:
    offered = trained(model)
    select_trainable(model, "s", Stage(trainable=["image.*", "logit_scale"], frozen=["*.bias"]), offered)
    assert trained(model) == {"image.0.weight", "image.1.weight", "logit_scale"}
    select_trainable(model, "s", Stage(), offered)  # a later stage starts from what the model offers, not from the stage before
    assert trained(model) == offered and not any("momentum" in name for name in offered)
    select_trainable(model, "s", Stage(trainable=["momentum.*", "text.*"]), offered)
    assert trained(model) == {"text.weight", "text.bias"}


def test_patterns_that_match_nothing_are_errors(model: torch.nn.Module) -> None:
    offered = trained(model)
    with pytest.raises(
        UserError, match=r"stages.s.trainable: pattern 'visual.\*' matches no parameter; they are .*image.0.weight"
    ):
        select_trainable(model, "s", Stage(trainable=["visual.*"]), offered)
    with pytest.raises(UserError, match=r"stages.s.frozen: pattern 'imgae.\*'"):
        select_trainable(model, "s", Stage(frozen=["imgae.*"]), offered)
    with pytest.raises(UserError, match=r"stages.s.groups: pattern 'txt'"):
        build_optimizer(model, TrainConfig(), "s", Stage(groups={"txt": Group()}))
    with pytest.raises(UserError, match="leave no parameter to train"):
        select_trainable(model, "s", Stage(frozen=["*"]), offered)


def test_modes(model: torch.nn.Module) -> None:
    assert set_mode(model, "s", Stage(mode="fit"), trained(model)) == trained(model)
    assert model.mode == "fit"
    with pytest.raises(UserError, match=r"stages.s.mode: mode: expected both or fit, got 'fti'"):
        set_mode(model, "s", Stage(mode="fti"), trained(model))
    with pytest.raises(UserError, match="Linear has no modes"):
        set_mode(torch.nn.Linear(1, 1), "s", Stage(mode="fit"), [])


def test_a_mode_may_offer_other_parameters(model: torch.nn.Module) -> None:
    at_first = trained(model)
    select_trainable(model, "z", Stage(frozen=["text.bias"]), at_first)
    assert set_mode(model, "y", Stage(mode="fit"), at_first) == at_first  # one that offers what it did before
    model.set_mode = lambda mode: [
        p.requires_grad_((mode == "text") == name.startswith("text.")) for name, p in model.named_parameters()
    ]
    texts = set_mode(model, "a", Stage(mode="text"), at_first)
    assert texts == {"text.weight", "text.bias"}
    select_trainable(model, "a", Stage(frozen=["text.bias"]), texts)
    assert set_mode(model, "b", Stage(), texts) == texts  # what stage a froze is offered again
    others = set_mode(model, "c", Stage(mode="others"), texts)
    assert others == {name for name, _ in model.named_parameters()} - texts
    select_trainable(model, "c", Stage(), others)
    assert trained(model) == others


def test_loss_weights() -> None:
    losses = {"a": torch.tensor(2.0), "b": torch.tensor(3.0), "c": torch.tensor(float("nan"))}
    assert weighted_sum(losses, {"a": 0.5, "c": 0}, "s") == 4.0
    assert weighted_sum({"a": losses["a"]}, {}, "s") == 2.0
    with pytest.raises(UserError, match=r"stages.s.losses: unknown loss 'd'; the model gives a, b, c"):
        weighted_sum(losses, {"d": 1.0}, "s")
    with pytest.raises(UserError, match="every loss of the model"):
        weighted_sum({"a": losses["a"]}, {"a": 0.0}, "s")


def test_optimizer_groups(model: torch.nn.Module) -> None:
    stage = Stage(groups={"image.*": Group(lr=0.1, weight_decay=0.5), "*.weight": Group(lr=2.0)})
    optimizer = build_optimizer(model, TrainConfig(weight_decay=0.2), "s", stage)
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = {names[p]: (g["factor"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    assert found == {
        "image.0.weight": (0.1, 0.5),
        "image.0.bias": (0.1, 0.0),
        "image.1.weight": (0.1, 0.0),
        "image.1.bias": (0.1, 0.0),
        "text.weight": (2.0, 0.2),
        "text.bias": (1.0, 0.0),
        "logit_scale": (1.0, 0.0),
    }
    set_learning_rate(optimizer, 0.5)
    assert {g["lr"] for g in optimizer.param_groups} == {0.05, 1.0, 0.5}


def test_schedules() -> None:
    train = TrainConfig(lr=1.0, warmup_steps=4, schedule="cosine")
    assert [learning_rate(step, 104, train) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert learning_rate(4, 104, train) == 1.0
    assert learning_rate(54, 104, train) == pytest.approx(0.5)
    assert learning_rate(79, 104, train) == pytest.approx(0.5 * (1 + math.cos(0.75 * math.pi)))
    assert 0 < learning_rate(103, 104, train) < 1e-3
    linear = TrainConfig(lr=1.0, warmup_steps=0, schedule="linear")
    assert [learning_rate(step, 4, linear) for step in range(4)] == [1.0, 0.75, 0.5, 0.25]
    assert learning_rate(999, 1000, TrainConfig(lr=0.3, schedule="constant")) == 0.3
    assert learning_rate(1, 2, TrainConfig(lr=1.0, warmup_steps=10)) == 0.2  # a run shorter than its warm-up


def test_gradient_norm_clips() -> None:
    layer = torch.nn.Linear(2, 1, bias=False)
    layer.weight.grad = torch.tensor([[3.0, 4.0]])
    assert gradient_norm(layer, 0.0) == 5.0 and layer.weight.grad.tolist() == [[3.0, 4.0]]
    assert gradient_norm(layer, 1.0) == 5.0
    torch.testing.assert_close(layer.weight.grad, torch.tensor([[0.6, 0.8]]))


def test_device() -> None:
    assert choose_device("cpu") == torch.device("cpu")
    with pytest.raises(UserError, match=r"train.device: expected auto, cpu or cuda, got 'gpu'"):
        choose_device("gpu")
    with pytest.raises(UserError, match=r"train.device: 'cuda:99' asked for"):
        choose_device("cuda:99")


@pytest.mark.parametrize("flags", ["fpu avx512f avx512_bf16", "fpu avx512f amx_bf16 amx_tile", "fpu avx2 avx512f", None])
def test_precision_auto_is_bf16_only_where_the_cpu_has_it(monkeypatch: pytest.MonkeyPatch, flags: str | None) -> None:
    def read_text(self: Path) -> str:
        if flags is None:
            raise FileNotFoundError
        return f"flags\t\t: {flags} sse2\n"

    monkeypatch.setattr(Path, "read_text", read_text)
    cpu, fast = torch.device("cpu"), flags is not None and "bf16" in flags
    assert is_fast(torch.bfloat16, cpu) == fast and not is_fast(torch.float16, cpu)
    assert autocast_dtype("auto", cpu) == (torch.bfloat16 if fast else None)
    assert autocast_dtype("fp32", cpu) is None
    for precision in ("bf16", "bf16_params"):
        if fast:
            assert autocast_dtype(precision, cpu) == torch.bfloat16
        else:
            with pytest.warns(UserWarning, match=f"precision={precision}: this cpu has no bf16 instructions"):
                assert autocast_dtype(precision, cpu) == torch.bfloat16
    with pytest.warns(UserWarning, match="precision=fp16: this cpu has no fp16 instructions"):
        assert autocast_dtype("fp16", cpu) == torch.float16
