from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from toy_run import Toy, ToyLoader, toy_config, toy_trainer

from vlpfast.models.clip import CLIP
from vlpfast.training import flops_count
from vlpfast.training.config import Stage
from vlpfast.training.flops_count import Skeleton, Speed, peak, prefixed
from vlpfast.training.parallel import World
from vlpfast.training.trainer import Trainer
from vlpfast.types import Batch, Progress

CPU = torch.device("cpu")
PROGRESS = Progress(0, 1)


def clip_loss(model: nn.Module, batch: Batch) -> Tensor:
    return model(batch, PROGRESS)["contrastive"]


@pytest.fixture
def clip() -> CLIP:
    torch.manual_seed(0)
    return CLIP(CLIP.Config.tiny())


def clip_batch(size: int) -> Batch:
    text = torch.randint(3, 1000, (size, 28))
    text[:, 9] = 2
    return Batch(image=torch.randn(size, 3, 64, 64), text=text, key=["k"] * size)


def test_by_shapes_it_is_what_a_real_step_counts(clip: CLIP) -> None:
    batch = clip_batch(4)
    saved: dict[int, Tensor] = {}
    known = {t.untyped_storage().data_ptr() for t in (*clip.parameters(), batch["image"], batch["text"])}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in known:
            saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with flops_count._counter() as counter:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = clip_loss(clip, batch)
        forward = counter.get_total_flops()
        loss.backward()
    before, drawn = [p.clone() for p in clip.parameters()], torch.get_rng_state()
    grads = [p.grad for p in clip.parameters()]
    count = Skeleton(clip).count(batch, clip_loss)
    assert (count.forward, count.flops) == (forward, counter.get_total_flops()) and 1.9 < count.backward / count.forward < 2.1
    assert count.saved_bytes == pytest.approx(sum(t.untyped_storage().nbytes() for t in saved.values()), rel=0.01)
    assert sum(count.by_module.values()) == forward and count.by_module["vision"] > count.by_module["text"] > 0
    assert count.by_module["image_projection"] == 2 * 4 * 128 * 128  # products of [4, 128] and [128, 128]
    assert count.by_module[""] == 2 * 4 * 4 * 128  # the loss's one product
    # and nothing was done
    assert all(torch.equal(a, b) for a, b in zip(before, clip.parameters(), strict=True))
    assert all(a is p.grad for a, p in zip(grads, clip.parameters(), strict=True)) and torch.equal(drawn, torch.get_rng_state())


def test_attention_on_a_cpu_is_counted() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3, 2, 10, 8))

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.scaled_dot_product_attention(self.scale * x, x, x)

    batch = Batch(image=torch.randn(3, 2, 10, 8))
    count = Skeleton(Attention()).count(batch, lambda model, batch: model(batch["image"]).sum())
    product = 2 * 3 * 2 * 10 * 10 * 8
    assert (count.forward, count.backward) == (2 * product, 5 * product)


def test_frozen_parameters_cost_less(clip: CLIP) -> None:
    skeleton = Skeleton(clip)
    whole = skeleton.count(clip_batch(4), clip_loss)
    skeleton.model.vision.requires_grad_(False)
    skeleton.model.image_projection.requires_grad_(False)
    locked = skeleton.count(clip_batch(4), clip_loss)
    assert locked.forward == whole.forward and locked.backward < 0.6 * whole.backward
    assert locked.saved_bytes < 0.6 * whole.saved_bytes
    assert all(parameter.requires_grad for parameter in clip.parameters())
    assert skeleton.count(clip_batch(8), clip_loss).saved_bytes == pytest.approx(2 * locked.saved_bytes, rel=0.02)


