"""vlpfast-train with the real data path, model and evaluation, at a size that takes seconds."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vlpfast.cli import assemble
from vlpfast.cli.evaluate import evaluate
from vlpfast.cli.train import main
from vlpfast.data import ShardWriter
from vlpfast.training.trainer import Trainer
from vlpfast.types import UserError

ROOT = Path(__file__).parents[2]
CLIP = str(ROOT / "configs" / "clip.yaml")
SMALL = [
    "model.vision.layers=1",
    "model.vision.width=32",
    "model.text.layers=1",
    "model.text.width=32",
    "model.text.vocab_size=300",
    "model.embed_dim=16",
    "train.steps=6",
    "train.batch_size=8",
    "train.checkpoint_every=2",
    "train.precision=fp32",
    "train.tensorboard_every=0",
    "evaluation.every=3",
    "data.threads=1",
    "data.loader=plain",
]
COLOURS = ("red", "green", "blue", "white")


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty plain-coloured pictures to train on in two shards, eight to evaluate on."""
    folder = tmp_path_factory.mktemp("shards")
    for prefix, count in (("train", 40), ("heldout", 8)):
        with ShardWriter(folder, prefix, samples_per_shard=20) as writer:
            for number in range(count):
                colour = COLOURS[number % 4]
                writer.write(f"{prefix}{number:03d}", sample(colour, f"picture {number} is {colour}", {"label": colour}))
    (folder / "classes.txt").write_text("\n".join(COLOURS) + "\n")
    return folder


def sample(colour: str, caption: str, record: dict[str, Any]) -> dict[str, bytes]:
    picture = io.BytesIO()
    Image.new("RGB", (80, 72), colour).save(picture, "JPEG")
    return {"jpg": picture.getvalue(), "txt": caption.encode(), "json": json.dumps(record).encode()}


def of(folder: Path) -> list[str]:
    return ["data.source=shards", f"data.train=['{folder}/train-*.tar']", f"data.heldout=['{folder}/heldout-*.tar']"]


def train(run_dir: Path, *overrides: str) -> int:
    return main([CLIP, *SMALL, f"train.run_dir={run_dir}", *overrides])


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def losses(run_dir: Path) -> list[tuple[int, float, float]]:
    return [(line["step"], line["loss"], line["grad_norm"]) for line in records(run_dir / "metrics.jsonl")]


def files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_emojiworld_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    world = ["data.num_scenes=64", "data.num_heldout=16", f"data.cache_dir={tmp_path / 'cache'}", "data.loader=auto"]
    assert train(tmp_path / "run", *world) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out.splitlines()[-1])
    assert result["step"] == 6 and {"text_to_image_R@1", "text_to_image_R@5", "image_to_text_R@1", "zero_shot_top1"} <= set(
        result
    )
    assert all(0 <= value <= 1 for key, value in result.items() if "R@" in key or "zero_shot" in key)
    assert "making emojiworld in" in captured.err and "6/6" in captured.err
    run = tmp_path / "run"
    names = (
        "config.yaml environment.json metrics.jsonl evaluation.jsonl evaluation.json tokenizer.json model.safetensors report.html"
    )
    assert {*names.split(), "checkpoints"} <= {path.name for path in run.iterdir()}
    assert json.loads((run / "evaluation.json").read_text()) == result
    assert [line["step"] for line in records(run / "evaluation.jsonl")] == [3, 6]
    line = records(run / "metrics.jsonl")[0]
    assert {"step", "loss", "lr", "samples_per_s", "data_wait", "logit_scale"} <= set(line) and line["step"] == 1
    assert line["logit_scale"] == pytest.approx(1 / 0.07, rel=1e-3)

    before = losses(run)
    assert train(run, *world) == 0  # nothing is left to do: the same figures once more, from the cache and the last checkpoint
    captured = capsys.readouterr()
    assert json.loads(captured.out.splitlines()[-1]) == result and losses(run) == before
    assert "making emojiworld" not in captured.err and "training the tokenizer" not in captured.err

    loaded = assemble.load_config(run / "config.yaml")  # what vlpfast-eval does
    sources = assemble.prepare_data(loaded)
    from vlpfast.training.checkpoint import load_weights
    from vlpfast.training.precision import choose_device

    model = assemble.build_model(loaded)
    load_weights(run, model)
    tokenizers = assemble.build_tokenizers(loaded, sources.train, run)
    assert {"step": 6, **evaluate(loaded, model, tokenizers, sources, choose_device("cpu")).metrics} == result


