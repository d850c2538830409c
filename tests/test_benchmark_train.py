"""benchmarks/train.py: that what it compares is the same, on a network of a few thousand parameters."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
import _data_path  # noqa: E402
import train as benchmark  # noqa: E402

from vlpfast.models.clip import CLIP  # noqa: E402
from vlpfast.nn.text import TextConfig  # noqa: E402
from vlpfast.nn.vit import ViTConfig  # noqa: E402
from vlpfast.types import DataSpec, ImageSpec, TextSpec  # noqa: E402


def small() -> CLIP.Config:
    return CLIP.Config(
        vision=ViTConfig(patch_size=8, width=16, layers=1, heads=2),
        text=TextConfig(vocab_size=50, eos_id=2, width=16, layers=1, heads=2),
        embed_dim=8,
        data=DataSpec(image=ImageSpec(size=16), text=TextSpec(context_length=8)),
    )


@pytest.mark.parametrize("part", [12, 4, 5])
def test_both_take_the_same_steps(part: int) -> None:
    found = {}
    for name, formulation in benchmark.FORMULATIONS.items():
        torch.manual_seed(0)
        model = CLIP(small())
        step = formulation(model, benchmark.random_batch(small(), 12, "cpu"), part, nullcontext)
        found[name] = [float(step()) for _ in range(4)], {key: value.detach() for key, value in model.named_parameters()}
    (ours, our_weights), (theirs, their_weights) = found["vlpfast"], found["open_clip"]
    assert ours == pytest.approx(theirs, rel=1e-4) and ours[-1] < ours[0]
    for name, weight in our_weights.items():  # a step of Adam turns small differences of small gradients into steps of size lr
        assert (weight - their_weights[name]).abs().max() < 4 * 2 * benchmark.TRAIN.lr, name
        assert (weight - their_weights[name]).abs().mean() < 0.2 * benchmark.TRAIN.lr, name


def test_rows_and_a_difference_that_is_noticed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(benchmark.MODELS, "tiny", (small, 4))
    monkeypatch.setattr(benchmark, "memory_in_a_process", lambda arguments, threads: 2**20)
    monkeypatch.setattr(benchmark, "keep_freed_memory", lambda: None)  # nothing that outlives the test

    @contextmanager
    def here(name: str, samples: int, part: int, device: str, threads: int) -> Iterator[dict[str, benchmark.Runner]]:
        yield {one: benchmark.in_this_process(name, one, samples, part, device) for one in benchmark.FORMULATIONS}

    monkeypatch.setattr(benchmark, "runners", here)
    rows = benchmark.steps("tiny", 4, 2, "cpu", 1, 2)
    assert [(row["name"], row["samples"]) for row in rows] == [
        ("vlpfast", 4), ("open_clip", 4), ("vlpfast", 8), ("open_clip", 8),
    ]  # fmt: skip
    for row in rows:
        assert row["samples_per_s"] == row["samples"] / row["seconds_min"] and row["mfu"] > 0 and row["losses_apart"] < 1e-3
    benchmark.show(rows)
    assert capsys.readouterr().out.count("1.00x") >= 2
    loss = benchmark.open_clip_loss
    monkeypatch.setattr(benchmark, "open_clip_loss", lambda features, scale: loss(features, scale) * 1.01)
    with pytest.raises(SystemExit, match="the losses of the first steps are"):
        benchmark.steps("tiny", 4, 1, "cpu", 1, 1)


def test_steps_in_processes_are_those_in_this_one() -> None:
    with benchmark.runners("tiny", 2, 2, "cpu", 1) as table:
        found, apart = benchmark.timed(table, "tiny", 1e-3, 2)
    assert set(found) == {"vlpfast", "open_clip"} and apart < 1e-3
    assert all(len(times) == 2 and min(times) > 0 for times in found.values())
    with pytest.raises(SystemExit, match="the process of vlpfast has ended"), benchmark.runners("tiny", 2, 0, "cpu", 1) as table:
        table["vlpfast"]()


def test_data_ways_give_the_same_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_data_path, "find_spec", lambda name: None)  # DALI takes seconds to start
    spec = DataSpec(image=ImageSpec(size=32), text=TextSpec(context_length=28))
    rows = _data_path.measure(spec, 6, 2, 24, 1, "cpu", 1, tmp_path)
    assert [row["name"] for row in rows] == list(_data_path.NAMES[1:])
    assert all(row["samples_per_s"] > 0 and row["pixels_off"] < 1e-6 for row in rows)
    monkeypatch.setattr(_data_path, "view_rectangles", lambda *a, **k: (torch.tensor([[0, 0, 20, 20]]), None))
    with pytest.raises(SystemExit, match="torch DataLoader, Pillow: another batch than"):
        _data_path.measure(spec, 6, 2, 24, 1, "cpu", 1, tmp_path)


def test_summary_of_a_run(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("model: {name: clip, preset: tiny}\ntrain: {batch_size: 10, micro_batch: 5}\n")
    facts = {"cpu": "A CPU", "cores": 2, "gpus": [], "torch": "2", "commit": "c", "threads": 1}
    (run / "environment.json").write_text(json.dumps(facts))
    lines = [{"samples_per_s": 100.0, "data_wait": 0.5, "memory_bytes": place * 2**20} for place in range(20)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run / "evaluation.json").write_text('{"step": 20}')
    benchmark.write_summary(run, tmp_path / "row.json")
    found = json.loads((tmp_path / "row.json").read_text())
    assert found["memory_mib"] == 19 and found["micro_batch"] == 5
    assert found["seconds"] == pytest.approx(2.0) and found["samples_per_s"] == pytest.approx(100) and found["data_wait"] == 0.5
