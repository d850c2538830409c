"""Two-stage retrieval against an order that is worked out pair by pair."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from ranks import run
from torch import Tensor, nn

from vlpfast.evaluation.rerank import States, encode_states, two_stage_retrieval
from vlpfast.evaluation.retrieval import retrieval

N, M, D = 23, 31, 6


class Scorer(nn.Module):
    """Scores a pair by numbers that the features do not know."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[int] = []

    def image_states(self, image: Tensor) -> Tensor:
        return image.flatten(2)[:, :, :3]

    def text_states(self, text: Tensor, text_mask: Tensor) -> Tensor:
        return (text * text_mask)[..., None].float().expand(-1, -1, 3)

    def score_pairs(self, image_states: Tensor, text_states: Tensor, text_mask: Tensor) -> Tensor:
        self.calls.append(len(image_states))
        masked = (text_states * text_mask[..., None]).sum(1)  # [P, 3]
        return (image_states.sum(1) * masked).sum(1)


def problem() -> tuple[States, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    mask = torch.ones(M, 4, dtype=torch.bool)
    mask[::2, 2:] = False
    states = States(torch.randn(N, 5, 3, generator=generator), torch.randn(M, 4, 3, generator=generator), mask)
    return states, torch.randn(N, D, generator=generator), torch.randn(M, D, generator=generator)


def ids() -> tuple[Tensor, Tensor]:
    return torch.arange(N), torch.arange(M) % N


def expected_order(states: States, image: Tensor, text: Tensor, query: int, candidates: int, to_images: bool) -> list[int]:
    model = Scorer()
    queries, others = (text, image) if to_images else (image, text)
    by_product = (queries[query] @ others.T).argsort(descending=True).tolist()

    def score(other: int) -> float:
        i, t = (other, query) if to_images else (query, other)
        return float(model.score_pairs(states.image[i : i + 1], states.text[t : t + 1], states.text_mask[t : t + 1]))

    return sorted(by_product[:candidates], key=score, reverse=True) + by_product[candidates:]


@pytest.mark.parametrize("candidates", [1, 7, 1000])
@pytest.mark.parametrize("pairs", [3, 256])
def test_order(candidates: int, pairs: int) -> None:
    states, image, text = problem()
    image_ids, text_ids = ids()
    options = {"candidates": candidates, "image_ids": image_ids, "text_ids": text_ids, "pairs": pairs, "top": 9}
    model = Scorer()
    found = two_stage_retrieval(model, states, image, text, "cpu", **options)
    assert max(model.calls) <= pairs
    for to_images, ranking, own, other in (
        (True, found.text_to_image, text_ids, image_ids),
        (False, found.image_to_text, image_ids, text_ids),
    ):
        for query in range(len(own)):
            order = expected_order(states, image, text, query, candidates, to_images)
            assert ranking.best[query].tolist() == order[:9]
            right = [place for place, found_id in enumerate(order, 1) if other[found_id] == own[query]]
            assert ranking.rank[query] == right[0]
            assert ranking.recall[5][query] == (right[0] <= 5)


def test_one_candidate_is_the_first_stage() -> None:
    states, image, text = problem()
    image_ids, text_ids = ids()
    found = two_stage_retrieval(Scorer(), states, image, text, "cpu", candidates=1, image_ids=image_ids, text_ids=text_ids)
    assert found.metrics == retrieval(image, text, image_ids=image_ids, text_ids=text_ids).metrics


def test_equal_scores_are_ties() -> None:
    """A network that scores all pairs alike is no better than chance among the candidates."""
    states, image, _ = problem()
    zero = States(states.image, torch.zeros(N, 4, 3), torch.ones(N, 4, dtype=torch.bool))
    found = two_stage_retrieval(Scorer(), zero, image, image, "cpu", candidates=N)
    assert found.metrics["text_to_image_R@1"] == pytest.approx(1 / N)


class Samples:
    def __len__(self) -> int:
        return 3

    def __iter__(self) -> Iterator[dict]:
        generator = torch.Generator().manual_seed(0)
        for size in (4, 4, 2):
            mask = torch.arange(5) < torch.randint(2, 6, (size, 1), generator=generator)
            image = torch.randn(size, 3, 2, 2, generator=generator)
            yield {"image": image, "text": torch.randint(0, 9, (size, 5), generator=generator), "text_mask": mask}


def test_states_of_a_loader() -> None:
    states = encode_states(Scorer(), Samples(), "cpu")
    batches = list(Samples())
    assert torch.equal(states.image, torch.cat([batch["image"].flatten(2)[:, :, :3] for batch in batches]))
    assert torch.equal(states.text_mask, torch.cat([batch["text_mask"] for batch in batches]))
    assert states.text.shape == (10, 5, 3)
    with pytest.raises(TypeError, match="image_states"):
        encode_states(nn.Linear(2, 2), Samples(), "cpu")


def check_shares(rank: int, size: int) -> None:
    states, image, text = problem()
    image_ids, text_ids = ids()
    options = {"candidates": 7, "image_ids": image_ids, "text_ids": text_ids}
    alone = two_stage_retrieval(Scorer(), states, image, text, "cpu", **options)
    model = Scorer()
    shared = two_stage_retrieval(model, states, image, text, "cpu", ranks=size, rank_of=rank, **options)
    assert shared.metrics == alone.metrics
    for one, other in ((shared.text_to_image, alone.text_to_image), (shared.image_to_text, alone.image_to_text)):
        assert torch.equal(one.best, other.best) and torch.equal(one.rank, other.rank)
    assert sum(model.calls) == 7 * (-(-M // size) + -(-N // size))


def test_ranks_share_the_queries(tmp_path: Path) -> None:
    run(2, tmp_path, [check_shares])


def test_bad_input() -> None:
    states, image, text = problem()
    with pytest.raises(ValueError, match="states: expected those of 22 pictures and 31 texts, got 23 and 31"):
        two_stage_retrieval(Scorer(), states, image[1:], text, "cpu")
    with pytest.raises(ValueError, match="image_ids and text_ids"):
        two_stage_retrieval(Scorer(), states, image, text, "cpu")
    with pytest.raises(ValueError, match="candidates and pairs"):
        two_stage_retrieval(Scorer(), states, image, text, "cpu", candidates=0)
    broken = States(states.image * float("nan"), states.text, states.text_mask)
    image_ids, text_ids = ids()
    with pytest.raises(ValueError, match=r"second: .* scores are not finite"):
        two_stage_retrieval(Scorer(), broken, image, text, "cpu", image_ids=image_ids, text_ids=text_ids)
