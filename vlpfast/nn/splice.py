"""Visual tokens in the place of a text's placeholders, and rows cut and padded anew: no loop over rows, no wait for a GPU."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vlpfast.ops import debug


class Spliced(NamedTuple):
    """Rows padded at their ends."""

    embeds: Tensor  # [B, T, C]
    mask: Tensor  # [B, T] bool, True = token
    labels: Tensor | None  # [B, T] int64, -100 at visual tokens and padding


def splice(visual: Tensor, embeds: Tensor, mask: Tensor, labels: Tensor | None = None, slots: Tensor | None = None) -> Spliced:
    """Puts visual tokens before a text, or into it.

    Args:
        visual: [B, V, C], put before the text; with slots [B, S, V, C], V tokens for each of S placeholders.
        embeds: [B, L, C] of a text whose padding is at the ends, mask [B, L] bool, labels [B, L] int64.
        slots: [B, L] bool, a row's placeholders: the s-th of them gives way to visual[:, s]. A row may have fewer than S; then
            the other visual tokens go nowhere. More are a ValueError where their number can be looked at; elsewhere they stay
            what they were.

    Returns T = V + L columns, with slots L + S (V - 1).
    """
    if labels is not None and labels.shape != mask.shape:
        raise ValueError(f"labels: expected {list(mask.shape)} as mask, got {list(labels.shape)}")
    if slots is None:
        if visual.ndim != 3 or visual.shape[::2] != embeds.shape[::2]:
            raise ValueError(f"visual: expected [B, V, C] beside embeds {list(embeds.shape)}, got {list(visual.shape)}")
        joined = torch.cat((visual.to(embeds.dtype), embeds), dim=1)
        front = mask.new_ones(visual.shape[:2])
        if labels is not None:
            labels = torch.cat((labels.new_full(front.shape, -100), labels.masked_fill(~mask, -100)), dim=1)
        return Spliced(joined, torch.cat((front, mask), dim=1), labels)
    if visual.ndim != 4 or visual.shape[::3] != embeds.shape[::2]:
        raise ValueError(f"visual: expected [B, S, V, C] beside embeds {list(embeds.shape)}, got {list(visual.shape)}")
    (batch, count, each), length = visual.shape[:3], embeds.shape[1]
    number = slots.cumsum(1)  # [B, L]
    if debug.readable(slots) and int(number[:, -1:].max()) > count:
        raise ValueError(f"slots: expected at most {count} in a row, as many as visual has, got {int(number[:, -1].max())}")
    slots = slots & (number <= count)
    widths = torch.where(slots, each, 1)
    ends = widths.cumsum(1)  # [B, L] where each token's columns end
    column = torch.arange(length + count * (each - 1), device=mask.device).expand(batch, -1)  # [B, T]
    source = torch.searchsorted(ends, column.contiguous(), right=True).clamp(max=length - 1)  # [B, T] the token of each column
    is_visual = slots.gather(1, source) & (column < ends[:, -1:])
    offset = column - (ends - widths).gather(1, source)  # within its token's columns
    place = ((number.gather(1, source) - 1) * each + offset).masked_fill(~is_visual, 0)  # [B, T] in visual.flatten(1, 2)
    rows = torch.arange(batch, device=mask.device)[:, None]
    joined = torch.where(is_visual[..., None], visual.to(embeds.dtype).flatten(1, 2)[rows, place], embeds[rows, source])
    seen = mask.gather(1, source) & (column < ends[:, -1:])
    if labels is not None:
        labels = labels.gather(1, source).masked_fill(is_visual | ~seen, -100)
    return Spliced(joined, seen, labels)


def left_padded(embeds: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [B, T, C] whose tokens stand at the beginning -> with their tokens at the end. mask [B, T] bool."""
    length = mask.shape[1]
    source = torch.arange(length, device=mask.device) - (length - mask.sum(1, keepdim=True))  # [B, T], < 0: padding
    rows = torch.arange(mask.shape[0], device=mask.device)[:, None]
    return embeds[rows, source.clamp(min=0)], source >= 0


def prompt_length(mask: Tensor, labels: Tensor | None) -> Tensor:
    """Tokens before the first that is asked for, [B, 1] int64: bos and the prompt. Without labels: all but the end token."""
    if labels is None:
        return mask.sum(1, keepdim=True) - 1
    asked = (labels != -100).int()
    first = torch.where(asked.any(1), asked.argmax(1), mask.sum(1))
    return first[:, None]


def cut_answers(labels: Tensor, length: int) -> Tensor:
    """labels [B, L] with -100 behind the first `length` tokens that are asked for: InstructBLIP's cut of long answers."""
    asked = labels != -100
    return labels.masked_fill(asked.cumsum(1) > length, -100)


def answers_alone(labels: Tensor, length: int) -> Tensor:
    """labels [B, L] whose asked tokens stand together -> [B, min(L, length)] with them at the beginning, then -100: what a
    decoder is asked for."""
    length = min(length, labels.shape[1])
    first = (labels != -100).int().argmax(1, keepdim=True)
    place = first + torch.arange(length, device=labels.device)  # [B, length]
    return labels.gather(1, place.clamp(max=labels.shape[1] - 1)).masked_fill(place >= labels.shape[1], -100)
