from __future__ import annotations

from pathlib import Path

import pytest
from toy_run import CONFIG, Toy, toy_config

from vlpfast.training.config import MAY_CHANGE, differences, load_config, stage_data, to_dict, to_yaml
from vlpfast.types import UserError


def test_file_then_overrides(tmp_path: Path) -> None:
    config = toy_config(tmp_path, "train.steps=7", "model.head.width=3", "train.lr=1e-4", "data.train=[a.tar,b.tar]")
    assert (config.train.steps, config.model.config.head.width, config.train.lr) == (7, 3, 1e-4)
    assert config.data.train == ["a.tar", "b.tar"]
    assert config.model.name == "toy" and isinstance(config.model.config, Toy.Config)
    assert config.stage_list()[0][0] == "train" and config.total_steps() == 7


def test_preset(tmp_path: Path) -> None:
    assert toy_config(tmp_path, "model.preset=small").model.config.head.width == 4
    assert toy_config(tmp_path, "model.preset=small", "model.head.width=5").model.config.head.width == 5
    with pytest.raises(UserError, match=r"model.preset: toy has no preset 'large'; expected one of small"):
        toy_config(tmp_path, "model.preset=large")


def test_saved_config_is_complete_and_loads_to_the_same(tmp_path: Path) -> None:
    text = CONFIG + "stages: {one: {steps: 3, losses: {fit: 2}, groups: {'text.*': {lr: 0.1}}, data: {threads: 7}}, two: {}}\n"
    config = toy_config(tmp_path, "model.preset=small", "train.eps=1e-7", "train.run_dir=runs/${model.name}", text=text)
    assert config.train.run_dir == "runs/toy"
    saved = tmp_path / "config.yaml"
    saved.write_text(to_yaml(config))
    assert load_config(saved, [], lambda name: Toy) == config
    assert "keep_checkpoints: 2" in saved.read_text() and "dropout: 0.2" in saved.read_text()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.step=3", "override 'train.step=3': unknown key 'train.step'; did you mean 'train.steps'"),
        ("model.head.witdh=3", "unknown key 'model.head.witdh'; did you mean 'model.head.width'"),
        ("train.num_scenes=3", "did you mean 'data.num_scenes'"),
        ("trian.steps=3", "unknown key 'trian'; did you mean 'train'"),
        ("model.qqqq=3", "unknown key 'model.qqqq'; known here: head, inputs, name, preset"),
        ("train.steps=many", "override 'train.steps=many': train.steps: Value 'many' of type 'str'.*Integer"),
        ("train.steps=1.5", "train.steps: Value '1.5' of type 'float'.*Integer"),
        ("train.lr=", "train.lr: Incompatible value 'None' for field of type 'float'"),
        ("train.precision=fp8", r"train.precision: Invalid value 'fp8', expected one of \['auto', 'fp32', 'bf16', 'fp16',"),
        ("train=3", "override 'train=3': train: .*int is not a subclass of TrainConfig"),
        ("model.head=3", "override 'model.head=3': model.head: .*int is not a subclass of Head"),
        ("model=toy", "override 'model=toy': model: expected a section with at least a name, got 'toy'"),
        ("model.name=[a]", "model.name: expected a string"),
        ("train.steps", "override 'train.steps': expected key=value"),
        ("data.train=[a", "override 'data.train=\\[a': the value is not valid YAML"),
        ("data.train=[a-{0..9}.tar]", "the value is not valid YAML; text with braces needs quotes"),
        ("train.steps=${train.stepz}", "train.steps: Interpolation key 'train.stepz' not found"),
        ("stages.one.step=3", "unknown key 'stages.one.step'; did you mean 'stages.one.steps'"),
        ("stages.one.data.thread=3", "stages.one.data: unknown key 'thread'; did you mean 'threads'"),
        ("stages.one.data.threads=x", "stages.one.data: threads: Value 'x'"),
    ],
)
def test_bad_keys_and_types_name_key_source_and_cure(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        toy_config(tmp_path, override)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.steps=0", "train.steps: expected a number above 0, got 0"),
        ("train.batch_size=-1", "train.batch_size: expected a number above 0, got -1"),
        ("train.checkpoint_every=-1", "train.checkpoint_every: expected 0 or more, got -1"),
        ("evaluation.every=-5", "evaluation.every: expected 0 or more, got -5"),
        ("train.lr=nan", "train.lr: expected a number above 0, got nan"),
        ("train.betas=[0.9]", "train.betas: expected two numbers"),
        ("train.betas=[0.9,1.0]", "train.betas: expected two numbers"),
        ("train.run_dir=''", "train.run_dir: expected a folder"),
        ("stages.one.steps=0", "stages.one.steps: expected a number above 0, got 0"),
        ("data.train=[]", "data.train: expected patterns of tar files"),
        ("data.source=emojiworld", "set data.source=shards"),
        ("stages.one.data.train=[]", "data.train: expected patterns"),
    ],
)
def test_values_that_make_no_sense(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        toy_config(tmp_path, override)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: {steps: 3}", "model.name is missing"),
        ("model: [a]", "model: expected a section with at least a name"),
        ("- a", "expected sections such as"),
        ("model: {name: toy", "is not valid YAML"),
        (CONFIG + "trains: {}", "toy.yaml: unknown key 'trains'; did you mean 'train'"),
    ],
)
def test_bad_files(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        toy_config(tmp_path, text=text)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere.yaml: cannot be read: No such file"):
        load_config(tmp_path / "nowhere.yaml", [], lambda name: Toy)


def test_stage_changes_the_data_section(tmp_path: Path) -> None:
    config = toy_config(tmp_path, "data.threads=3", "stages.one.data={threads: 5, train: [x.tar]}")
    data = stage_data(config, "one", config.stages["one"])
    assert (data.threads, data.train, data.window) == (5, ["x.tar"], config.data.window)
    assert config.data.threads == 3


def test_differences_name_what_matters(tmp_path: Path) -> None:
    old = to_dict(toy_config(tmp_path))
    same = to_dict(toy_config(tmp_path, "train.steps=99", "train.device=cpu", "evaluation.every=3", "data.threads=1"))
    assert differences(old, same, MAY_CHANGE) == []
    other = to_dict(toy_config(tmp_path, "model.head.width=3", "train.seed=4", "stages.one.mode=fit"))
    changed = differences(old, other, MAY_CHANGE)
    assert "model.head.width: 16 -> 3" in changed and "train.seed: 0 -> 4" in changed
    assert any(line.startswith("stages.one.mode") for line in changed)
