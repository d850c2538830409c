"""vlpfast-train --dry-run: what a run would take and what it would be fed, without a step and without a run folder."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from vlpfast.cli import assemble
from vlpfast.evaluation.contact_sheet import batch_sheet
from vlpfast.training.config import RunConfig, Stage, stage_train
from vlpfast.training.estimate import as_text, memory, memory_table, parameter_table
from vlpfast.training.flops_count import Speed, prefixed
from vlpfast.training.parallel import Spread, World
from vlpfast.training.precision import autocast_dtype, choose_device
from vlpfast.types import Batch, Progress, Tokenizer, UserError

LOADED = 64  # samples of the first batch that are read at most; a larger one is counted by its shapes


def dry_run(config: RunConfig) -> None:
    """Prints tables of parameters, FLOPs and memory for each stage and writes the first batch's contact sheet, whose path is
    shown. Of torchrun's ranks the first alone speaks. UserError: what a run would complain of when it starts."""
    rank, ranks = (int(os.environ.get(name, default)) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
    if rank:
        return
    world = World(device=choose_device(config.train.device))
    World(0, ranks).share(config.train.batch_size)
    sources = assemble.prepare_data(config)
    with tempfile.TemporaryDirectory(prefix="vlpfast-dry-run-") as folder:
        tokenizers = assemble.build_tokenizers(config, sources.train, Path(folder))
    model = assemble.build_model(config)
    assemble.give_classes(config, model, tokenizers, sources)
    speed = Speed(model, world.device, autocast_dtype(config.train.precision, world.device))
    for number, (name, stage) in enumerate(config.stage_list()):
        with _first_batch(config, sources, tokenizers, world, name, stage) as batch:
            if number == 0 and "cu_seqlens" not in batch:  # packed documents are no rows of pictures
                _write_sheet(batch, config, tokenizers)
            _stage(config, speed, batch, ranks, name, stage)


@contextmanager
def _first_batch(
    config: RunConfig, sources: assemble.Sources, tokenizers: Mapping[str, Tokenizer], world: World, name: str, stage: Stage
) -> Iterator[Batch]:
    wanted = config.train.batch_size
    small = replace(config, train=replace(config.train, batch_size=min(wanted, LOADED)))
    loader = assemble.open_loader(small, sources, tokenizers, world, name, stage)
    try:
        if len(loader) * small.train.batch_size + small.train.batch_size <= wanted:
            raise UserError(f"train.batch_size: expected no more than the samples of stage {name}, got {wanted}")
        yield next(iter(loader))
    finally:
        loader.close()


def _write_sheet(batch: Batch, config: RunConfig, tokenizers: Mapping[str, Tokenizer]) -> None:
    spec = assemble.data_spec(config)
    handle, path = tempfile.mkstemp(prefix="vlpfast-first-batch-", suffix=".png")
    with os.fdopen(handle, "wb") as file:
        file.write(batch_sheet(batch, spec, tokenizers[spec.text.tokenizer] if spec.text is not None else None))
    print(f"the first batch: {path}\n")


def _stage(config: RunConfig, speed: Speed, batch: Batch, ranks: int, name: str, stage: Stage) -> None:
    train = config.train
    samples = train.batch_size // ranks
    count = speed.begin_stage(name, stage, _of_size(batch, samples, speed), Progress(0, config.stage_steps(stage)))
    each_rank = f", {samples:,} on each of {ranks} ranks" if ranks > 1 else ""
    print(f"stage {name}: {config.stage_steps(stage):,} steps of {train.batch_size:,} samples{each_rank}\n")
    if speed.skeleton is None:
        raise UserError(f"{config.model.name} cannot be looked at without a run: {speed.why_not}")
    print(as_text(parameter_table(speed.skeleton.model, count, samples), left=2), end="\n\n")
    if count is None:
        print(f"FLOPs and memory depend on the values of the batch, which are not looked at: {speed.why_not}\n")
        return
    each, step = count.flops / samples, count.flops * ranks
    print(f"FLOPs: {prefixed(each)}FLOP a sample, forward and backward; {prefixed(step)}FLOP a step")
    least = f"{count.flops / speed.peak.flops_per_s:.3g} s"
    print(f"peak: {prefixed(speed.peak.flops_per_s)}FLOP/s ({speed.peak.source}): no step can take less than {least}\n")
    if train.activation_checkpointing:
        Spread(speed.skeleton.model, replace(train, compile="none"), World(device=speed.device))
        count = speed.begin_stage(name, stage, _of_size(batch, samples, speed), Progress(0, config.stage_steps(stage)))
    kept = "inputs of blocks alone" if train.activation_checkpointing else "all"
    parts = f", of {train.micro_batch} samples at a time" if 0 < train.micro_batch < samples else ""
    print(f"memory of a rank, at most (activations kept: {kept}{parts}; without temporaries, the allocator's and CUDA's own)")
    print(
        as_text(memory_table(memory(speed, count, samples, stage_train(config, name, stage), name, stage, ranks)), left=1),
        end="\n\n",
    )


def _of_size(batch: Batch, samples: int, speed: Speed) -> Batch:
    """Shapes of so many samples, with as many rows for each as here (TextSpec.every)."""
    if speed.skeleton is None:
        return batch
    loaded = len(batch["text"] if "cu_seqlens" in batch else batch["index"])
    with speed.skeleton.fake:
        return {
            key: torch.empty((len(value) * samples // loaded, *value.shape[1:]), dtype=value.dtype, device=value.device)
            if isinstance(value, Tensor)
            else (list(value) * (-(-samples // len(value))))[:samples]
            for key, value in batch.items()
        }
