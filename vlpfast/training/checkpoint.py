"""Checkpoints: written aside, checked, renamed; the newest one that is whole is found again.

checkpoints/step-00000500/
    *.distcp, .metadata   tensors of the model, the optimiser and the average by name, in torch.distributed.checkpoint's format:
                          one .distcp file of each process, with its shards of DTensors and its share of what all processes hold
    state.json            everything else: position, model, and for each process its random generators and its loader
    manifest.json         size and CRC-32 of every other file; written last

A checkpoint is written into a folder whose name ends in `.tmp` and renamed when every byte is on the disk, so a folder named
step-N was whole when it appeared. What has happened to it since, the manifest shows.

Where a process group exists, every process calls these functions, and all of them return or all raise: none waits for one
that has failed. Any number of processes reads what any other number wrote. A tensor that is no DTensor is taken to be the same
in every process.
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
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor, distribute_tensor

from vlpfast.training.checkpoint_reader import Reader
from vlpfast.training.config import differences
from vlpfast.training.together import on_all, on_first, rank, reason
from vlpfast.types import PeerError, UserError

FORMAT = 1
_NAME = re.compile(r"step-(\d+)")


def save(
    folder: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    keep: int,
    group: dist.ProcessGroup | None = None,
    more: Mapping[str, Tensor] | None = None,
) -> Path:
    """Writes folder/step-N with `state` (plain JSON values) beside the tensors, then removes all but the newest `keep`.

    more: tensors beside those of the model and the optimiser, under the names that they are to have there (ema.NAME).
    With several processes `state` is that of process 0; group: what they agree through, if not the default one.
    UserError: the disk is full or cannot be written, for any process. The half-written folder is removed, earlier checkpoints
    are as they were.
    """
    return write(folder, step, collect(model, optimizer, more), encode(step, state), keep, group)


def find_newest(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint, and a sentence about each half-written or damaged one that was passed over.

    Newest by step: clocks do not matter. Process 0 looks for all.
    UserError: there are finished checkpoints and none of them is whole. Starting afresh would be a loss that nobody asked for.
    """
    return on_first(lambda: _find_newest(folder))


def _find_newest(folder: Path) -> tuple[Path | None, list[str]]:
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
    """Removes half-written and half-removed checkpoints, and renames damaged ones newer than `newest` to *.damaged, out of the
    way of new ones."""
    on_first(lambda: _set_aside(folder, newest))


def _set_aside(folder: Path, newest: Path | None) -> None:
    for path in (*folder.glob("step-*.tmp"), *folder.glob("step-*.old")):
        shutil.rmtree(path)
    for _, path in _finished(folder):
        if path == newest:
            return
        shutil.rmtree(path.with_suffix(".damaged"), ignore_errors=True)
        path.rename(path.with_suffix(".damaged"))


def _remove(path: Path) -> None:
    """Renamed first: what a kill leaves of it must not look like a checkpoint."""
    old = path.with_suffix(".old")
    shutil.rmtree(old, ignore_errors=True)
    with suppress(OSError):  # the new checkpoint is there, which counts
        path.rename(old)
        shutil.rmtree(old)


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


def load(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, more: Mapping[str, Tensor] | None = None) -> None:
    """Fills the model, the optimiser and `more` (as in save) from a whole checkpoint. UserError: names or shapes do not fit."""
    _load_model(path, model)
    _load_optimizer(path, model, optimizer)
    stored = dict(_stored(path))
    for name, tensor in (more or {}).items():
        if name not in stored or stored[name].size != tensor.shape:
            raise UserError(f"{path} has no {name} of shape {list(tensor.shape)}: was train.ema_decay set when it was saved?")
    _read(path, dict(more or {}))


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
        elif damage := on_first(lambda: damaged(path)):
            raise UserError(f"{path} is damaged: {damage}")
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
    for name, own in model.state_dict().items():
        if isinstance(own, DTensor):  # every process has read the whole file: it takes its own part, and nothing is sent
            whole = tensors[name].to(own.device)
            tensors[name] = distribute_tensor(whole, own.device_mesh, own.placements, src_data_rank=None)
    model.load_state_dict(tensors)
    return str(path)


def export(model: nn.Module, path: Path) -> None:
    """The model's state as a .safetensors file, written aside and renamed by process 0, which gathers DTensors for it."""
    tensors = {}
    for name, tensor in model.state_dict().items():
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if rank() == 0:
            # Copies: tied weights share memory, which the format does not allow.
            tensors[name] = whole.detach().cpu().contiguous().clone()
    on_first(lambda: _export(tensors, path))


def _export(tensors: dict[str, Tensor], path: Path) -> None:
    aside = path.with_suffix(".tmp")
    try:
        save_file(tensors, aside, metadata={"format": "pt"})
        os.replace(aside, path)
    except (OSError, SafetensorError) as error:
        aside.unlink(missing_ok=True)
        raise UserError(f"{path} could not be saved: {reason(error)}") from error


