"""Puts the rooms together: from a configuration to data, tokenizer, model and figures. Shared by the commands."""

from __future__ import annotations

import json
import sys
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn

from vlpfast import models
from vlpfast.cli.tokenizers import build_tokenizers, load_tokenizers
from vlpfast.data import ShardSet, make_loader
from vlpfast.data.few_shot import few_shot_indices, split_classes
from vlpfast.data.loader import read_records
from vlpfast.data.mixture import expand_sources
from vlpfast.data.shards import expand
from vlpfast.data.targets import read_classes
from vlpfast.training import config as settings
from vlpfast.training.config import DataConfig, RunConfig, Stage
from vlpfast.training.parallel import World
from vlpfast.training.rng import seed_everything
from vlpfast.types import DataSpec, Loader, TakesClasses, TargetSpec, Tokenizer, UserError

__all__ = ["build_tokenizers", "load_tokenizers"]  # beside what is here


@dataclass
class ClassSource:
    """Pictures whose JSON names their class."""

    patterns: list[str]
    names: list[str]  # [K]
    templates: list[str]
    label_field: str
    first: int = 0  # the number that the JSON gives to the first of the names
    subset: np.ndarray | None = None  # the samples of these classes; None: all


@dataclass
class Sources:
    """Shard patterns of a run. An empty `heldout` means that nothing can be evaluated."""

    train: list[str] | dict[str, list[str]]  # by source, where there are several
    heldout: list[str]
    classes: ClassSource | None
    class_names: list[str] | None = None  # [K] before data.classes divides them; None: nobody has named the classes
    answers: list[str] | None = None  # from which a model chooses; None: nobody has said


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The run that a YAML file and `key=value` overrides describe, for a model of the registry."""
    return settings.load_config(path, overrides, models.get)


def build_model(config: RunConfig) -> nn.Module:
    """The model with the random weights that train.seed gives."""
    seed_everything(config.train.seed)
    try:
        return models.get(config.model.name)(config.model.config)
    except ValueError as error:
        raise UserError(f"model: {error}") from error


def prepare_data(config: RunConfig, data: DataConfig | None = None) -> Sources:
    """Where the samples are. emojiworld is made on first use; of shards, that they are there is checked.

    data: the data section to follow, when it is not the configuration's own (a stage may change it).
    """
    data = data or config.data
    sources = _emojiworld(config, data) if data.source == "emojiworld" else _own_shards(config, data)
    if (classes := sources.classes) is not None and data.classes != "all":
        target = TargetSpec(classes.label_field, classes=classes.names)
        target, classes.subset = _divided(replace(data, shots=0), target, classes.patterns, config.train.seed)
        classes.names, classes.first = target.classes, target.first
    return sources


def _own_shards(config: RunConfig, data: DataConfig) -> Sources:
    train: list[str] | dict[str, list[str]] = data.train
    if data.mixture:
        train = {name: source.shards for name, source in data.mixture.items()}
        expand_sources(train)
    else:
        expand(train)
    named = {key: getattr(config.evaluation, key) for key in ("class_names", "answers")}
    names, answers = (_lines(key, path) if path else None for key, path in named.items())
    classes = None
    if data.heldout:
        expand(data.heldout)
        if config.evaluation.zero_shot and names:
            classes = ClassSource(data.heldout, names, config.evaluation.templates, config.evaluation.label_field)
    return Sources(train, data.heldout, classes, names, answers)


def open_loader(
    config: RunConfig,
    sources: Sources,
    tokenizers: Tokenizer | Mapping[str, Tokenizer] | None,
    world: World,
    name: str,
    stage: Stage,
) -> Loader:
    """The training batches of a stage for one rank."""
    data = settings.stage_data(config, name, stage)
    sources = sources if data == config.data else prepare_data(config, data)
    weights = {name: source.weight for name, source in data.mixture.items() if source.weight is not None}
    spec, subset = loader_spec(config, data, sources)
    return make_loader(
        sources.train,
        spec,
        tokenizers,
        world.share(config.train.batch_size),
        train=True,
        weights="sqrt" if data.weights == "sqrt" else weights,
        pure_batches=data.pure_batches,
        templates={name: source.templates for name, source in data.mixture.items() if source.templates},
        answers={name: source.answers for name, source in data.mixture.items() if source.answers},
        subset=subset,
        seed=config.train.seed,
        rank=world.rank,
        world_size=world.size,
        backend=data.loader,
        device=world.device,
        threads=data.threads,
        window=data.window,
        ahead=data.ahead,
    )


def give_classes(config: RunConfig, model: nn.Module, tokenizers: Mapping[str, Tokenizer], sources: Sources) -> None:
    """Tells a model that works on class names those of the last stage's data. UserError: nobody has named them."""
    if not isinstance(model, TakesClasses):
        return
    data = settings.stage_data(config, *config.stage_list()[-1])
    sources = sources if data == config.data else prepare_data(config, data)
    target = data_spec(config).targets.get("label", TargetSpec())
    names = target.classes or sources.class_names
    if not names:
        raise UserError(f"evaluation.class_names: expected a file of the classes that {config.model.name} works on, got none")
    model.set_classes(names if data.classes == "all" else split_classes(names, data.classes), tokenizers[""])


