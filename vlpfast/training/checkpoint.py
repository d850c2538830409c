"""Checkpoints: written aside, checked, renamed; the newest one that is whole is found again.

checkpoints/step-00000500/
    *.distcp, .metadata   tensors of the model, the optimiser and the average by name, in torch.distributed.checkpoint's format
    state.json            everything else: position, model, and for each process its random generators and its loader
    manifest.json         size and CRC-32 of every other file; written last

A checkpoint is written into a folder whose name ends in `.tmp` and renamed when every byte is on the disk, so a folder named
step-N was whole when it appeared. What has happened to it since, the manifest shows.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import warnings
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException

from vlpfast.training.config import differences
from vlpfast.types import UserError

FORMAT = 1
_NAME = re.compile(r"step-(\d+)")


def save(
    folder: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    keep: int,
    more: Mapping[str, Tensor],
) -> Path:
    """Writes folder/step-N with `state` (plain JSON values) beside the tensors, then removes all but the newest `keep`.

    more: tensors beside those of the model and the optimiser, under the names that they are to have there (ema.NAME).
    UserError: the disk is full or cannot be written. The half-written folder is removed, earlier checkpoints are as they were.
    """
    final = folder / f"step-{step:08d}"
    aside = folder / f"{final.name}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        with _one_process():
            tensors = {**_model_tensors(model), **_optimizer_tensors(model, optimizer), **more}
            dcp.save(tensors, storage_writer=dcp.FileSystemWriter(aside))  # it calls fsync on its files
        _write_json(aside / "state.json", {"format": FORMAT, "step": step, **state})
        _write_json(aside / "manifest.json", {path.name: _fingerprint(path) for path in sorted(aside.iterdir())})
        _sync_folder(aside)
        os.rename(aside, final)
        _sync_folder(folder)
    except (OSError, CheckpointException) as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise UserError(
            f"checkpoint {final} could not be saved: {_reason(error)}; the earlier checkpoints are untouched: "
            "make room and start again with the same train.run_dir"
        ) from error
    for _, old in _finished(folder)[keep:]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def find_newest(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint, and a sentence about each half-written or damaged one that was passed over.

    UserError: there are finished checkpoints and none of them is whole. Starting afresh would be a loss that nobody asked for.
    """
    notes = [f"{path} is half-written: passed over" for path in sorted(folder.glob("step-*.tmp"))]
    for _, path in _finished(folder):
        damage = damaged(path)
        if not damage:
            return path, notes
        notes.append(f"{path} is damaged ({damage}): passed over")
    if _finished(folder):
        listed = "; ".join(note.removesuffix(": passed over") for note in notes)
        raise UserError(f"no checkpoint in {folder} is whole: {listed}. Move that folder away to start from the beginning")
    return None, notes


def set_aside(folder: Path, newest: Path | None) -> None:
    """Removes half-written checkpoints and renames damaged ones newer than `newest` to *.damaged, out of the way of new ones."""
    for path in folder.glob("step-*.tmp"):
        shutil.rmtree(path)
    for _, path in _finished(folder):
        if path == newest:
            return
        shutil.rmtree(path.with_suffix(".damaged"), ignore_errors=True)
        path.rename(path.with_suffix(".damaged"))


def damaged(path: Path) -> str:
    """What is wrong with a checkpoint; "" if every file is there with its size and CRC-32."""
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        for name, expected in manifest.items():
            size = (path / name).stat().st_size
            if size != expected["size"]:
                return f"{name} has {size:,} of {expected['size']:,} bytes"
            if _fingerprint(path / name) != expected:
                return f"{name} has another checksum than when it was written"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        return f"manifest.json cannot be read: {error}"
    return ""


def read_state(path: Path, described: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint says beside its tensors.

    described: the model section of the configuration. UserError: the checkpoint holds another model; names the first differences.
    """
    state = json.loads((path / "state.json").read_text())
    if state["format"] != FORMAT:
        raise UserError(f"{path} has checkpoint format {state['format']}; this version reads format {FORMAT}")
    different = differences(state["model"], described)
    if different:
        raise UserError(f"{path} holds another model than the configuration describes: {'; '.join(different[:5])}")
    return state


def load(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, more: Mapping[str, Tensor]) -> None:
    """Fills the model, the optimiser and `more` (as in save) from a whole checkpoint. UserError: names or shapes do not fit."""
    _load_model(path, model)
    _load_optimizer(path, model, optimizer)
    stored = dict(_stored(path))
    for name, tensor in more.items():
        if name not in stored or stored[name].size != tensor.shape:
            raise UserError(f"{path} has no {name} of shape {list(tensor.shape)}: was train.ema_decay set when it was saved?")
    with _one_process():
        dcp.load(dict(more), storage_reader=dcp.FileSystemReader(path))


def load_weights(source: str | Path, model: nn.Module) -> str:
    """Fills the model from a run folder (its newest whole checkpoint), a checkpoint or a .safetensors file; returns which.

    Where a checkpoint has an average of a weight (train.ema_decay), that is what the model gets, as model.safetensors does.
    If the model has a method `convert(state_dict) -> state_dict`, it puts the tensors of a .safetensors file under its own names.
    UserError: nothing to load there, or names or shapes do not fit the model.
    """
    path = Path(source)
    if path.is_dir():
        if not _NAME.fullmatch(path.name):
            newest, _ = find_newest(path / "checkpoints")
            if newest is None:
                raise UserError(
                    f"{path}: expected a run folder with checkpoints, a checkpoint or a .safetensors file; it has no checkpoint"
                )
            path = newest
        elif damaged(path):
            raise UserError(f"{path} is damaged: {damaged(path)}")
        _load_model(path, model)
        _load_averages(path, model)
        return str(path)
    try:
        tensors = load_file(path)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file or folder") from error
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: is not a whole .safetensors file: {error}") from error
    if hasattr(model, "convert"):
        tensors = model.convert(tensors)
    _check_fit(path, {name: tensor.shape for name, tensor in tensors.items()}, model)
    model.load_state_dict(tensors)
    return str(path)


def export(model: nn.Module, path: Path) -> None:
    """The model's state as a .safetensors file, written aside and renamed."""
    # Copies: tied weights share memory, which the format does not allow.
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in model.state_dict().items()}
    aside = path.with_suffix(".tmp")
    try:
        save_file(tensors, aside, metadata={"format": "pt"})
        os.replace(aside, path)
    except (OSError, SafetensorError) as error:
        aside.unlink(missing_ok=True)
        raise UserError(f"{path} could not be saved: {_reason(error)}") from error


