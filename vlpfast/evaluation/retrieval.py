"""Retrieval: R@k, median and mean rank, in chunks.

Ties. Candidates with equal scores have no order, so every figure is its expectation when ties are broken at random (McSherry and
Najork, "Computing information retrieval performance measures efficiently in the presence of tied scores", ECIR 2008). A network
that maps everything to one point scores exactly chance; counting ties for the model would give it 100 %. Scores closer than 1e-6
of the largest possible score count as equal: that is the rounding of a product of float32 features, which would otherwise break
the ties of a collapsed network one way or the other.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_TIE = 1e-6
_TILE = 1 << 25  # scores held at once

Ids = Tensor | Sequence[Hashable]


@dataclass
class Ranking:
    """One direction: Q queries against N candidates. All tensors are on the CPU."""

    rank: Tensor  # [Q] float64, 1 = first; where the best positive stands, its expectation when it is tied
    recall: dict[int, Tensor]  # k -> [Q] float64: probability that a positive is among the first k (0 or 1 without ties)
    chance: dict[int, float]  # k -> mean recall of a random order
    best: Tensor  # [Q, top] int64: the candidates with the highest scores, best first
    score: Tensor  # [Q, top] their scores
    right: Tensor  # [Q, top] bool: is it a positive
    positive: Tensor  # [Q] int64: the best-scored positive

    def metrics(self, prefix: str) -> dict[str, float]:
        """{prefix}_R@k and {prefix}_chance_R@k as fractions, {prefix}_median_rank, {prefix}_mean_rank."""
        out = {f"{prefix}_R@{k}": float(hits.mean()) for k, hits in self.recall.items()}
        out[f"{prefix}_median_rank"] = float(np.median(self.rank.numpy()))
        out[f"{prefix}_mean_rank"] = float(self.rank.mean())
        return out | {f"{prefix}_chance_R@{k}": value for k, value in self.chance.items()}


@dataclass
class Retrieval:
    """Both directions. `metrics` holds text_to_image_R@1, ..., image_to_text_mean_rank, ... (Ranking.metrics)."""

    text_to_image: Ranking
    image_to_text: Ranking

    @property
    def metrics(self) -> dict[str, float]:
        return self.text_to_image.metrics("text_to_image") | self.image_to_text.metrics("image_to_text")


def retrieval(
    image: Tensor,
    text: Tensor,
    *,
    ks: Sequence[int] = (1, 5, 10),
    image_ids: Ids | None = None,
    text_ids: Ids | None = None,
    top: int = 5,
    chunk: int = 1024,
) -> Retrieval:
    """Ranks every picture for every text and the other way round, by inner product.

    image [N, D], text [M, D], on one device. Without ids, picture i and text i are the pair (N == M). With image_ids [N] and
    text_ids [M] (integers or any hashable values) a picture and a text belong together when their ids are equal: several captions
    of a picture, several pictures of a caption. A query is right at k when at least one of its positives is among the first k; k
    beyond the number of candidates counts all of them. `top`: how many of the best candidates to keep for each query. `chunk`:
    queries scored at once, fewer when there are many candidates.

    Raises ValueError for empty sides, shapes that do not fit, features that are not finite (naming the side and how many), a text
    without a picture or a picture without a text."""
    for name, rows in (("image", image), ("text", text)):
        if rows.ndim != 2 or 0 in rows.shape:
            raise ValueError(f"{name}: expected features [rows, width], at least one of each, got shape {list(rows.shape)}")
    if image.shape[1] != text.shape[1]:
        raise ValueError(f"image and text: expected the same width, got {image.shape[1]} and {text.shape[1]}")
    if (image_ids is None) != (text_ids is None):
        raise ValueError("image_ids and text_ids: expected both or none of them")
    if image_ids is None:
        if len(image) != len(text):
            raise ValueError(f"expected as many pictures as texts when no ids are given, got {len(image)} and {len(text)}")
        image_ids = text_ids = torch.arange(len(image))
    image_codes, text_codes = _codes(image_ids, text_ids)
    for name, codes, rows in (("image_ids", image_codes, image), ("text_ids", text_codes, text)):
        if codes.shape != rows.shape[:1]:
            raise ValueError(f"{name}: expected {len(rows)} ids, one for each row, got shape {list(codes.shape)}")
    for one, other, codes, known in (("text", "picture", text_codes, image_codes), ("picture", "text", image_codes, text_codes)):
        if lonely := int((~torch.isin(codes, known)).sum()):
            raise ValueError(f"image_ids and text_ids: {lonely} of {len(codes)} {one}s have no {other} of the same id")
    return Retrieval(
        text_to_image=rank(text, image, text_codes, image_codes, ks=ks, top=top, chunk=chunk, names=("text", "image")),
        image_to_text=rank(image, text, image_codes, text_codes, ks=ks, top=top, chunk=chunk, names=("image", "text")),
    )


def rank(
    queries: Tensor,
    candidates: Tensor,
    query_ids: Tensor,
    candidate_ids: Tensor,
    *,
    ks: Sequence[int],
    top: int,
    chunk: int = 1024,
    names: tuple[str, str] = ("queries", "candidates"),
    second: tuple[Tensor, Tensor] | None = None,
) -> Ranking:
    """queries [Q, D], candidates [N, D], query_ids [Q], candidate_ids [N] int64; every query has a candidate of its id.

    second: places [Q, K] int64, of different candidates, and scores [Q, K]: these candidates come first, in the order of these
    scores, and all others behind them in the order of the inner products (rerank.py)."""
    if min(ks, default=0) < 1:
        raise ValueError(f"ks: expected whole numbers from 1 on, got {list(ks)}")
    if top < 1 or chunk < 1:
        raise ValueError(f"top and chunk: expected at least 1, got {top} and {chunk}")
    for name, rows in zip(names, (queries, candidates), strict=True):
        if bad := int((~rows.isfinite().all(1)).sum()):
            raise ValueError(f"{name}: {bad} of {len(rows)} features are not finite")
    queries, candidates = (rows if rows.dtype == torch.float64 else rows.float() for rows in (queries, candidates))
    query_ids, candidate_ids = query_ids.to(queries.device), candidate_ids.to(queries.device)
    tie = _TIE * float(queries.norm(dim=1).max() * candidates.norm(dim=1).max())
    if second is not None:
        if not (finite := second[1].isfinite()).all():
            raise ValueError(f"second: {int((~finite).sum())} of {finite.numel()} scores are not finite")
        second = second[0].to(queries.device), second[1].to(queries)
        tie = max(tie, _TIE * float(second[1].abs().max()))
    top = min(top, len(candidates))
    parts = []
    for rows in torch.arange(len(queries), device=queries.device).split(max(1, min(chunk, _TILE // len(candidates)))):
        scores = queries[rows] @ candidates.T  # [C, N]
        if second is not None:
            places, better = second[0][rows], second[1][rows]  # [C, K]
            behind = better.min(1, keepdim=True).values - scores.max(1, keepdim=True).values - 1 - tie
            scores = (scores + behind).scatter(1, places, better)
        own = query_ids[rows, None] == candidate_ids  # [C, N]
        best_own, positive = scores.masked_fill(~own, -torch.inf).max(1)
        lead = scores - best_own[:, None]  # [C, N]
        tied = lead.abs() <= tie
        above = ((lead > tie) & ~own).sum(1)
        score, best = scores.topk(top)
        parts.append((above, (tied & ~own).sum(1), (tied & own).sum(1), own.sum(1), best, score, own.gather(1, best), positive))
    above, rivals, ours, positives, best, score, right, positive = (torch.cat(part).cpu() for part in zip(*parts, strict=True))
    return Ranking(
        rank=above + (rivals + ours + 1).double() / (ours + 1),  # the mean place of the first of `ours` among all that are tied
        recall={k: _hit(k - above, rivals, ours) for k in ks},
        chance={k: float(_hit(torch.full_like(positives, k), len(candidates) - positives, positives).mean()) for k in ks},
        best=best,
        score=score,
        right=right,
        positive=positive,
    )


def _hit(places: Tensor, rivals: Tensor, ours: Tensor) -> Tensor:
    """[Q] float64: probability that at least one of `ours` is among the first `places` of a random order of ours and rivals."""
    places = places.clamp(min=0).minimum(rivals + ours)
    rivals, ours = rivals.double(), ours.double()
    miss = torch.ones_like(rivals)
    for drawn in range(int(places.max())):  # without replacement: the next one is a rival again
        again = (rivals - drawn).clamp(min=0) / (rivals + ours - drawn).clamp(min=1)
        miss *= torch.where(places > drawn, again, 1.0)
    return 1 - miss


def _codes(*ids: Ids) -> list[Tensor]:
    """The ids as int64 tensors in which equal values have equal codes."""
    table: dict[Hashable, int] = {}
    lists = [one.tolist() if isinstance(one, Tensor) else list(one) for one in ids]
    return [torch.tensor([table.setdefault(value, len(table)) for value in values], dtype=torch.int64) for values in lists]