def data_spec(config: RunConfig) -> DataSpec:
    return config.model.config.data


def loader_spec(config: RunConfig, data: DataConfig, sources: Sources) -> tuple[DataSpec, np.ndarray | None]:
    """The model's DataSpec, where targets without names of their own have the classes', and which of the training samples
    data.shots and data.classes leave; None: all. The target "label" counts the classes that are left."""
    spec = data_spec(config)
    targets = {
        name: replace(target, classes=target.classes or sources.class_names or []) if target.kind == "class" else target
        for name, target in spec.targets.items()
    }
    label = targets.get("label", TargetSpec(config.evaluation.label_field, classes=sources.class_names or []))
    divided, subset = _divided(data, label, sources.train, config.train.seed)
    return replace(spec, targets={name: divided if name == "label" else target for name, target in targets.items()}), subset


def _divided(
    data: DataConfig, target: TargetSpec, patterns: list[str] | dict[str, list[str]], seed: int
) -> tuple[TargetSpec, np.ndarray | None]:
    """The target with the classes that data.classes leaves, and the samples that it and data.shots leave."""
    if data.classes == "all" and not data.shots:
        return target, None
    shards = ShardSet(
        [path for named in expand_sources(patterns).values() for path in named] if isinstance(patterns, dict) else patterns
    )
    chunks = np.array_split(np.arange(len(shards)), max(1, len(shards) // 4096))
    labels = np.concatenate([read_classes(target, read_records(shards, chunk)) for chunk in chunks])  # [N], -1: damaged
    count = len(target.classes) or int(labels.max()) + 1
    half = len(split_classes(range(count), "base"))
    low, high = {"all": (0, count), "base": (0, half), "new": (half, count)}[data.classes]
    kept = np.flatnonzero((labels >= low) & (labels < high))
    if not len(kept):
        raise UserError(f'data.classes={data.classes}: no sample has one of these classes under "{target.key}" in its JSON')
    if data.shots:
        kept = kept[few_shot_indices(labels[kept], data.shots, seed)]
    return replace(target, classes=target.classes[low:high], first=target.first + low), kept


def _emojiworld(config: RunConfig, data: DataConfig) -> Sources:
    try:
        from vlpfast.data import emojiworld
    except ImportError as error:
        raise UserError(f"data.source=emojiworld needs the packages of `pip install vlpfast[demo]`: {error}") from error
    try:
        merged = OmegaConf.merge(OmegaConf.structured(emojiworld.World), OmegaConf.create(data.world))
        world = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise UserError(f"data.world: {str(error).splitlines()[0]}") from error
    splits = emojiworld.default_splits(data.num_scenes, data.num_heldout)
    about = json.dumps(emojiworld.describe(world, splits), sort_keys=True).encode()
    folder = Path(data.cache_dir).expanduser() / f"emojiworld-{data.num_scenes}-{zlib.crc32(about):08x}"
    patterns = emojiworld.build(
        folder, world, splits, workers=data.threads, progress=_say_progress(f"making emojiworld in {folder}")
    )
    names = emojiworld.class_names(world)
    classes = None
    if config.evaluation.zero_shot:
        classes = ClassSource([patterns["heldout_single"]], names, emojiworld.templates(world.language), "label")
    answers = emojiworld.answer_names(world) if world.language == "en" else None
    return Sources([patterns["train"]], [patterns["heldout"]], classes, names, answers)


def _say_progress(title: str) -> Callable[[int, int], None]:
    shown = -1

    def say(done: int, total: int) -> None:
        nonlocal shown
        if done * 10 // total > shown:
            shown = done * 10 // total
            print(f"{title}: {done:,} of {total:,} pictures", file=sys.stderr, flush=True)

    return say


def _lines(key: str, path: str) -> list[str]:
    try:
        names = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"evaluation.{key}: {path} cannot be read: {error}") from error
    if not names or len(set(names)) < len(names):
        raise UserError(f"evaluation.{key}: expected one a line in {path}, each once, got {len(names)} lines")
    return names
