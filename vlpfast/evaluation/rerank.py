"""Retrieval in two stages: inner products choose candidates, a network that reads picture and text together orders them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vlpfast.evaluation.features import evaluating
from vlpfast.evaluation.retrieval import Ids, Retrieval, _codes, rank
from vlpfast.types import Loader, ScoresPairs, UserError


@dataclass
class States:
    """What `score_pairs` reads, of every sample, in the order of the loader; on the CPU."""

    image: Tensor  # [N, T, C]
    text: Tensor  # [N, L, C]
    text_mask: Tensor  # [N, L] bool


def encode_states(
    model: nn.Module, loader: Loader, device: torch.device | str, progress: Callable[[int, int], None] | None = None
) -> States:
    """One pass over `loader`, whose batches have pictures and captions. TypeError: the model lacks the methods of ScoresPairs."""
    if not isinstance(model, ScoresPairs):
        raise TypeError(f"model: {type(model).__name__} has no methods image_states, text_states and score_pairs")
    image, text, mask = [], [], []
    with evaluating(model):
        for batch in loader:
            own = batch["text_mask"].to(device)
            image.append(model.image_states(batch["image"].to(device)).cpu())
            text.append(model.text_states(batch["text"].to(device), own).cpu())
            mask.append(own.cpu())
            if progress is not None:
                progress(len(mask), len(loader))
    if not mask:
        raise UserError("nothing to evaluate: the data hold no usable sample")
    return States(torch.cat(image), torch.cat(text), torch.cat(mask))


def two_stage_retrieval(
    model: nn.Module,
    states: States,
    image: Tensor,
    text: Tensor,
    device: torch.device | str,
    *,
    candidates: int = 128,
    image_ids: Ids | None = None,
    text_ids: Ids | None = None,
    pairs: int = 256,
    ranks: int = 1,
    rank_of: int = 0,
    top: int = 5,
    progress: Callable[[int, int], None] | None = None,
) -> Retrieval:
    """As `retrieval`, but the `candidates` best of each query by inner product are ordered by `score_pairs` (ALBEF, BLIP).

    states: of the N pictures and M texts; image [N, D], text [M, D] their features. Ids as for `retrieval`. pairs: scored at a
    time. ranks, rank_of: of the process group and this process's number; each scores its share of the queries, all call this
    with the same arguments and get the whole result. progress(queries done, queries in all of this process)."""
    if candidates < 1 or pairs < 1:
        raise ValueError(f"candidates and pairs: expected at least 1, got {candidates} and {pairs}")
    if len(states.image) != len(image) or len(states.text) != len(text):
        got = f"{len(states.image)} and {len(states.text)}"
        raise ValueError(f"states: expected those of {len(image)} pictures and {len(text)} texts, got {got}")
    if image_ids is None or text_ids is None:
        if len(image) != len(text) or image_ids is not text_ids:
            raise ValueError("image_ids and text_ids: expected both, or none of them and as many pictures as texts")
        image_ids = text_ids = torch.arange(len(image))
    image_codes, text_codes = _codes(image_ids, text_ids)

    def score(texts: Tensor, images: Tensor) -> Tensor:
        chosen = (states.image[images], states.text[texts], states.text_mask[texts])
        return model.score_pairs(*(part.to(device, non_blocking=True) for part in chosen)).float()

    def direction(queries: Tensor, others: Tensor, query_codes: Tensor, other_codes: Tensor, to_images: bool):
        count = min(candidates, len(others))
        mine = torch.arange(-(-len(queries) // ranks)) * ranks + rank_of  # as many for every process
        mine = mine.clamp(max=len(queries) - 1)
        places = torch.cat([(queries[rows] @ others.T).topk(count).indices.cpu() for rows in mine.split(1024)])  # [q, K]
        found = []
        at_once = max(1, pairs // count)
        for rows, found_places in zip(mine.split(at_once), places.split(at_once), strict=True):
            asked = rows[:, None].expand_as(found_places).flatten()
            scored = [
                score(a, b) if to_images else score(b, a)
                for a, b in zip(asked.split(pairs), found_places.flatten().split(pairs), strict=True)
            ]
            found.append(torch.cat(scored).view(len(rows), count).cpu())
            if progress is not None:
                progress(sum(map(len, found)), len(mine))
        scores = torch.cat(found)
        if ranks > 1:
            parts: list = [None] * ranks
            dist.all_gather_object(parts, (mine, places, scores))
            mine, places, scores = (torch.cat(part) for part in zip(*parts, strict=True))
            every = torch.empty(len(queries), dtype=torch.int64).scatter_(0, mine, torch.arange(len(mine)))
            places, scores = places[every], scores[every]
        names = ("text", "image") if to_images else ("image", "text")
        return rank(queries, others, query_codes, other_codes, ks=(1, 5, 10), top=top, names=names, second=(places, scores))

    with evaluating(model):
        return Retrieval(
            text_to_image=direction(text, image, text_codes, image_codes, True),
            image_to_text=direction(image, text, image_codes, text_codes, False),
        )
