"""Batches larger than memory: features are made in parts, the loss once, gradients in parts again.

Gao et al. 2021, "Scaling deep contrastive learning batch size under memory limited setup" (GradCache), with one evaluation of the
loss for all parts: what a model's `encode` gives is made without a graph, `contrast` gives the losses of all features and their
gradients, then each part is encoded again, with the same random numbers, and takes its features' gradients down. The result is
that of the undivided batch to rounding; memory is that of one part and of the features. It costs one forward more.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from vlpfast.training.parallel import Spread
from vlpfast.types import Batch, UserError


def backward(
    spread: Spread,
    batch: Batch,
    size: int,
    total: Callable[[dict[str, Tensor]], Tensor],
    autocast: Callable[[], AbstractContextManager],
) -> tuple[Tensor, dict[str, Tensor]]:
    """Adds the gradients of a batch, encoded `size` samples at a time, to the parameters'; returns loss and losses, detached.

    total(losses) -> what is differentiated, 0-d. autocast: the precision of forwards. All ranks have as many parts. Features
    that are no floating numbers (ids) reach `contrast` put together, as the others do, and have no gradient.
    """
    parts = divide(batch, size)
    states, made = [], []
    with torch.no_grad(), autocast():
        for part in parts:
            states.append(_random_state(spread.world.device))
            made.append(spread.unaveraged("encode", part))
    features = {
        key: torch.cat([one[key] for one in made]).requires_grad_(value.is_floating_point()) for key, value in made[0].items()
    }
    made.clear()
    with spread.accumulating():
        with autocast():
            losses = spread.unaveraged("contrast", features)
            loss = total(losses)
        loss.backward()
    grads = {key: value.grad.split(size) for key, value in features.items() if value.grad is not None}
    for number, (part, state) in enumerate(zip(parts, states, strict=True)):
        _set_random_state(state, spread.world.device)
        with spread.accumulating() if number + 1 < len(parts) else nullcontext():
            with autocast():
                encoded = spread.unaveraged("encode", part)
            pairs = [(encoded[key], grad[number]) for key, grad in grads.items() if encoded[key].requires_grad]
            if pairs:  # what encodes may be frozen
                torch.autograd.backward(*zip(*pairs, strict=True))
    return loss.detach(), {key: value.detach() for key, value in losses.items()}


def divide(batch: Batch, size: int) -> list[Batch]:
    """The fields of a batch, tensors [B, ...] and lists [B], in parts of `size` samples; the last may be smaller.

    UserError: it has rows that are not one for each sample (TextSpec.every, packed documents).
    """
    for key in batch:
        if key.endswith("_of") or key == "cu_seqlens":
            raise UserError(f"train.micro_batch: expected a row for each sample in every field of a batch, {key} is there; use 0")
    count = next(len(value) for value in batch.values())
    starts = range(0, count, size)
    return [{key: value[start : start + size] for key, value in batch.items()} for start in starts]  # type: ignore[misc]


def _random_state(device: torch.device) -> list[Any]:
    return [torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None]


def _set_random_state(state: list[Any], device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)