def test_it_seems_to_be_alone(clip: CLIP, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    seen = []

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        seen.append(dist.is_initialized())
        return clip_loss(model, batch)

    Skeleton(clip).count(clip_batch(2), loss)
    assert seen == [False] and dist.is_initialized()


class ByValue(Toy):
    """Its shapes depend on the batch's values."""

    def forward(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        kept = batch["image"][batch["image"][:, 0] > -100]
        return super().forward({**batch, "image": kept}, progress)


class Locked(Toy):
    """Holds what cannot be copied."""

    def __init__(self, config: Toy.Config) -> None:
        super().__init__(config)
        self.generator = iter(())
        self.held = (x for x in ())


@pytest.mark.parametrize(("kind", "reason"), [(ByValue, "DynamicOutputShapeException"), (Locked, "TypeError: cannot pickle")])
def test_what_shapes_do_not_tell_is_counted_as_the_first_step_is_taken(
    tmp_path: Path, kind: type, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found = {}
    for name, model_class in (("by_shapes", Toy), ("taken", kind)):
        (tmp_path / name).mkdir()
        config = toy_config(tmp_path / name, "train.steps=3")
        torch.manual_seed(0)
        Trainer(config, model_class(config.model.config), lambda *_: ToyLoader(8), World()).fit()
        found[name] = lines(tmp_path / name)
    assert [line["flops"] for line in found["taken"]] == [line["flops"] for line in found["by_shapes"]]
    assert [line["loss"] for line in found["taken"]] == [line["loss"] for line in found["by_shapes"]]  # counting changes nothing
    facts = json.loads((tmp_path / "taken" / "run" / "speed.json").read_text())["train"]
    assert facts["counted"].startswith(f"as the first step was taken ({reason}")
    assert f"counted as the first step was taken ({reason}" in capsys.readouterr().err


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


def test_in_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(flops_count, "peak", lambda device, dtype: flops_count.Peak(1e6, f"made up for {dtype}"))
    stages = "{a: {steps: 2}, b: {steps: 2, trainable: ['text.*']}}"
    toy_trainer(toy_config(tmp_path, f"stages={stages}")).fit()
    found = lines(tmp_path)
    forward = 2 * (2 * 8 * 6 * 16)  # two layers, [8, 6] x [6, 16]
    # backward: a product for each layer's weight; the batch needs no gradient
    assert [line["flops"] for line in found] == [2 * forward] * 2 + [forward + forward // 2] * 2
    for line in found:
        assert line["mfu"] == pytest.approx(line["flops"] / (8 / line["samples_per_s"]) / 1e6)
        assert line["memory_bytes"] > 50e6
    facts = json.loads((tmp_path / "run" / "speed.json").read_text())
    assert {name: stage["flops_per_sample"] * 8 for name, stage in facts.items()} == {"a": 2 * forward, "b": 1.5 * forward}
    said = capsys.readouterr().err
    assert (
        "stage a: 768 FLOP a sample, forward and backward, counted by shapes; peak 1 MFLOP/s (made up for torch.float32)" in said
    )
    assert "  MFU " in said


def test_a_model_without_products_has_no_mfu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(6))

        def forward(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
            return {"sum": (self.weight * batch["image"]).sum()}

    Trainer(toy_config(tmp_path, "train.steps=2"), Sum(), lambda *_: ToyLoader(8), World()).fit()
    assert all("mfu" not in line and "flops" not in line for line in lines(tmp_path))
    assert "MFU" not in capsys.readouterr().err


def test_half_precision_is_measured_against_its_own_peak(clip: CLIP, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(flops_count, "peak", lambda device, dtype: asked.append(dtype) or flops_count.Peak(1e12, ""))
    counts = [Speed(clip, CPU, half).begin_stage("a", Stage(), clip_batch(16), PROGRESS) for half in (None, torch.bfloat16)]
    assert asked == [torch.float32, torch.bfloat16]
    assert counts[0].flops == counts[1].flops and counts[1].saved_bytes < 0.8 * counts[0].saved_bytes


def test_peak_of_a_cpu_is_measured() -> None:
    found = peak(CPU, torch.float32)
    assert 1e9 < found.flops_per_s < 1e14 and found.source == "a product of 1,024 x 1,024 in float32, measured here, 1 threads"
    assert peak(CPU, torch.float32) is found


@pytest.mark.parametrize(
    ("name", "dtype", "tf32", "rate", "kind"),
    [
        ("NVIDIA H100 80GB HBM3", torch.bfloat16, False, 989e12, "half precision"),
        ("NVIDIA H100 80GB HBM3", torch.float32, True, 495e12, "TF32"),
        ("NVIDIA H100 80GB HBM3", torch.float32, False, 67e12, "fp32"),
        ("NVIDIA H100 PCIe", torch.bfloat16, False, 756e12, "half precision"),
        ("NVIDIA H200", torch.float16, True, 989e12, "half precision"),
        ("NVIDIA A100-SXM4-40GB", torch.bfloat16, False, 312e12, "half precision"),
        ("NVIDIA L40S", torch.bfloat16, False, 362e12, "half precision"),
        ("NVIDIA GB200", torch.bfloat16, False, 2500e12, "half precision"),
    ],
)
def test_peak_of_a_known_gpu(
    monkeypatch: pytest.MonkeyPatch, name: str, dtype: torch.dtype, tf32: bool, rate: float, kind: str
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    try:
        assert peak(torch.device("cuda"), dtype) == flops_count.Peak(rate, f"{name}, data sheet, {kind}")
    finally:
        torch.set_float32_matmul_precision(before)


def test_an_unknown_gpu_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU 5")
    monkeypatch.setattr(flops_count, "_measured", lambda device, dtype: ("measured", device, dtype))
    device = torch.device("cuda")
    assert peak(device, torch.bfloat16) == ("measured", device, torch.bfloat16)


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0 "), (999, "999 "), (999.7, "1 k"), (44.4e9, "44.4 G"), (1e15, "1 P"), (3.2e18, "3.2e+03 P")]
)
def test_prefixes(value: float, text: str) -> None:
    assert prefixed(value) == text
