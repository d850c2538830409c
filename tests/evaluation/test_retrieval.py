from __future__ import annotations

import math
from itertools import permutations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from vlpfast.evaluation import retrieval as module
from vlpfast.evaluation.retrieval import rank, retrieval


def features(rows: int, width: int, seed: int) -> torch.Tensor:
    return F.normalize(torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)), dim=1)


def brute_force(queries, candidates, query_ids, candidate_ids, k: int) -> tuple[list[int], float]:
    """Ranks of the first positive and R@k, one query at a time in float64, without ties."""
    scores = queries.double().numpy() @ candidates.double().numpy().T
    ranks = []
    for row, own in zip(scores, query_ids, strict=True):
        order = np.argsort(-row)
        ranks.append(1 + next(place for place, one in enumerate(order) if candidate_ids[one] == own))
    return ranks, sum(rank <= k for rank in ranks) / len(ranks)


@pytest.mark.parametrize("size,chunk", [(1, 1024), (7, 3), (64, 64), (131, 50), (131, 1)])
def test_pairs_match_brute_force(size: int, chunk: int) -> None:
    image, text = features(size, 8, 0), F.normalize(features(size, 8, 0) + 0.6 * features(size, 8, 1), dim=1)
    found = retrieval(image, text, ks=(1, 5, 10), chunk=chunk)
    ids = list(range(size))
    for name, ranking, queries, candidates in (
        ("text_to_image", found.text_to_image, text, image),
        ("image_to_text", found.image_to_text, image, text),
    ):
        for k in (1, 5, 10):
            ranks, recall = brute_force(queries, candidates, ids, ids, k)
            assert ranking.rank.tolist() == ranks
            assert found.metrics[f"{name}_R@{k}"] == pytest.approx(recall, abs=1e-15)
            assert found.metrics[f"{name}_chance_R@{k}"] == pytest.approx(min(1, k / size))
        assert found.metrics[f"{name}_median_rank"] == np.median(ranks)
        assert found.metrics[f"{name}_mean_rank"] == pytest.approx(np.mean(ranks))
        order = (queries.double() @ candidates.double().T).argsort(1, descending=True)[:, :5]
        assert torch.equal(ranking.best, order)
        assert torch.equal(ranking.right, order == torch.arange(size)[:, None])
        assert ranking.positive.tolist() == ids


def test_directions_are_not_mixed_up() -> None:
    image = torch.eye(3)
    text = torch.tensor(
        [[0.9, 0.1, 0.0], [0.8, 0.6, 0.0], [0.0, 0.1, 0.5]]
    )  # text 1 prefers picture 0, every picture its own text
    metrics = retrieval(image, text, ks=(1,)).metrics
    assert metrics["text_to_image_R@1"] == pytest.approx(2 / 3)
    assert metrics["image_to_text_R@1"] == 1


def test_several_captions_and_several_pictures() -> None:
    image, text = features(40, 6, 2), features(90, 6, 3)
    image_ids, text_ids = [f"p{i % 30}" for i in range(40)], [f"p{(7 * i) % 30}" for i in range(90)]
    found = retrieval(image, text, image_ids=image_ids, text_ids=text_ids, ks=(1, 5), chunk=32)
    for ranking, queries, candidates, query_ids, candidate_ids in (
        (found.text_to_image, text, image, text_ids, image_ids),
        (found.image_to_text, image, text, image_ids, text_ids),
    ):
        ranks, recall = brute_force(queries, candidates, query_ids, candidate_ids, 5)
        assert ranking.rank.tolist() == ranks
        assert ranking.recall[5].mean() == pytest.approx(recall)
        for row, best in enumerate(ranking.best.tolist()):
            assert ranking.right[row].tolist() == [candidate_ids[one] == query_ids[row] for one in best]
            assert candidate_ids[ranking.positive[row]] == query_ids[row]
    as_numbers = retrieval(
        image, text, image_ids=torch.arange(40) % 30, text_ids=7 * torch.arange(90) % 30, ks=(1, 5), chunk=1000
    )
    assert as_numbers.metrics == found.metrics
    # Chance with several positives: 20 pictures have one copy and 10 have two among 40.
    one, two = 5 / 40, 1 - math.comb(38, 5) / math.comb(40, 5)
    share = sum(image_ids.count(own) == 2 for own in text_ids) / 90
    assert found.metrics["text_to_image_chance_R@5"] == pytest.approx((1 - share) * one + share * two)


