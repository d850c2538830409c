"""vlpfast-train --dry-run and --profile on real shards."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from vlpfast.cli import assemble
from vlpfast.cli.train import main
from vlpfast.data import ShardWriter
from vlpfast.training import flops_count
from vlpfast.types import UserError

CLIP = str(Path(__file__).parents[2] / "configs" / "clip.yaml")
COLOURS = {"red": (190, 60, 40), "green": (50, 170, 90), "blue": (40, 80, 200)}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    with ShardWriter(folder, "train") as writer:
        for number in range(48):
            name = list(COLOURS)[number % 3]
            picture = io.BytesIO()
            Image.new("RGB", (80, 80), COLOURS[name]).save(picture, "PNG")
            writer.write(f"k{number:02d}", {"png": picture.getvalue(), "txt": f"a {name} picture".encode()})
    return folder


@pytest.fixture
def settings(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(flops_count, "peak", lambda device, dtype: flops_count.Peak(1e9, f"made up, {dtype}"))
    layers = [f"model.{tower}.{size}" for tower in ("vision", "text") for size in ("layers=2", "width=32")]
    data = ["data.source=shards", f"data.train=['{shards}/*.tar']", "data.loader=plain", "data.threads=1"]
    train = ["train.steps=12", "train.batch_size=16", "train.precision=fp32", "train.tensorboard_every=0"]
    return [CLIP, *layers, "model.text.vocab_size=300", "model.embed_dim=16", *data, *train, "train.run_dir=run"]


def rows(text: str, start: str) -> list[list[str]]:
    """Cells of the table whose head begins with `start`."""
    lines = text[text.index(f"\n{start}") + 1 :].split("\n\n")[0].splitlines()
    return [re.split(r" {2,}", line.strip()) for line in lines]


def bytes_of(cell: str) -> float:
    return float(cell.removesuffix(" MiB").replace(",", "")) * 2**20


def test_dry_run(settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*settings, "--dry-run"]) == 0
    text = capsys.readouterr().out
    model = assemble.build_model(assemble.load_config(settings[0], settings[1:]))
    table = {row[0]: row for row in rows(text, "module")}
    for name in ("vision", "text", "logit_scale"):
        count = sum(p.numel() for n, p in model.named_parameters() if n.split(".")[0] == name)
        assert table[name][2] == f"{count:,}" and table[name][3] == "all"
    everything = sum(p.numel() for p in model.parameters())
    assert table["all"][1:4] == ["CLIP", f"{everything:,}", "all"] and table["vision"][1] == "ViT of 2 Block"

    one, ddp, fsdp = rows(text, "strategy")[1:]
    assert (one[:2], ddp[:2], fsdp[:2]) == (["one rank", "1"], ["ddp", "8"], ["fsdp", "8"])  # 16 samples are not divided by 64
    near = {"abs": 0.06 * 2**20}
    for row, parts in ((one, 1), (ddp, 1), (fsdp, 8)):
        assert [bytes_of(cell) for cell in row[2:5]] == [pytest.approx(n * 4 * everything / parts, **near) for n in (1, 1, 2)]
        assert bytes_of(row[7]) == pytest.approx(sum(map(bytes_of, row[2:7])), abs=0.3 * 2**20)
    assert bytes_of(ddp[5]) == pytest.approx(bytes_of(one[5]) / 8, **near) and bytes_of(fsdp[6]) > 0 == bytes_of(ddp[6])

    each, step = map(float, re.search(r"FLOPs: ([\d.]+) MFLOP a sample, .*; ([\d.]+) MFLOP a step", text).groups())
    assert step == pytest.approx(16 * each, rel=0.01)
    assert "(made up, torch.float32): no step can take less than" in text
    # nothing is left but the picture
    (sheet,) = (
        path for path in tmp_path.iterdir() if "inductor" not in path.name
    )  # torch's own folder, made when it is imported
    assert f"the first batch: {sheet}" in text and not (tmp_path / "run").exists()
    with Image.open(sheet) as picture:
        assert picture.format == "PNG" and picture.width > 6 * 224
        first = picture.getpixel((100, 100))
    assert min(max(abs(a - b) for a, b in zip(first, colour, strict=True)) for colour in COLOURS.values()) <= 2


def test_what_is_frozen_divided_and_recomputed(settings: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    found = {}
    for name, changes in {
        "plain": [],
        "frozen": ["stages={a: {steps: 3, frozen: ['vision.*']}, b: {steps: 5}}"],
        "divided": ["train.micro_batch=4"],
        "recomputed": ["train.activation_checkpointing=true"],
    }.items():
        assert main([*settings, *changes, "--dry-run"]) == 0
        text = capsys.readouterr().out
        found[name] = {"text": text, "one": rows(text, "strategy")[1], "flops": re.search(r"FLOPs: (.*) a sample", text)[1]}
    kept = {name: bytes_of(one["one"][5]) for name, one in found.items()}
    assert kept["divided"] == pytest.approx(kept["plain"] / 4, rel=0.05, abs=0.06 * 2**20)
    assert kept["recomputed"] < 0.7 * kept["plain"] and found["recomputed"]["flops"] == found["plain"]["flops"]
    frozen, whole = found["frozen"]["text"].split("\nstage b: 5 steps of 16 samples\n")
    assert "stage a: 3 steps of 16 samples\n" in frozen
    assert {row[0]: row[3] for row in rows(frozen, "module") if len(row) > 3}["vision"] == "none"
    assert rows("\n" + whole, "strategy")[1] == found["plain"]["one"]
    frozen_row = rows(frozen, "strategy")[1]
    assert bytes_of(frozen_row[3]) < bytes_of(frozen_row[2]) and kept["frozen"] < kept["plain"]


def test_of_many_ranks_the_first_speaks(
    settings: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "0")
    assert main([*settings, "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "stage train: 12 steps of 16 samples, 4 on each of 4 ranks" in text
    assert [row[:2] for row in rows(text, "strategy")[1:]] == [
        ["one rank", "1"], ["ddp", "4"], ["fsdp", "4"], ["ddp", "8"], ["fsdp", "8"],
    ]  # fmt: skip
    monkeypatch.setenv("RANK", "3")
    assert main([*settings, "--dry-run"]) == 0
    assert capsys.readouterr().out == ""


def test_a_dry_run_complains_as_a_run_does(settings: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for change, message in (
        ("train.batch_size=49", "48 samples in 1 shards are fewer than one global batch of 49"),
        ("train.batch_size=100", "train.batch_size: expected no more than the samples of stage train, got 100|fewer than one"),
        ("data.train=['nothing-*.tar']", "nothing-"),
        ("stages.a.trainable=['nothing.*']", "matches no parameter"),
        ("stages.a.losses={nothing: 1}", "unknown loss 'nothing'"),
    ):
        with pytest.raises(UserError, match=message):
            main([*settings, change, "--dry-run"])
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UserError, match=r"train\.batch_size: expected a multiple of the 3 ranks, got 16"):
        main([*settings, "--dry-run"])


def test_profile(settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*settings, "--profile", "4"]) == 0
    folder = tmp_path / "run" / "profile"
    assert {path.name for path in folder.iterdir()} == {"trace.json.gz", "summary.md", "summary.html"}
    text = (folder / "summary.md").read_text()
    assert "4 steps on CPU, 1 threads" in text and "vlpfast::pair_fwd" in text + json.dumps(_operators(folder))
    assert "Profile of some steps" in (tmp_path / "run" / "report.html").read_text()
    assert "profile: run/profile/summary.html" in capsys.readouterr().err
    speed = json.loads((tmp_path / "run" / "speed.json").read_text())
    assert speed["train"]["peak"] == "made up, torch.float32"


def _operators(folder: Path) -> list[str]:
    import gzip

    with gzip.open(folder / "trace.json.gz") as file:
        return sorted({event.get("name", "") for event in json.load(file)["traceEvents"]})


def test_mistakes_with_profile(settings: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="--profile 10 needs 15 steps with the first 5, the run has 12"):
        main([*settings, "--profile"])
    for wrong in ("train.steps=3", "0", "-2"):
        with pytest.raises(SystemExit):
            main([*settings, "--profile", wrong])
    assert "expected a number of steps, got 'train.steps=3' (key=value settings stand before --profile" in capsys.readouterr().err


def test_the_whole_batch_is_counted_though_a_part_is_read(
    settings: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from vlpfast.cli import dry_run

    read = []
    write = dry_run._write_sheet
    monkeypatch.setattr(dry_run, "_write_sheet", lambda batch, *more: (read.append(len(batch["key"])), write(batch, *more)))
    outputs = []
    for loaded in (64, 8):
        monkeypatch.setattr(dry_run, "LOADED", loaded)
        assert main([*settings, "--dry-run"]) == 0
        outputs.append(capsys.readouterr().out.split("\n", 1)[1])
    assert read == [16, 8] and outputs[0] == outputs[1] and torch.is_grad_enabled()


def test_rows_of_texts_grow_with_the_batch() -> None:
    """Of texts with any number of rows a sample, as many for each as were loaded."""
    from contextlib import nullcontext
    from types import SimpleNamespace

    import torch

    from vlpfast.cli.dry_run import _of_size

    speed = SimpleNamespace(skeleton=SimpleNamespace(fake=nullcontext()))
    loaded = {"index": torch.arange(4), "text": torch.zeros(4, 7), "answers": torch.zeros(10, 3), "answers_of": torch.zeros(10)}
    sized = _of_size({**loaded, "key": list("abcd")}, 8, speed)
    shapes = {name: list(value.shape) for name, value in sized.items() if name != "key"}
    assert shapes == {"index": [8], "text": [8, 7], "answers": [20, 3], "answers_of": [20]} and len(sized["key"]) == 8
    packed = {"text": torch.zeros(2, 9), "cu_seqlens": torch.zeros(6), "index": torch.arange(5)}
    assert list(_of_size(packed, 8, speed)["text"].shape) == [8, 9]