def write(
    folder: Path,
    step: int,
    tensors: dict[str, Tensor],
    state: str,
    keep: int,
    group: dist.ProcessGroup | None,
    planner: dcp.DefaultSavePlanner | None = None,
) -> Path:
    """save, from what collect and encode give. planner: where the bytes come from, if not from the tensors; on the host then."""
    final = folder / f"step-{step:08d}"
    aside = folder / f"{final.name}.tmp"

    def make_aside() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()

    def write_tensors() -> dict[str, Any]:
        ahead = 10_000_000 if planner is None else 0  # bytes on their way from a GPU, for which its stream is waited for
        with _one_process():
            # It calls fsync on its files.
            writer = dcp.FileSystemWriter(aside, per_thread_copy_ahead=ahead)
            dcp.save(tensors, storage_writer=writer, planner=planner, process_group=group)
        return {path.name: _fingerprint(path) for path in aside.glob(f"__{rank()}_*")}

    def finish() -> None:
        for writer, part in enumerate(parts):
            for name, written in part.items():
                if not (aside / name).exists() or (aside / name).stat().st_size != written["size"]:
                    raise UserError(
                        f"process 0 does not find {name} of process {writer} in {aside}: train.run_dir has to lie on a file "
                        "system that all machines share"
                    )
        _write_text(aside / "state.json", state)
        prints = {name: written for part in parts for name, written in part.items()}
        for path in aside.iterdir():
            if path.name not in prints:
                prints[path.name] = _fingerprint(path)
        _write_text(aside / "manifest.json", json.dumps(dict(sorted(prints.items()))))
        _sync_folder(aside)
        os.rename(aside, final)
        _sync_folder(folder)
        for _, old in _finished(folder)[keep:]:
            _remove(old)

    try:
        on_first(make_aside, group)
        parts = on_all(write_tensors, group)
        on_first(finish, group)
    except (OSError, CheckpointException, UserError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        told = isinstance(error, PeerError) or (isinstance(error, CheckpointException) and rank() not in error.failures)
        raise (PeerError if told else UserError)(
            f"checkpoint {final} could not be saved: {reason(error)}; the earlier checkpoints are untouched: "
            "make room and start again with the same train.run_dir"
        ) from error
    return final


def encode(step: int, state: dict[str, Any]) -> str:
    """What state.json will hold. TypeError: a value that JSON has not."""
    return json.dumps({"format": FORMAT, "step": step, **state})


@contextmanager
def _one_process() -> Iterator[None]:
    """Without a process group torch saves and loads in this process alone, which is meant, and warns about it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def collect(model: nn.Module, optimizer: torch.optim.Optimizer, more: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name, themselves. TypeError: a state of the optimiser that could not be put back."""
    # The model first: FSDP2 puts its shards back in place of whole parameters when it is asked for a state_dict.
    return {**_model_tensors(model), **_optimizer_tensors(model, optimizer), **(more or {})}


def _model_tensors(model: nn.Module) -> dict[str, Tensor]:
    return {f"model.{name}": tensor for name, tensor in model.state_dict().items()}


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    # Keyed by parameter name, not by position: the same file whatever the order of groups, and one that many processes can write
    # together. Learning rates and decays follow from the configuration and are not stored.
    tensors = {}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            if not isinstance(value, Tensor) or (isinstance(value, DTensor) and value.shape != parameter.shape):
                raise TypeError(
                    f"optimizer.state[{name!r}][{key!r}]: expected a tensor, and a DTensor only of its parameter's shape "
                    f"{list(parameter.shape)}, got {type(value).__name__} {list(getattr(value, 'shape', []))}"
                )
            tensors[f"optimizer.{key}.{name}"] = value
    return tensors


def _load_model(path: Path, model: nn.Module) -> None:
    stored = {name.removeprefix("model."): entry.size for name, entry in _stored(path) if name.startswith("model.")}
    _check_fit(path, stored, model)
    _read(path, _model_tensors(model))


def _load_averages(path: Path, model: nn.Module) -> None:
    stored = {name for name, _ in _stored(path)}
    averages = {f"ema.{name}": p.data for name, p in model.named_parameters() if f"ema.{name}" in stored}
    _read(path, averages)


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
    _read(path, tensors)


def _read(path: Path, tensors: dict[str, Tensor]) -> None:
    """Fills the tensors, or the parts that this process has of DTensors."""
    try:
        with _one_process():
            dcp.load(tensors, storage_reader=Reader(path))
    except CheckpointException as error:  # a BaseException, which no caller expects
        raise UserError(f"{path} cannot be read: {reason(error)}") from error


def _stored(path: Path) -> Iterator[tuple[str, TensorStorageMetadata]]:
    return iter(Reader(path).read_metadata().state_dict_metadata.items())


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


def _write_text(path: Path, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)
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
