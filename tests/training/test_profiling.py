from __future__ import annotations

import gzip
import json
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_run import toy_config, toy_trainer

from vlpfast.training.profiling import (
    WARM_UP,
    Profiler,
    Summary,
    advice,
    as_html,
    as_markdown,
    is_communication,
    length,
    page,
    union,
)

CPU = torch.device("cpu")
ABOUT = {"bf16": False, "bf16_is_fast": False, "loader": "plain"}
GOOD = Summary(
    steps=4,
    device="NVIDIA H100 80GB HBM3",
    step_seconds=0.1,
    split={"data": 0.001, "transfer": 0.0, "forward": 0.03, "backward": 0.06, "optimizer": 0.005},
    idle=0.05,
    communication=0.1,
    exposed=0.05,
    samples_per_s=5000.0,
    mfu=0.45,
    memory_bytes=70 * 2**30,
    memory_total=80 * 2**30,
    bf16=True,
    bf16_is_fast=True,
    loader="dali",
    operators=[("aten::mm", 120.0, 0.6), ("aten::copy_", 40.0, 0.1), ("vlpfast::pair_fwd_triton", 1.0, 0.02)],
)


def run(folder: Path, profiler: Profiler, *overrides: str) -> list[dict[str, Any]]:
    toy_trainer(toy_config(folder, *overrides), profiler=profiler).fit()
    profiler.close()
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


def test_a_run_with_a_look_at_three_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    profiler = Profiler(tmp_path / "run", 3, CPU, 8, ABOUT)
    lines = run(tmp_path, profiler)
    folder, found = tmp_path / "run" / "profile", profiler.summary
    assert sorted(path.name for path in folder.iterdir()) == ["summary.html", "summary.md", "trace.json.gz"]
    assert f"profile: {folder / 'summary.html'}" in capsys.readouterr().err
    seen = lines[WARM_UP : WARM_UP + 3]
    assert found.steps == 3 and found.samples_per_s == pytest.approx(3 * 8 / sum(8 / line["samples_per_s"] for line in seen))
    for part in ("data", "transfer", "forward", "backward", "optimizer"):
        assert found.split[part] == pytest.approx(sum(line["seconds"][part] for line in seen) / 3)
    assert sum(found.split.values()) <= found.step_seconds
    assert found.mfu == pytest.approx(sum(line["mfu"] for line in seen) / 3)
    assert found.memory_bytes == seen[-1]["memory_bytes"] and 0 < found.idle < 1 and found.communication == 0
    calls = {name: count for name, count, _ in found.operators}
    assert calls["aten::addmm"] == 2  # the towers' two layers, in each step
    assert sum(share for _, _, share in found.operators) <= 1
    with gzip.open(folder / "trace.json.gz") as file:
        trace = json.load(file)["traceEvents"]
    assert sum(event.get("name") == "aten::addmm" for event in trace) == 6
    # The run is the one that nobody looked at.
    (tmp_path / "other").mkdir()
    toy_trainer(toy_config(tmp_path / "other")).fit()
    other = [json.loads(line) for line in (tmp_path / "other" / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines] == [line["loss"] for line in other]


def test_a_run_that_is_too_short(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for steps in (WARM_UP - 2, WARM_UP + 2):
        profiler = Profiler(tmp_path / "run", 3, CPU, 8, ABOUT)
        run(tmp_path, profiler, f"train.steps={steps}")
        assert profiler.summary is None and not (tmp_path / "run" / "profile").exists()
    assert f"no profile: it takes {WARM_UP} steps and 3 after them, this start of the run took 4" in capsys.readouterr().err
    with torch.profiler.profile():  # none was left running
        pass


def test_numbers_may_come_later_than_the_steps(tmp_path: Path) -> None:
    """As on a GPU: the numbers of a step arrive after the next one was taken."""
    profiler = Profiler(tmp_path, 2, CPU, 8, ABOUT)
    for step in range(1, WARM_UP + 4):
        torch.ones(50).sum()
        profiler.step()
        if step > 1:
            assert profiler.summary is None or step > WARM_UP + 3
            late = {"step": step - 1, "samples_per_s": float(step - 1), "seconds": {"forward": 0.1}, "memory_bytes": None}
            profiler.write(late)
    assert profiler.summary.steps == 2 and profiler.summary.memory_bytes is None and profiler.summary.mfu is None
    assert profiler.summary.samples_per_s == pytest.approx(16 / (8 / (WARM_UP + 1) + 8 / (WARM_UP + 2)))
    assert [name for name, _, _ in profiler.summary.operators if name == "aten::sum"]


def test_time_without_overlaps() -> None:
    spans = [(5.0, 7.0), (0.0, 2.0), (1.0, 3.0), (1.5, 1.6), (7.0, 8.0)]
    assert union(spans) == [(0.0, 3.0), (5.0, 8.0)] and length(union(spans)) == 6.0
    assert union([]) == [] and length([]) == 0
    names = ["ncclDevKernel_AllReduce_Sum_bf16_RING_LL", "nccl:all_reduce", "gloo:all_reduce", "c10d::allreduce_"]
    assert all(map(is_communication, names)) and not is_communication("aten::mm")


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"split": {"data": 0.011}}, "The step waits for data: 11.0 % (more than 10.0 %). More data.threads; smaller"),
        ({"split": {"data": 0.011}, "loader": "plain"}, "More data.threads; data.loader=dali (pip install 'vlpfast[dali]')"),
        ({"split": {"transfer": 0.0051}}, "Batches go to the device within the step: 5.1 %"),
        ({"exposed": 0.101}, "Ranks wait for what travels between them: 10.1 %"),
        ({"idle": 0.2}, "The GPU has nothing to do though the data is there: 19.0 %"),
        ({"memory_bytes": 30 * 2**30}, "Of the GPU's memory much is free: 62.5 %"),
        ({"split": {"optimizer": 0.021}}, "The optimiser takes long: 21.0 %"),
        ({"operators": [("aten::copy_", 1.0, 0.1), ("aten::cat", 1.0, 0.06)]}, "Copies and casts: 16.0 %"),
        ({"bf16": False}, "Products are made in fp32 where bf16 has instructions of its own: train.precision=bf16."),
    ],
)
def test_what_to_try_first(changes: dict[str, Any], text: str) -> None:
    assert advice(GOOD) == ["None of the rules applies: the time goes into computing. The heaviest operator is aten::mm."]
    (found,) = advice(replace(GOOD, **changes))
    assert found.startswith(text) or text in found


