"""Weights of TCL and ALBEF under their official names, and of one model of this family for another."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from vlpfast.nn.bert_convert import convert_bert, convert_lm_head
from vlpfast.nn.vit import convert_timm, resize_positions
from vlpfast.types import UserError

if TYPE_CHECKING:
    from vlpfast.hosts.albef import Distilled

StateDict = Mapping[str, Tensor]

ONLINE, COPY = "online.", "momentum.module."  # where a model has its network and the momentum copy of it
_TEXT_LAYER = re.compile(r"text\.layers\.(\d+)\.(.*)")
_OFFICIAL = {  # beginnings of official names -> what they stand for under "online."; with _m behind the first word, the copy's
    "visual_encoder": "vision.",
    "text_encoder": "text.",
    "text_decoder": "decoder.",
    "vision_proj": "image_projection.",
    "text_proj": "text_projection.",
    "cls_head": "head.",
    "ta_head": "assign_head.",
}
_OFFICIAL_STATE = {  # name -> name here, and how the tensor becomes ours
    "temp": ("temperature", lambda t: t),
    "itm_head.weight": ("itm_head.weight", lambda t: t),
    "itm_head.bias": ("itm_head.bias", lambda t: t),
    "image_queue": ("queue.image", lambda t: t.T.contiguous()),  # [D, K] there
    "text_queue": ("queue.text", lambda t: t.T.contiguous()),
    "idx_queue": ("queue.ids", lambda t: t.flatten()),
    "queue_ptr": ("queue.pointer", lambda t: t.reshape(())),
}


@dataclass(frozen=True)
class Naming:
    """How a model of this family takes the weights of another one."""

    # (model, name under "online.", layers of the BERT it comes from) -> names here, any number. Default: the same one.
    places: Callable[[Distilled, str, int], list[str]] = lambda model, name, layers: [name]
    drop: tuple[str, ...] = ()  # beginnings of names that have no place here; of "online." ones the copy's too
    fresh: tuple[str, ...] = ()  # beginnings of names that the other has not: they keep what they began with


def convert(model: Distilled, state_dict: StateDict) -> dict[str, Tensor]:
    """Weights of the official code, or of a model of this family here -> the whole state of this model.

    Position tables for other picture sizes are resized bicubically. What has no momentum copy gets one that begins as it; queues
    of another size, or that are not all there, begin anew. UserError: what is missing, left over or of another shape, by name.
    """
    own = model.state_dict()
    found = dict(state_dict) if any(name.startswith(ONLINE) for name in state_dict) else _from_official(state_dict, model)
    if set(found) != set(own):
        found = _moved(model, found)
    queue = [name for name in own if name.startswith("queue.")]
    keeps_queue = all(name in found and found[name].shape == own[name].shape for name in queue)
    whole, problems = {}, []
    for name, tensor in own.items():
        other = found.pop(name, None)
        if other is None and name.startswith(COPY):
            other = whole.get(ONLINE + name.removeprefix(COPY))
        if (name in queue and not keeps_queue) or (other is None and _online(name).startswith(model.naming.fresh)):
            other = tensor
        if other is not None and name.endswith("vision.position") and other.shape[1:] == tensor.shape[1:]:
            other = resize_positions(other, model.online.vision.grid, 0 if model.online.vision.class_token is None else 1)
        if other is None:
            problems.append(f"{name} is missing")
        elif other.shape != tensor.shape:
            problems.append(f"{name} has shape {list(other.shape)}, expected {list(tensor.shape)}")
        else:
            whole[name] = other
    problems += [f"{name} has no place in this model" for name in found if not name.startswith("queue.")]
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise UserError(f"weights do not fit this {type(model).__name__}: {'; '.join(problems[:5])}{more}")
    return whole


def _moved(model: Distilled, found: StateDict) -> dict[str, Tensor]:
    """Another model's tensors to where they go in this one."""
    numbers = [int(match[1]) for name in found if (match := _TEXT_LAYER.fullmatch(name.removeprefix(ONLINE)))]
    layers = max(numbers, default=-1) + 1
    moved = {}
    for name, tensor in found.items():
        if _online(name).startswith(model.naming.drop) or (name.startswith(COPY) and not hasattr(model, "momentum")):
            continue
        start = next((start for start in (ONLINE, COPY) if name.startswith(start)), None)
        places = [name] if start is None else [start + p for p in model.naming.places(model, name.removeprefix(start), layers)]
        moved |= dict.fromkeys((place for place in places if not _online(place).startswith(model.naming.drop)), tensor)
    return moved


def _online(name: str) -> str:
    return ONLINE + name.removeprefix(COPY) if name.startswith(COPY) else name


def into_decoder(model: Distilled, name: str, layers: int) -> list[str]:
    """The question encoder is the pre-trained BERT, and the answer decoder begins as its fusion half."""
    match = _TEXT_LAYER.fullmatch(name)
    if match is None:
        return [name, name.replace("text.", "decoder.", 1)] if name.startswith("text.") else [name]
    split = min(model.config.text.cross_attention)
    number = int(match[1])
    return [name, f"decoder.layers.{number - split}.{match[2]}"] if number >= split else [name]


def doubled(model: Distilled, name: str, layers: int) -> list[str]:
    """Each layer that sees a picture becomes two that see two, unless they are two already."""
    match = _TEXT_LAYER.fullmatch(name)
    split = min(model.config.text.cross_attention)
    if match is None or int(match[1]) < split or layers == model.online.text.config.layers:
        return [name]
    first = split + 2 * (int(match[1]) - split)
    return [f"text.layers.{number}.{match[2]}" for number in (first, first + 1)]


def _from_official(state_dict: StateDict, model: Distilled) -> dict[str, Tensor]:
    """The names of TCL's and ALBEF's code, "module." before them or not -> those here."""
    groups: dict[tuple[str, str], dict[str, Tensor]] = {}
    found = {}
    for name, tensor in state_dict.items():
        name = name.removeprefix("module.")
        first, _, rest = name.partition(".")
        base = first.removesuffix("_m")
        if name in _OFFICIAL_STATE:
            own, change = _OFFICIAL_STATE[name]
            found[own] = change(tensor)
        elif base in _OFFICIAL and rest:
            groups.setdefault((base, COPY if first != base else ONLINE), {})[rest] = tensor
        else:
            found[name] = tensor  # has no place: named in the end
    for (base, start), tensors in groups.items():
        if base == "visual_encoder":
            tensors = convert_timm(tensors, model.online.vision.grid)
        elif base in ("text_encoder", "text_decoder"):
            head = {name: tensor for name, tensor in tensors.items() if name.startswith("cls.")}
            rest = {name.removeprefix("bert."): tensor for name, tensor in tensors.items() if name not in head}
            tensors = convert_bert(rest)
            if head:
                found |= {f"{start}mlm_head.{name}": tensor for name, tensor in convert_lm_head(head).items()}
        found |= {f"{start}{_OFFICIAL[base]}{name}": tensor for name, tensor in tensors.items()}
    return found
