"""configs/coop.yaml with the real data path: a CLIP, then prompts from few shots, in one run that can be gone on with."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_train import ROOT, SMALL, of, shards  # noqa: F401

from vlpfast.cli import assemble
from vlpfast.cli.train import main
from vlpfast.training import checkpoint
from vlpfast.types import UserError

COOP = str(ROOT / "configs" / "coop.yaml")


def train(folder: Path, run_dir: Path, *overrides: str) -> int:
    own = [
        f"evaluation.class_names={folder}/classes.txt",
        "evaluation.every=0",
        f"train.run_dir={run_dir}",
        "train.keep_checkpoints=9",
    ]
    stages = ["stages.clip.steps=3", "stages.prompts.steps=4", "stages.prompts.data.shots=2"]
    return main([COOP, *SMALL, *of(folder), *own, *stages, *overrides])


def test_a_clip_then_prompts_and_an_exact_resume(shards: Path, tmp_path: Path) -> None:  # noqa: F811
    whole, again = tmp_path / "whole", tmp_path / "again"
    assert train(shards, whole) == 0
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert [(line["stage"], *line["losses"]) for line in lines] == [("clip", "contrastive")] * 3 + [
        ("prompts", "classification")
    ] * 4
    assert [line["lr"] for line in lines[3:]] == pytest.approx(
        [1e-5, *(0.001 * (1 + math.cos(math.pi * e / 4)) for e in range(3))]
    )
    assert lines[-1]["epoch"] == 4  # 2 shots of 4 classes are one batch of 8

    state = load_file(whole / "model.safetensors")
    model = assemble.build_model(assemble.load_config(whole / "config.yaml"))
    checkpoint.load_weights(whole / "checkpoints/step-00000003", model)
    changed = [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, state[name])]
    assert changed == ["prompts.ctx"]

    shutil.copytree(whole, again)
    for step in (6, 7):
        shutil.rmtree(again / f"checkpoints/step-{step:08d}", ignore_errors=True)
    assert train(shards, again) == 0
    assert all(torch.equal(tensor, state[name]) for name, tensor in load_file(again / "model.safetensors").items())


def test_new_classes_are_others_and_none_is_an_error(shards: Path, tmp_path: Path) -> None:  # noqa: F811
    config = assemble.load_config(COOP, [*SMALL, *of(shards), f"evaluation.class_names={shards}/classes.txt"])
    sources = assemble.prepare_data(config)
    tokenizers = assemble.build_tokenizers(config, sources.train, tmp_path)
    model = assemble.build_model(config)
    for part, count in (("all", 4), ("base", 2), ("new", 2)):
        config.stages["prompts"].data["classes"] = part
        assemble.give_classes(config, model, tokenizers, sources)
        assert len(model.prompts.token_ids) == count
    sources.class_names = None
    config.stages["prompts"].data = {}
    with pytest.raises(UserError, match=r"evaluation\.class_names: expected a file of the classes that coop works on"):
        assemble.give_classes(config, model, tokenizers, sources)