@contextmanager
def _one_process() -> Iterator[None]:
    """Without a process group torch saves and loads in this process alone, which is meant, and warns about it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _model_tensors(model: nn.Module) -> dict[str, Tensor]:
    return {f"model.{name}": tensor for name, tensor in model.state_dict().items()}


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    # Keyed by parameter name, not by position: the same file whatever the order of groups, and one that many processes can write
    # together. Learning rates and decays follow from the configuration and are not stored.
    return {
        f"optimizer.{key}.{name}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def _load_model(path: Path, model: nn.Module) -> None:
    stored = {name.removeprefix("model."): entry.size for name, entry in _stored(path) if name.startswith("model.")}
    _check_fit(path, stored, model)
    with _one_process():
        dcp.load(_model_tensors(model), storage_reader=dcp.FileSystemReader(path))


def _load_averages(path: Path, model: nn.Module) -> None:
    stored = {name for name, _ in _stored(path)}
    averages = {f"ema.{name}": p.data for name, p in model.named_parameters() if f"ema.{name}" in stored}
    with _one_process():
        dcp.load(averages, storage_reader=dcp.FileSystemReader(path))


def _load_optimizer(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    tensors: dict[str, Tensor] = {}
    optimizer.state.clear()
    for entry_name, entry in _stored(path):
        if entry_name.startswith("optimizer."):
            _, key, name = entry_name.split(".", 2)
            if name not in parameters:
                raise UserError(f"{path} has optimiser state for {name!r}, which this configuration does not train")
            parameter = parameters[name]
            if entry.size == parameter.shape:
                tensor = torch.zeros_like(parameter, dtype=entry.properties.dtype, requires_grad=False)
            else:
                tensor = torch.zeros(entry.size, dtype=entry.properties.dtype, device=parameter.device)
            optimizer.state[parameter][key] = tensors[entry_name] = tensor
    with _one_process():
        dcp.load(tensors, storage_reader=dcp.FileSystemReader(path))


def _stored(path: Path) -> Iterator[tuple[str, Any]]:
    return iter(dcp.FileSystemReader(path).read_metadata().state_dict_metadata.items())


def _check_fit(path: Path, stored: dict[str, torch.Size], model: nn.Module) -> None:
    own = {name: tensor.shape for name, tensor in model.state_dict().items()}
    problems = [f"lacks {name}" for name in own if name not in stored]
    problems += [f"has {name}, which the model has not" for name in stored if name not in own]
    problems += [
        f"{name} has shape {list(stored[name])} where the model has {list(own[name])}"
        for name in own
        if name in stored and tuple(stored[name]) != tuple(own[name])
    ]
    if problems:
        more = f", and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise UserError(f"{path} does not fit {type(model).__name__}: it {'; it '.join(problems[:5])}{more}")


def _finished(folder: Path) -> list[tuple[int, Path]]:
    """Finished checkpoints, newest first."""
    found = [(int(match[1]), path) for path in folder.glob("step-*") if (match := _NAME.fullmatch(path.name))]
    return sorted(found, reverse=True)


def _fingerprint(path: Path) -> dict[str, int]:
    crc, size = 0, 0
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            crc = zlib.crc32(block, crc)
            size += len(block)
    return {"size": size, "crc32": crc}


def _write_json(path: Path, value: dict[str, Any]) -> None:
    with open(path, "w") as file:
        json.dump(value, file)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    if sys.platform == "win32":  # folders cannot be opened there
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _reason(error: BaseException) -> str:
    """The system's words (no space left on device), which torch reports as the context of an error of its own."""
    nested = [failure[0] for failure in error.failures.values()] if isinstance(error, CheckpointException) else [error]
    cause: BaseException | None = nested[0]
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__cause__ or cause.__context__
    return str(nested[0]) or type(nested[0]).__name__
