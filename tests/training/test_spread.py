"""What is spread over ranks where it is not used, and where it is used in half precision; over gloo."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks import run
from test_parallel import Block, Pair, config, trained, whole
from torch import Tensor, nn
from torch.distributed.checkpoint import FileSystemReader

from vlpfast.training.config import TrainConfig
from vlpfast.training.optim import gradient_norm
from vlpfast.training.parallel import Spread, World
from vlpfast.training.rng import seed_everything
from vlpfast.types import Progress, UserError

pytestmark = pytest.mark.filterwarnings("ignore:train.precision", "ignore:`torch.jit.script_method`")


# --- parameters without a gradient ---------------------------------------------------------------------------------------


class Partly(Pair):
    """A head that nothing uses, a tower whose features no loss uses, a loss `extra` with a head, and `rare`, which the samples
    decide on: after the first step it is one of every fourth sample's (all on one of two ranks) in two steps of three, or none's.
    """

    @dataclass
    class Config(Pair.Config):
        rare: str = "some"  # or "none"

    def __init__(self, config: Partly.Config) -> None:
        super().__init__(config)
        self.spare, self.extra_head, self.rare_head = nn.Linear(8, 8), nn.Linear(8, 1), nn.Linear(8, 1)
        self.audio = nn.ModuleList(Block(8, 0.0) for _ in range(2))
        self.step = 0

    def before_step(self, progress: Progress) -> None:
        self.step = progress.step

    def encode(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        features = super().encode(batch)
        sound = features["image"].detach()
        for block in self.audio:
            sound = block(sound)
        return features | {"sound": sound}

    def contrast(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        text, rare = features["text"], features["index"] % 4 == 1
        if self.step == 0:
            rare = torch.ones_like(rare)
        elif self.step % 3 == 2 or self.config.rare == "none":
            rare = torch.zeros_like(rare)
        losses = super().contrast(features) | {"extra": self.extra_head(text).square().mean(), "rare": text.new_zeros(())}
        if rare.any():
            losses["rare"] = self.rare_head(text[rare]).square().sum() / len(text)
        return losses


# what a stage leaves out -> its settings; names of parameters without a gradient in every step, in some
NEVER = ("spare", "audio", "extra_head")
CASES = {
    "always": (["stages.s={losses: {extra: 0, rare: 0}}"], (*NEVER, "rare_head")),
    "on some ranks": (["stages.s={losses: {extra: 0}}", "train.find_unused=true"], NEVER),
    "in some steps": (["stages.s={losses: {extra: 0}}", "train.find_unused=true", "model.rare=none"], NEVER),
}
SETTINGS = ("train.steps=4", "train.weight_decay=0.5")  # what had a gradient of zero would shrink


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    found = {}
    for name, (settings, _) in CASES.items():
        trainer, losses = trained(tmp_path_factory.mktemp("alone"), World(), *SETTINGS, *settings, model=Partly)
        found[name] = losses, trainer.model.state_dict()
    return found


def unused_parameters(rank: int, world: int, folder: Path, alone: dict[str, Any]) -> None:
    seed_everything(0)
    before = Partly(Partly.Config()).state_dict()
    tried = [*product(["always"], ["ddp", "fsdp"], [0, 5]), *product(["on some ranks"], ["ddp"], [0, 5])]
    for name, strategy, micro in [*tried, *product(["in some steps"], ["ddp", "fsdp"], [0])]:
        (settings, never), (losses, after) = CASES[name], alone[name]
        if strategy == "fsdp":
            settings = [text for text in settings if "find_unused" not in text]
        label = f"{name}, {strategy}, micro-batches of {micro}"
        how = (*SETTINGS, *settings, f"train.strategy={strategy}", f"train.micro_batch={micro}")
        trainer, found = trained(folder / label, World(rank, world), *how, model=Partly)
        assert found == pytest.approx(losses, rel=1e-5), label
        for key, parameter in trainer.model.named_parameters():
            assert (whole(parameter) - after[key]).norm() <= 1e-5 * after[key].norm(), f"{label}: {key}"
            assert torch.equal(whole(parameter), before[key]) == key.startswith((*never, "bias")), f"{label}: {key}"


def what_is_not_used_is_looked_for_only_where_it_must_be(rank: int, world: int, folder: Path) -> None:
    """In the first step of a stage; after it only where that step has shown something, or the settings say so."""
    for i, (model, losses, unused) in enumerate([(Pair, "{}", 0), (Partly, "{extra: 0}", 12), (Partly, "{}", 10)]):
        trainer, _ = trained(
            folder / f"looks-{i}", World(rank, world), "train.steps=2", f"stages.s={{losses: {losses}}}", model=model
        )
        spread = trainer._spread
        assert len(spread.unused) == unused, spread.unused
        assert spread._entry.find_unused_parameters == bool(unused)
    text = spread.about_unused()
    assert text.startswith("no gradient for 10 trained parameters (spare.weight, spare.bias, ") and "...)" in text


def a_gradient_that_fails_to_come_is_named(rank: int, world: int, folder: Path) -> None:
    """On all ranks, so that none waits. The first step of a stage that used all says so."""
    how = ("train.steps=3", "model.rare=none", "stages.s={frozen: ['spare*', 'audio*', bias]}")
    for micro in (0, 5):
        with pytest.raises(UserError, match=r"rare_head.bias has no gradient in this step.*set train.find_unused=true"):
            trained(folder / f"fails-{micro}", World(rank, world), *how, f"train.micro_batch={micro}", model=Partly)


class Odd(nn.Module):
    """Every kind of memory that a parameter or a buffer may be in."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.conv = nn.Conv2d(3, 4, 2).to(memory_format=torch.channels_last)
        for parameter in self.parameters():
            nn.init.normal_(parameter, generator=generator)
        self.register_buffer("turned", torch.randn(3, 2, generator=generator).T)
        self.register_buffer("flags", torch.randint(2, (7,), generator=generator).bool())
        self.register_buffer("count", torch.randint(10**6, (), generator=generator))
        self.register_buffer("short", torch.randn(5, generator=generator).bfloat16())


