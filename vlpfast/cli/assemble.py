"""Puts the rooms together: from a configuration to data, tokenizer, model and figures. Shared by the commands."""

from __future__ import annotations

import json
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn

from vlpfast import models
from vlpfast.data import ShardSet, load_tokenizer, make_loader, train_tokenizer
from vlpfast.data.mixture import expand_sources
from vlpfast.data.shards import expand
from vlpfast.evaluation.contact_sheet import Classified, Pairs
from vlpfast.evaluation.features import encode_images, encode_pairs
from vlpfast.evaluation.retrieval import retrieval
from vlpfast.evaluation.zero_shot import class_embeddings, zero_shot
from vlpfast.training import config as settings
from vlpfast.training.config import DataConfig, RunConfig, Stage
from vlpfast.training.parallel import World
from vlpfast.training.rng import seed_everything
from vlpfast.training.run_folder import has_begun
from vlpfast.types import DataSpec, Loader, Tokenizer, UserError

TOKENIZER_CAPTIONS = 1_000_000  # a vocabulary learns nothing from more


@dataclass
class ClassSource:
    """Pictures whose JSON names their class."""

    patterns: list[str]
    names: list[str]  # [K]
    templates: list[str]
    label_field: str


@dataclass
class Sources:
    """Shard patterns of a run. An empty `heldout` means that nothing can be evaluated."""

    train: list[str] | dict[str, list[str]]  # by source, where there are several
    heldout: list[str]
    classes: ClassSource | None


@dataclass
class Evaluation:
    metrics: dict[str, float]  # text_to_image_R@1, ..., zero_shot_top1, ... as fractions
    pairs: Pairs | None
    classified: Classified | None


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
    if data.source == "emojiworld":
        return _emojiworld(config, data)
    train: list[str] | dict[str, list[str]] = data.train
    if data.mixture:
        train = {name: source.shards for name, source in data.mixture.items()}
        expand_sources(train)
    else:
        expand(train)
    classes = None
    if data.heldout:
        expand(data.heldout)
        if config.evaluation.zero_shot and config.evaluation.class_names:
            names = _class_names(config.evaluation.class_names)
            classes = ClassSource(data.heldout, names, config.evaluation.templates, config.evaluation.label_field)
    return Sources(train, data.heldout, classes)


def open_loader(
    config: RunConfig, sources: Sources, tokenizer: Tokenizer | None, world: World, name: str, stage: Stage
) -> Loader:
    """The training batches of a stage for one rank."""
    data = settings.stage_data(config, name, stage)
    patterns = sources.train if data == config.data else prepare_data(config, data).train
    return make_loader(
        patterns,
        data_spec(config),
        tokenizer,
        world.share(config.train.batch_size),
        train=True,
        weights={name: source.weight for name, source in data.mixture.items() if source.weight is not None},
        pure_batches=data.pure_batches,
        seed=config.train.seed,
        rank=world.rank,
        world_size=world.size,
        backend=data.loader,
        device=world.device,
        threads=data.threads,
        window=data.window,
        ahead=data.ahead,
    )


def data_spec(config: RunConfig) -> DataSpec:
    return config.model.config.data


def build_tokenizer(config: RunConfig, sources: Sources, run_dir: Path, first: bool = True) -> Tokenizer | None:
    """The run's tokenizer, kept as run_dir/tokenizer.json: data.tokenizer, or one trained on the training captions.

    first: False reads what another process has kept. None for a model without text. UserError: its ids do not fit the model.
    """
    if data_spec(config).text is None:
        return None
    text, kept = config.model.config.text, run_dir / "tokenizer.json"
    if not first or (has_begun(run_dir) and kept.exists()):
        tokenizer = load_tokenizer(kept)
    else:
        if config.data.tokenizer:
            tokenizer = load_tokenizer(config.data.tokenizer)
        else:
            print("training the tokenizer on the captions", file=sys.stderr)
            try:
                tokenizer = train_tokenizer(captions(sources.train), text.vocab_size)
            except ValueError as error:
                raise UserError(f"model.text.{error}") from error
        tokenizer.save(str(kept))
    if tokenizer.vocab_size > text.vocab_size:
        ids = f"{tokenizer.vocab_size}, as many as the tokenizer has ids"
        raise UserError(f"model.text.vocab_size: expected at least {ids}, got {text.vocab_size}")
    if tokenizer.eos_id != text.eos_id:
        raise UserError(f"model.text.eos_id: expected {tokenizer.eos_id}, the tokenizer's, got {text.eos_id}")
    return tokenizer


