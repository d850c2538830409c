"""vlpfast-eval on a run that vlpfast-train made, at a size that takes seconds."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from vlpfast.cli import train
from vlpfast.cli.eval import main
from vlpfast.data import ShardWriter
from vlpfast.types import UserError

ROOT = Path(__file__).parents[2]
COLOURS = ("red", "green", "blue", "white")
SMALL = """model.vision.layers=1 model.vision.width=32 model.text.layers=1 model.text.width=32 model.text.vocab_size=300
model.embed_dim=16 train.steps=4 train.batch_size=8 train.checkpoint_every=2 train.precision=fp32 train.tensorboard_every=0
train.lr=0.01 evaluation.every=2 data.threads=1 data.loader=plain data.source=shards"""


def write_shards(folder: Path, prefix: str, count: int, damaged: int | None = None) -> None:
    with ShardWriter(folder, prefix) as writer:
        for number in range(count):
            colour = COLOURS[number % 4]
            picture = io.BytesIO()
            Image.new("RGB", (72, 64), colour).save(picture, "JPEG")
            members = {"jpg": picture.getvalue() if number != damaged else b"nothing", "txt": f"{number} is {colour}".encode()}
            writer.write(f"{prefix}{number:03d}", {**members, "json": json.dumps({"label": colour}).encode()})


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    write_shards(folder, "train", 24)
    write_shards(folder, "heldout", 10)
    write_shards(folder, "other", 15, damaged=3)
    (folder / "classes.txt").write_text("\n".join(COLOURS) + "\n")
    overrides = [
        f"train.run_dir={folder / 'run'}",
        f"data.train=['{folder}/train-*.tar']",
        f"data.heldout=['{folder}/heldout-*.tar']",
    ]
    assert train.main([str(ROOT / "configs" / "clip.yaml"), *SMALL.split(), *overrides]) == 0
    return folder


@pytest.fixture
def run_dir(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / "run", tmp_path / "run"))


def evaluate(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[dict, list[str], str]:
    """The JSON of the last line, the lines before it, stderr."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 0
    captured = capsys.readouterr()
    *table, last = captured.out.splitlines()
    return json.loads(last), table, captured.err