def ranks_begin_with_the_first_ones_model(rank: int, world: int, folder: Path) -> None:
    expected = Odd(0).state_dict()
    for strategy in ("ddp", "fsdp"):
        model = Odd(rank)
        if strategy == "fsdp":  # whose parameters have to lie in order
            model.to(memory_format=torch.contiguous_format)
        assert rank == 0 or not any(torch.equal(value, expected[key]) for key, value in model.state_dict().items())
        Spread(model, TrainConfig(strategy=strategy), World(rank, world))
        assert all(torch.equal(whole(value), expected[key]) for key, value in model.state_dict().items())


# --- FSDP2 in half precision ---------------------------------------------------------------------------------------------


class Scaled(Block):
    """With a parameter that FSDP2 does not take, in every block."""

    def __init__(self) -> None:
        super().__init__(8, 0.0)
        self.alpha = nn.Parameter(torch.tensor(0.3))

    def forward(self, x: Tensor) -> Tensor:
        self.seen = [p.dtype for p in (self.alpha, self.linear.weight, self.norm.bias)]
        return x + self.alpha * super().forward(x)


class Plain(nn.Module):
    """A loss without collectives. `seen`: the dtypes of some parameters as its forward saw them."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.place = nn.Embedding(5, 8), nn.Linear(1, 8)
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 3)
        self.blocks = nn.ModuleList(Scaled() for _ in range(2))
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        self.seen = [p.dtype for p in (self.scale, self.embedding.weight, self.norm.weight, self.head.bias)]
        self.feature = self.encode(ids)
        return {"loss": self.feature.float().square().mean() * self.scale.exp()}

    def encode(self, ids: Tensor) -> Tensor:
        """[B] int64 -> [B, 3]."""
        x = self.embedding(ids) + self.place(ids[:, None].float())
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def rounded(dtype: torch.dtype | None) -> Plain:
    """The same model of one process, with the parameters that a forward is to see."""
    torch.manual_seed(3)
    model = Plain()
    for parameter in model.parameters():
        if parameter.ndim and dtype is not None:
            parameter.data = parameter.data.to(dtype)
    return model


def gradients_are_those_of_rounded_weights_summed_in_float32(rank: int, world: int, folder: Path) -> None:
    ids = torch.arange(12) % 5  # [B]
    for dtype in (None, torch.bfloat16, torch.float16):
        torch.manual_seed(3 + rank)  # rank 0's parameters are taken
        model = Plain()
        spread = Spread(model, TrainConfig(strategy="fsdp"), World(rank, world), dtype)
        spread.begin_stage()
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
            loss = spread("__call__", ids[rank::world])["loss"]
        wide = dtype or torch.float32
        assert model.seen == [torch.float32, wide, wide, wide] and model.feature.dtype == wide
        assert [block.seen for block in model.blocks] == 2 * [[torch.float32, wide, wide]]
        loss.backward()
        spread.finish(averaged=True)
        expected: dict[str, Tensor] = {}
        for part in range(world):
            single = rounded(dtype)
            with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
                single(ids[part::world])["loss"].backward()
            for name, parameter in single.named_parameters():
                expected[name] = expected.get(name, 0) + parameter.grad.float() / world
        for name, parameter in model.named_parameters():
            found = whole(parameter.grad)
            assert found.dtype == parameter.dtype == torch.float32
            torch.testing.assert_close(found, expected[name], rtol=1e-6, atol=1e-7, msg=lambda text, name=name: f"{name}: {text}")
        norm = torch.stack([one.norm() for one in expected.values()]).norm()
        torch.testing.assert_close(gradient_norm(model, 0.0), norm, rtol=1e-5, atol=0)

        for _ in range(2):
            with spread.gathered(), torch.inference_mode():
                found = model.encode(ids)
                product = torch.ones(2, 2) @ torch.ones(2, 2)
            assert product.dtype == torch.float32  # what calls the model is not under autocast
            with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
                assert found.dtype == wide and torch.equal(found, rounded(dtype).encode(ids))
        assert "encode" not in vars(model) and "forward" not in vars(model)


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.plain = nn.LayerNorm(6), nn.LayerNorm(6, bias=False)
        for parameter in self.parameters():
            nn.init.normal_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        return self.plain(self.norm(x))


def norms_of_float32_are_made_in_it(rank: int, world: int, folder: Path) -> None:
    torch.manual_seed(0)
    model, x = Normed(), torch.randn(4, 6)
    rounded = [parameter.detach().bfloat16().float().requires_grad_() for parameter in model.parameters()]
    spread = Spread(model, TrainConfig(strategy="fsdp"), World(rank, world), torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = spread("__call__", x)
    expected = F.layer_norm(F.layer_norm(x, (6,), *rounded[:2]), (6,), rounded[2])
    assert found.dtype == torch.float32 and torch.equal(found, expected)
    found.square().sum().backward()
    expected.square().sum().backward()
    for parameter, one in zip(model.parameters(), rounded, strict=True):
        torch.testing.assert_close(whole(parameter.grad), one.grad, rtol=2e-2, atol=1e-2)  # handed on in bf16


def half_precision_trains_and_its_checkpoints_are_of_float32(rank: int, world: int, folder: Path) -> None:
    """With accumulation, an average of the weights, recomputed blocks; and another strategy and precision goes on with them."""
    world_of = World(rank, world)
    common = ("train.strategy=fsdp", "train.ema_decay=0.9", "train.activation_checkpointing=true", "train.steps=4")
    _, losses = trained(folder / "exact", world_of, *common, "train.precision=fp32")
    for precision, micro in (("bf16", 0), ("bf16", 5), ("fp16", 0)):
        name = f"{precision}-{micro}"
        trainer, found = trained(
            folder / name, world_of, *common, f"train.precision={precision}", f"train.micro_batch={micro}", "train.loss_scale=256"
        )
        assert found != losses and found == pytest.approx(losses, rel=0.02), name
        assert {whole(parameter).dtype for parameter in trainer.model.parameters()} == {torch.float32}
        assert not torch.equal(whole(trainer.model.text_in.weight), whole(trainer.model.text_in.weight).bfloat16().float())
        for line in (folder / name / "run" / "metrics.jsonl").read_text().splitlines():
            seconds = json.loads(line)["seconds"]
            assert seconds["communication"] > 0 and min(seconds.values()) >= -1e-6
    half = ("train.steps=4", "train.precision=bf16_params")  # of replicated parameters: DDP meets their bf16 copies
    _, found = trained(folder / "replicated", world_of, *half)
    assert found != losses and found == pytest.approx(losses, rel=0.02)
    path = folder / "bf16-0" / "run" / "checkpoints" / "step-00000004"
    stored = FileSystemReader(path).read_metadata().state_dict_metadata
    assert {entry.properties.dtype for entry in stored.values()} == {torch.float32}
    dist.barrier()
    _, after = trained(
        folder / "bf16-0", world_of, "train.strategy=ddp", "train.ema_decay=0.9", "train.steps=6", "train.precision=bf16"
    )
    assert len(after) == 2 and max(after) < losses[0]


def test_two_ranks(tmp_path: Path, alone: dict[str, Any]) -> None:
    checks = [
        partial(unused_parameters, alone=alone),
        what_is_not_used_is_looked_for_only_where_it_must_be,
        a_gradient_that_fails_to_come_is_named,
        ranks_begin_with_the_first_ones_model,
        gradients_are_those_of_rounded_weights_summed_in_float32,
        norms_of_float32_are_made_in_it,
        half_precision_trains_and_its_checkpoints_are_of_float32,
    ]
    run(2, tmp_path, [partial(check, folder=tmp_path) for check in checks])


def test_find_unused_is_for_ddp(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"train.find_unused belongs to train.strategy=ddp"):
        config(tmp_path, "train.find_unused=true", "train.strategy=fsdp")