def captions(patterns: list[str] | dict[str, list[str]]) -> Iterator[str]:
    """The captions of the shards in order, at most TOKENIZER_CAPTIONS of them, evenly spread. Unreadable ones are passed over."""
    shards = ShardSet(patterns if isinstance(patterns, list) else [pattern for named in patterns.values() for pattern in named])
    chosen = np.linspace(0, len(shards), min(len(shards), TOKENIZER_CAPTIONS), endpoint=False).astype(np.int64)
    for chunk in np.array_split(chosen, max(1, len(chosen) // 4096)):
        for text, record in zip(shards.read(chunk, ("txt",)), shards.read(chunk, ("json",)), strict=True):
            try:
                caption = text.tobytes().decode() if text is not None else json.loads(record.tobytes())["caption"]
            except (UnicodeDecodeError, ValueError, KeyError, TypeError, AttributeError):
                continue
            if isinstance(caption, str):
                yield caption


def evaluate(
    config: RunConfig,
    model: nn.Module,
    tokenizer: Tokenizer,
    sources: Sources,
    device: torch.device,
    progress: Callable[[int, int], None] | None = None,
    *,
    rank: int = 0,
    ranks: int = 1,
) -> Evaluation:
    """Retrieval over the held-out pairs and, where classes are known, zero-shot classification.

    progress(batches done, batches in all) is called during each of the two passes. Of several ranks each encodes its share, and
    all have the result.
    """
    if not sources.heldout:
        raise UserError("data.heldout: nothing to evaluate, expected patterns of tar files")

    def loader(patterns: list[str], with_meta: bool) -> Loader:
        data, size = config.data, config.evaluation.batch_size
        options = {"backend": data.loader, "device": device, "threads": data.threads, "with_meta": with_meta}
        options |= {"rank": rank, "world_size": ranks}
        return make_loader(patterns, data_spec(config), tokenizer, size, train=False, **options)

    batches = loader(sources.heldout, False)
    try:
        features = encode_pairs(model, batches, device, progress, ranks)
    finally:
        batches.close()
    ranked = retrieval(features.image, features.text)
    evaluation = Evaluation(dict(ranked.metrics), Pairs(features, ranked, ShardSet(sources.heldout)), None)
    classes = sources.classes
    if classes is not None:
        batches = loader(classes.patterns, True)
        try:
            features = encode_images(model, batches, device, progress, ranks)
        finally:
            batches.close()
        labels = [_label(record, classes, key) for record, key in zip(features.meta, features.keys, strict=True)]
        length = data_spec(config).text.context_length
        embedded = class_embeddings(model, tokenizer, classes.names, classes.templates, length, device)
        result = zero_shot(features.image, labels, embedded, classes.names)
        evaluation.metrics |= result.metrics
        evaluation.classified = Classified(features, result, ShardSet(classes.patterns))
    return evaluation


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
    classes = None
    if config.evaluation.zero_shot:
        names, templates = emojiworld.class_names(world), emojiworld.templates(world.language)
        classes = ClassSource([patterns["heldout_single"]], names, templates, "label")
    return Sources([patterns["train"]], [patterns["heldout"]], classes)


def _say_progress(title: str) -> Callable[[int, int], None]:
    shown = -1

    def say(done: int, total: int) -> None:
        nonlocal shown
        if done * 10 // total > shown:
            shown = done * 10 // total
            print(f"{title}: {done:,} of {total:,} pictures", file=sys.stderr, flush=True)

    return say


def _class_names(path: str) -> list[str]:
    try:
        names = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"evaluation.class_names: {path} cannot be read: {error}") from error
    if not names or len(set(names)) < len(names):
        raise UserError(f"evaluation.class_names: expected one name a line in {path}, each once, got {len(names)} lines")
    return names


def _label(record: dict[str, Any], classes: ClassSource, key: str) -> int:
    value = record.get(classes.label_field)
    if isinstance(value, str) and value in classes.names:
        return classes.names.index(value)
    if isinstance(value, int) and 0 <= value < len(classes.names):
        return value
    raise UserError(
        f"evaluation.label_field: sample {key} has {classes.label_field!r}: {value!r} in its JSON; "
        f"expected one of the {len(classes.names)} class names, or a number from 0 to {len(classes.names) - 1}"
    )