def test_the_largest_comes_first_and_a_cpu_is_no_gpu() -> None:
    found = advice(replace(GOOD, split={"data": 0.03, "optimizer": 0.05}, idle=0.1))
    assert [text.split(":")[0] for text in found] == ["The optimiser takes long", "The step waits for data"]
    waits = replace(GOOD, split={"data": 0.03}, idle=0.4)  # idle, of which the data explains the most
    assert [text.split(":")[0] for text in advice(waits)] == ["The step waits for data"]
    assert "the time goes into computing" in advice(replace(GOOD, idle=0.9, memory_total=None))[0]


class Text(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.cells: list[str] = []
        self.feed(text)

    def handle_data(self, data: str) -> None:
        self.cells.append(data)


def test_the_page() -> None:
    hostile = replace(GOOD, operators=[("aten::mm<script>|", 1.5, 0.6)])
    parts = page(hostile)
    text, html = as_markdown(parts), as_html(parts)
    assert "| forward | 30.0 ms | 30.0 % |" in text and "| the rest | 4.0 ms | 4.0 % |" in text
    assert "| aten::mm<script>\\| | 1.5 | 60.0 % |" in text
    for line in (
        "4 steps on NVIDIA H100 80GB HBM3: 100.0 ms a step, 5,000 samples/s",
        "the device does nothing in 5.0 % of the time",
        "the step waits for data in 1.0 % of the time",
        "MFU 45.0 %",
        "something travels between ranks in 10.0 % of the time, 5.0 % with nothing else beside it",
        "peak memory 70.00 GiB of 80.0 GiB",
    ):
        assert f"- {line}" in text and f"<li>{line}" in html
    assert "<script" not in html and {"aten::mm<script>|", "30.0 ms", "What to try first"} <= set(Text(html).cells)