def test_same_figures_as_training_ended_with(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = json.loads((run_dir / "evaluation.json").read_text())
    for name in ("evaluation.json", "report.html"):
        (run_dir / name).unlink()
    result, table, errors = evaluate(capsys, run_dir)
    assert result == before and result["step"] == 4
    assert json.loads((run_dir / "evaluation.json").read_text()) == result
    assert result["text_to_image_chance_R@1"] == pytest.approx(1 / 10)
    for name, line in zip(("text to image", "image to text"), table, strict=False):
        key = name.replace(" ", "_")
        figures = [float(figure) for figure in re.findall(r"([\d.]+) %", line)]
        assert line.startswith(name) and figures == [round(100 * result[f"{key}_R@{k}"], 1) for k in (1, 5, 10)]
    assert "report.html" in errors and "text-to-image" in (run_dir / "report.html").read_text()
    # Rows of the batch change no figure.
    assert evaluate(capsys, run_dir, "evaluation.batch_size=3")[0] == pytest.approx(result)


def test_an_earlier_checkpoint_and_no_report(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = (run_dir / "report.html").read_bytes()
    lines = [json.loads(line) for line in (run_dir / "evaluation.jsonl").read_text().splitlines()]
    result, _, _ = evaluate(capsys, run_dir, "--checkpoint", 2, "--no-report", "--device", "cpu")
    assert result == lines[0] and result["step"] == 2 and result != lines[1]
    assert (run_dir / "report.html").read_bytes() == report


def test_other_shards_with_classes(made: Path, run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pattern = f"{made}/other-{{000000..000000}}.tar"
    result, table, _ = evaluate(capsys, run_dir, f"evaluation.class_names={made / 'classes.txt'}", "--shards", pattern)
    assert result["shards"] == [pattern]
    assert result["text_to_image_chance_R@1"] == pytest.approx(1 / 14)  # one of fifteen is damaged
    assert result["zero_shot_chance_top1"] == pytest.approx(1 / 4) and table[2].startswith("zero-shot")
    report = (run_dir / "report.html").read_text()
    assert "other003" in report and 'id="zero-shot"' in report and "4 classes, 14 pictures" in report.replace("\u00a0", " ")


def test_with_token_merging_switched_on(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = evaluate(capsys, run_dir, "--no-report")[0]
    seen = []
    for override in ("model.vision.merge.r=0", "model.vision.merge.r=28", "model.vision.merge.per_layer=[28]"):
        seen.append(evaluate(capsys, run_dir, override, "--no-report")[0])
    assert seen[0] == plain and seen[1] == seen[2] and seen[1].keys() == plain.keys()
    with pytest.raises(UserError, match=r"unknown key 'model\.vision\.merge\.rr'; did you mean 'model\.vision\.merge\.r'"):
        main([str(run_dir), "model.vision.merge.rr=8"])
    with pytest.raises(UserError, match=r"merge\.per_layer: expected a number for each of the 1 blocks, got \[3, 3\]"):
        main([str(run_dir), "model.vision.merge.per_layer=[3,3]"])


def test_training_shards_are_not_needed(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(made, tmp_path / "moved")
    run_dir = tmp_path / "moved" / "run"
    config = (run_dir / "config.yaml").read_text()
    (run_dir / "config.yaml").write_text(config.replace("/train-*.tar", "/gone-*.tar"))
    assert evaluate(capsys, run_dir, "--no-report")[0]["step"] == 4


def test_damaged_newest_checkpoint_is_passed_over_and_named(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    next((run_dir / "checkpoints" / "step-00000004").glob("*.distcp")).write_bytes(b"cut")
    result, _, errors = evaluate(capsys, run_dir, "--no-report")
    assert result["step"] == 2 and "step-00000004 is damaged" in errors
    with pytest.raises(UserError, match="step-00000004 is damaged"):
        main([str(run_dir), "--checkpoint", "4"])


def test_mistakes(made: Path, run_dir: Path, tmp_path: Path) -> None:
    def fails(message: str, *arguments: object) -> None:
        with pytest.raises(UserError, match=message):
            main([str(argument) for argument in arguments])

    kept = {path: path.read_bytes() for path in run_dir.iterdir() if path.is_file()}
    fails("run folder .*nowhere does not exist", tmp_path / "nowhere")
    fails("is no run folder: it has no config.yaml", made)
    fails(r"--checkpoint 3: expected latest or the step of a checkpoint in .* \(there: 2, 4\)", run_dir, "--checkpoint", "3")
    fails("--checkpoint newest: expected latest or the step", run_dir, "--checkpoint", "newest")
    fails("matches no file", run_dir, "--shards", tmp_path / "nothing-*.tar")
    fails("no held-out data .* with --shards", run_dir, "data.heldout=[]")
    fails("unknown key 'evaluation.batchsize'; did you mean 'evaluation.batch_size'", run_dir, "evaluation.batchsize=3")
    fails("expected auto, cpu or cuda, got 'tpu'", run_dir, "--device", "tpu")
    fails("does not fit CLIP", run_dir, "model.vision.layers=2")
    (tmp_path / "cut.tar").write_bytes(next(made.glob("other-*.tar")).read_bytes()[:3000])
    fails("cut.tar", run_dir, "--shards", tmp_path / "cut.tar")
    assert {path: path.read_bytes() for path in run_dir.iterdir() if path.is_file()} == kept
    (run_dir / "tokenizer.json").unlink()
    fails("tokenizer.json", run_dir)
    shutil.rmtree(run_dir / "checkpoints")
    fails("no finished checkpoint in .*checkpoints", run_dir)


def test_help_and_how_a_mistake_ends(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    text = capsys.readouterr().out
    assert ended.value.code == 0 and "examples:" in text and "vlpfast-eval runs/clip --checkpoint 300" in text
    command = [sys.executable, "-m", "vlpfast.cli.eval", str(tmp_path / "nowhere")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    wrong = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert wrong.returncode == 2 and wrong.stdout == ""
    assert wrong.stderr.startswith("error: run folder") and wrong.stderr.count("\n") == 1