@pytest.mark.parametrize("shape", ["constant", "constant pictures", "nearly constant"])
def test_collapsed_model_scores_chance(shape: str) -> None:
    image = torch.ones(100, 32) / 32**0.5
    text = features(100, 32, 0) if shape == "constant pictures" else image.clone()
    if shape == "nearly constant":
        image = image + 1e-8 * torch.randn(100, 32, generator=torch.Generator().manual_seed(0))
    metrics = retrieval(image, text, chunk=17).metrics
    for k in (1, 5, 10):
        assert metrics[f"text_to_image_R@{k}"] == pytest.approx(k / 100, rel=1e-9)
    assert metrics["text_to_image_median_rank"] == metrics["text_to_image_mean_rank"] == 50.5


def test_ties_are_the_mean_over_all_orders() -> None:
    # Scores of one query: one clear winner, then two positives and three others tied, then one of each below.
    scores = torch.tensor([3.0, 2.0, 2.0, 2.0, 2.0, 2.0, 1.0, 1.0])
    ids = torch.tensor([0, 1, 1, 0, 0, 0, 0, 1])
    got = rank(torch.ones(1, 1), scores[:, None], torch.tensor([1]), ids, ks=(1, 2, 3, 4, 5, 6, 100), top=1)
    first = [1 + min(order.index(0), order.index(1)) for order in permutations(range(5))]  # 0 and 1 are the positives
    assert got.rank.item() == pytest.approx(1 + sum(first) / len(first))
    for k in (1, 2, 3, 4, 5, 6, 100):
        assert got.recall[k].item() == pytest.approx(sum(1 + place <= k for place in first) / len(first))


def test_many_candidates_are_scored_in_small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    image, text = features(50, 8, 0), features(50, 8, 1)
    whole = retrieval(image, text).metrics
    monkeypatch.setattr(module, "_TILE", 120)  # two rows of 50
    assert retrieval(image, text).metrics == pytest.approx(whole)


def test_k_beyond_the_candidates_and_top_beyond_them() -> None:
    found = retrieval(features(3, 4, 0), features(3, 4, 1), ks=(1, 10), top=5)
    assert found.metrics["text_to_image_R@10"] == found.metrics["text_to_image_chance_R@10"] == 1
    assert found.text_to_image.best.shape == (3, 3)


@pytest.mark.parametrize("side", ["image", "text"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_features_that_are_not_finite_are_named(side: str, value: float) -> None:
    both = {"image": features(6, 4, 0), "text": features(6, 4, 1)}
    both[side][2, 1] = both[side][4, 0] = value
    with pytest.raises(ValueError, match=rf"{side}: 2 of 6 features are not finite"):
        retrieval(**both)


@pytest.mark.parametrize(
    "image,text,options,message",
    [
        ((0, 4), (0, 4), {}, r"image: .*at least one of each, got shape \[0, 4\]"),
        ((3, 4), (3, 5), {}, "same width, got 4 and 5"),
        ((3, 4), (2, 4), {}, "as many pictures as texts.*got 3 and 2"),
        ((3, 4), (2, 4), {"image_ids": [0, 1, 2]}, "both or none"),
        ((3, 4), (2, 4), {"image_ids": [0, 1, 2], "text_ids": [0]}, "text_ids: expected 2 ids"),
        ((3, 4), (2, 4), {"image_ids": [0, 1, 1], "text_ids": [1, 2]}, "1 of 2 texts have no picture"),
        ((3, 4), (2, 4), {"image_ids": [0, 1, 2], "text_ids": [1, 2]}, "1 of 3 pictures have no text"),
        ((3, 4), (3, 4), {"ks": (0,)}, "ks: expected"),
        ((3, 4), (3, 4), {"ks": ()}, "ks: expected"),
        ((3, 4), (3, 4), {"chunk": 0}, "top and chunk"),
    ],
)
def test_wrong_calls(image, text, options, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        retrieval(torch.randn(image), torch.randn(text), **options)
