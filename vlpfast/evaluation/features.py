"""Runs a model over an evaluation loader and keeps the features, in the loader's order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vlpfast.types import ON_HOST, Batch, EncodesImages, EncodesTexts, Loader, UserError

_SIDES = {"image": (EncodesImages, "encode_image"), "text": (EncodesTexts, "encode_text")}


@dataclass
class Features:
    """Row i of every field is the i-th sample of the loader. Pictures are not kept: `index` finds them again in the ShardSet."""

    image: Tensor | None  # [N, D] float32 on the model's device
    text: Tensor | None  # [N, D] likewise
    index: Tensor  # [N] int64 position in the source, on the CPU
    keys: list[str]  # [N]
    meta: list[dict[str, Any]]  # [N], or empty when the loader was not asked for it
    skipped: dict[str, str]  # damaged samples the loader left out -> what was wrong

    def __len__(self) -> int:
        return len(self.keys)


@dataclass
class Collected:
    """What a function made of every sample of a loader, in the loader's order."""

    values: dict[str, Tensor]  # [N, ...]
    index: Tensor  # [N] int64 position in the source, on the CPU
    keys: list[str]  # [N]
    meta: list[dict[str, Any]]  # [N], or empty when the loader was not asked for it
    skipped: dict[str, str]  # damaged samples the loader left out -> what was wrong


def encode_pairs(
    model: nn.Module,
    loader: Loader,
    device: torch.device | str,
    progress: Callable[[int, int], None] | None = None,
    ranks: int = 1,
) -> Features:
    """Pictures and captions of one pass over `loader`. `progress(batches done, batches in all)` is called after each batch. The
    model runs in eval mode without gradients, and every module is put back into the mode it was in.

    ranks: of the process group, each of which has a loader of its share of the samples (make_loader's rank and world_size) and
    makes the same call; all get the features of all samples. Every rank runs the model equally often.

    Raises TypeError when the model lacks encode_image or encode_text, ValueError when the batches lack a field, UserError when
    there is no sample or a feature is not finite."""
    return _encode(model, loader, device, progress, ranks, ("image", "text"))


def encode_images(
    model: nn.Module,
    loader: Loader,
    device: torch.device | str,
    progress: Callable[[int, int], None] | None = None,
    ranks: int = 1,
) -> Features:
    """encode_pairs for the pictures alone (`text` is None): what zero-shot classification needs."""
    return _encode(model, loader, device, progress, ranks, ("image",))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """eval mode and inference mode; afterwards each module is in the mode it was in, also where a part had its own."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def require(model: nn.Module, side: str) -> None:
    """TypeError unless the model encodes this side ("image" or "text")."""
    protocol, method = _SIDES[side]
    if not isinstance(model, protocol):
        raise TypeError(f"model: {type(model).__name__} has no method {method}, which this evaluation needs")


def collect(
    model: nn.Module,
    loader: Loader,
    device: torch.device | str,
    make: Callable[[Batch], dict[str, Tensor]],
    progress: Callable[[int, int], None] | None = None,
    ranks: int = 1,
) -> Collected:
    """make(batch) of every batch of one pass, put together: its tensors have a row for each sample and shapes that do not depend
    on the batch. Everything else as for encode_pairs; the batch's tensors are on `device` but for those of types.ON_HOST."""
    parts: list[dict[str, Tensor]] = []
    index, keys, meta = [], [], []
    with evaluating(model):
        for batch, again in _equally_often(loader, ranks, torch.device(device)):
            made = make({key: _moved(key, value, device) for key, value in batch.items()})
            if again:
                continue
            parts.append(made)
            index.append(batch["index"].cpu())
            keys.extend(batch["key"])
            meta.extend(batch.get("meta", ()))
            if progress is not None:
                progress(len(index), len(loader))
        if not keys:
            raise UserError("nothing to evaluate: the data hold no usable sample")
        joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}  # [N, ...]
        places, skipped = torch.cat(index), dict(loader.skipped)
        if ranks > 1:
            joined, places, keys, meta, skipped = _of_all(joined, places, keys, meta, skipped, ranks, device)
    return Collected(joined, places, keys, meta, skipped)


def _moved(key: str, value: Any, device: torch.device | str) -> Any:
    return value.to(device, non_blocking=True) if isinstance(value, Tensor) and key not in ON_HOST else value


def _encode(model, loader, device, progress, ranks: int, sides: tuple[str, ...]) -> Features:
    for side in sides:
        require(model, side)
    made = collect(
        model, loader, device, lambda batch: {side: _encode_batch(model, batch, side) for side in sides}, progress, ranks
    )
    for side, rows in made.values.items():
        finite = rows.isfinite().all(1)  # [N]
        if not finite.all():
            bad = (~finite).nonzero().flatten().tolist()
            raise UserError(
                f"the model gives {side} features that are not finite for {len(bad)} of {len(made.keys)} samples "
                f"(first: {made.keys[bad[0]]}); did the training diverge?"
            )
    return Features(made.values["image"], made.values.get("text"), made.index, made.keys, made.meta, made.skipped)


def _equally_often(loader: Loader, ranks: int, device: torch.device) -> Iterator[tuple[Batch, bool]]:
    """Batches, and whether this one is there again, to no purpose but that a model spread over ranks runs on all of them."""
    last = None
    batches = iter(loader)
    while True:
        batch = next(batches, None)
        if ranks > 1:
            some = torch.tensor(float(batch is not None), device=device)
            dist.all_reduce(some)
            if not some:
                return
        elif batch is None:
            return
        if batch is None and last is None:
            raise UserError("nothing to evaluate on this rank: the data hold fewer usable samples than there are ranks")
        yield (batch or last), batch is None
        last = batch or last


def _of_all(joined, places, keys, meta, skipped, ranks: int, device) -> tuple:
    """The same of all ranks, in the order of places."""
    found: list[Any] = [None] * ranks
    dist.all_gather_object(found, ({side: rows.cpu() for side, rows in joined.items()}, places, keys, meta, skipped))
    order = torch.cat([one[1] for one in found]).argsort()
    together = {side: torch.cat([one[0][side] for one in found])[order].to(device) for side in joined}
    every_key, every_meta = ([item for one in found for item in one[field]] for field in (2, 3))
    return (
        together,
        torch.cat([one[1] for one in found])[order],
        [every_key[place] for place in order.tolist()],
        [every_meta[place] for place in order.tolist()] if every_meta else [],
        {name: reason for one in found for name, reason in one[4].items()},
    )


def _encode_batch(model: nn.Module, batch: Batch, side: str) -> Tensor:
    if side not in batch:
        raise ValueError(f"loader: its batches have no field {side!r}, only {sorted(batch)}")
    if side == "image":
        return model.encode_image(batch["image"]).float()  # [B, D]
    return model.encode_text(batch["text"], batch.get("text_mask")).float()  # [B, D]