def test_killed_and_started_again(shards: Path, tmp_path: Path) -> None:
    """With DALI where it is installed: its prefetching must not be seen in the losses."""
    settings = [*of(shards), "data.loader=auto", "train.steps=12", "evaluation.every=0"]
    assert train(tmp_path / "whole", *settings) == 0
    run = tmp_path / "broken"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "vlpfast.cli.train", CLIP, *SMALL, *settings, f"train.run_dir={run}"]
    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as process:
        metrics = run / "metrics.jsonl"
        while process.poll() is None and not (metrics.exists() and metrics.read_bytes().count(b"\n") >= 3):
            time.sleep(0.001)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert train(run, *settings) == 0
    assert losses(run) == losses(tmp_path / "whole") and len(losses(run)) == 12
    assert (run / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()


def test_own_shards_with_classes(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    classes = [f"evaluation.class_names={shards / 'classes.txt'}", "evaluation.templates=['a {} picture','{}']"]
    assert train(tmp_path / "a", *of(shards), *classes) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["zero_shot_chance_top1"] == pytest.approx(0.25) and result["text_to_image_chance_R@1"] == pytest.approx(1 / 8)
    assert train(tmp_path / "b", *of(shards)) == 0
    assert "zero_shot_top1" not in json.loads(capsys.readouterr().out)
    assert train(tmp_path / "c", *of(shards), "data.heldout=[]") == 0  # nothing to evaluate on
    assert json.loads(capsys.readouterr().out) == {"step": 6}
    with pytest.raises(
        UserError, match=r"evaluation.label_field: sample heldout000 has 'colour': None in its JSON; expected one"
    ):
        train(tmp_path / "d", *of(shards), *classes, "evaluation.label_field=colour")
    (tmp_path / "twice.txt").write_text("red\nred\n")
    for path, message in ((tmp_path / "none.txt", "cannot be read"), (tmp_path / "twice.txt", "each once, got 2 lines")):
        with pytest.raises(UserError, match=rf"evaluation.class_names: .*{message}"):
            train(tmp_path / "e", *of(shards), f"evaluation.class_names={path}")


def test_stages_with_data_of_their_own(shards: Path, tmp_path: Path) -> None:
    part = f"{shards}/train-000000.tar"
    stages = [f"stages.a={{steps: 2, data: {{train: ['{part}']}}}}", "stages.b={steps: 2, trainable: ['text*']}"]
    assert train(tmp_path / "run", *of(shards), *stages) == 0
    lines = records(tmp_path / "run" / "metrics.jsonl")
    assert [(line["stage"], line["epoch"]) for line in lines] == [("a", 0.5), ("a", 1.0), ("b", 0.2), ("b", 0.4)]


def test_damaged_samples_are_counted(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, "train") as writer:
        for number in range(20):
            content = sample("red", f"caption {number}", {})
            if number == 4:
                content["jpg"] = b"no picture"
            writer.write(f"k{number}", content)
    assert train(tmp_path / "run", "data.source=shards", f"data.train=['{tmp_path}/train-*.tar']", "train.steps=5") == 0
    assert records(tmp_path / "run" / "metrics.jsonl")[-1]["skipped_samples"] == 1


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.name=clpi", "unknown model 'clpi'; did you mean 'clip'"),
        ("model.preset=tinny", "model.preset: clip has no preset 'tinny'; expected one of paper, tiny"),
        ("train.stepz=3", "override 'train.stepz=3': unknown key 'train.stepz'; did you mean 'train.steps'"),
        ("model.vision.layer=3", "unknown key 'model.vision.layer'; did you mean 'model.vision.layers'"),
        ("train.steps=lots", "train.steps: Value 'lots' of type 'str' could not be converted to Integer"),
        ("train.device=tpu", "train.device: expected auto, cpu or cuda, got 'tpu'"),
        ("data.world.sise=64", "data.world: Key 'sise' not in 'World'. Did you mean: 'size'"),
        ("data.world.size=5", "emojiworld: size must be a whole number from 64 to 1024, got 5"),
    ],
)
def test_mistakes_in_the_settings(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        train(tmp_path / "run", override)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.train=['{folder}/nothing-*.tar']"], "nothing-"),
        (["data.heldout=['{folder}/nothing-*.tar']"], "nothing-"),
        (["data.train=['{folder}/empty.tar']"], "empty.tar"),
        (["data.train=['{folder}/cut.tar']"], "cut.tar"),
        (["train.batch_size=500"], "40 samples in 2 shards are fewer than one global batch of 500"),
        (["data.tokenizer={folder}/none.json"], "there is no file .*none.json"),
        (["model.text.eos_id=7"], "data.tokenizer: expected the eos_id 2, the tokenizer's, the model clip has 7"),
        (
            ["model.text.vocab_size=100"],
            "data.tokenizer: none is given, and none can be trained: vocab_size: expected at least 259",
        ),
        (["stages.a.init_from={folder}/none.safetensors"], "none.safetensors: no such file or folder"),
    ],
)
def test_mistakes_in_the_data(shards: Path, tmp_path: Path, overrides: list[str], message: str) -> None:
    (tmp_path / "empty.tar").write_bytes(b"")
    whole = (shards / "train-000000.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=message):
        train(tmp_path / "run", *of(shards), *(text.replace("{folder}", str(tmp_path)) for text in overrides))
    assert train(tmp_path / "run", *of(shards), "train.steps=1", "evaluation.every=0") == 0  # put right, the same folder serves


def test_tokenizer_that_does_not_fit(shards: Path, tmp_path: Path) -> None:
    assert train(tmp_path / "run", *of(shards), "train.steps=1") == 0
    tokenizer = f"data.tokenizer={tmp_path / 'run' / 'tokenizer.json'}"
    with pytest.raises(
        UserError,
        match=r"data.tokenizer: expected a vocab_size of at least \d+, as many as the tokenizer has ids, the model clip has 200",
    ):
        train(tmp_path / "other", *of(shards), tokenizer, "model.text.vocab_size=200")
    assert train(tmp_path / "other", *of(shards), tokenizer, "train.steps=1") == 0
    assert losses(tmp_path / "other") == losses(tmp_path / "run")


def test_run_folder_of_another_model(shards: Path, tmp_path: Path) -> None:
    assert train(tmp_path / "run", *of(shards)) == 0
    before = files(tmp_path / "run")
    with pytest.raises(
        UserError, match=r"holds a run with other settings: model.vision.layers: 1 -> 2\. Choose another train.run_dir"
    ):
        train(tmp_path / "run", *of(shards), "model.vision.layers=2")
    assert files(tmp_path / "run") == before


def test_checkpoint_of_another_model(shards: Path, tmp_path: Path) -> None:
    for name, layers in (("one", 1), ("two", 2)):
        assert train(tmp_path / name, *of(shards), f"model.vision.layers={layers}", "evaluation.every=0") == 0
    shutil.rmtree(tmp_path / "one" / "checkpoints")
    shutil.copytree(tmp_path / "two" / "checkpoints", tmp_path / "one" / "checkpoints")
    with pytest.raises(UserError, match=r"step-00000006 holds another model .*: vision.layers: 2 -> 1"):
        train(tmp_path / "one", *of(shards), "model.vision.layers=1", "train.steps=8")


def test_half_written_checkpoint(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert train(run, *of(shards)) == 0
    before = losses(run)
    newest = run / "checkpoints" / "step-00000006" / "__0_0.distcp"
    newest.write_bytes(newest.read_bytes()[:1000])
    assert train(run, *of(shards)) == 0
    assert "step-00000006 is damaged (__0_0.distcp has 1,000 of" in capsys.readouterr().err
    assert losses(run) == before


def test_mistakes_end_with_one_line_and_code_2(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for overrides, message in ((["train.stepz=3"], "error: override 'train.stepz=3': unknown key"), (["--nonsense"], "usage:")):
        command = [sys.executable, "-m", "vlpfast.cli.train", CLIP, *overrides]
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path, timeout=60)
        assert ended.returncode == 2 and ended.stderr.startswith(message) and "Traceback" not in ended.stderr
        assert ended.stdout == "" and not list(tmp_path.iterdir())


def test_a_signal_ends_with_75(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Trainer._step

    def stop_at_three(self: Trainer, *arguments: Any) -> Any:
        if self.position.step == 2:
            os.kill(os.getpid(), signal.SIGUSR1)
        return step(self, *arguments)

    monkeypatch.setattr(Trainer, "_step", stop_at_three)
    assert train(tmp_path / "run", *of(shards)) == 75
    assert len(losses(tmp_path / "run")) == 3 and not (tmp_path / "run" / "report.html").exists()


def test_help_and_print_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    text = capsys.readouterr().out
    assert ended.value.code == 0 and "configs/clip.yaml" in text and "exit codes: 0" in text and "key=value" in text
    assert main([CLIP, "--print-config", "train.steps=3"]) == 0
    (tmp_path / "printed.yaml").write_text(capsys.readouterr().out)
    assert assemble.load_config(tmp_path / "printed.yaml") == assemble.load_config(CLIP, ["train.steps=3"])


def test_the_demo_config_explains_every_key() -> None:
    config = assemble.load_config(CLIP)
    assert config.model.config == type(config.model.config).tiny() and config.train.run_dir == "runs/clip"
    own = ["model.preset=paper", "data.source=shards", 'data.train=["/data/cc3m-{00000..00331}.tar"]']  # as in --help
    assert assemble.load_config(CLIP, own).model.config == type(config.model.config)()
    for line in Path(CLIP).read_text().splitlines():
        if line.startswith(" ") and not line.strip().startswith("#"):
            assert " # " in line, line
