from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from ranks import run
from torch import Tensor, nn

from vlpfast.evaluation.features import encode_images, encode_pairs
from vlpfast.types import Batch, UserError


class Towers(nn.Module):
    """Dropout tells training from evaluation; `frozen` stays in eval mode while the model trains."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image = nn.Linear(12, 8)
        self.table = nn.Embedding(50, 8)
        self.dropout = nn.Dropout(0.5)
        self.frozen = nn.BatchNorm1d(8)
        self.frozen.eval()

    def encode_image(self, image: Tensor) -> Tensor:
        assert torch.is_inference_mode_enabled()
        return F.normalize(self.frozen(self.dropout(self.image(image.flatten(1)))), dim=-1)

    def encode_text(self, text: Tensor, text_mask: Tensor | None = None) -> Tensor:
        rows = self.dropout(self.table(text))
        return F.normalize((rows * text_mask[..., None]).sum(1) if text_mask is not None else rows.sum(1), dim=-1)


class Source:
    """Eleven samples in batches of four, `leave` naming fields that they lack."""

    batch_size, count = 4, 11

    def __init__(self, leave: tuple[str, ...] = ()) -> None:
        self.skipped = {"s99": "its picture cannot be decoded"}
        self.leave = leave
        generator = torch.Generator().manual_seed(1)
        self.pictures = torch.randn(self.count, 3, 2, 2, generator=generator)
        self.texts = torch.randint(1, 50, (self.count, 5), generator=generator)

    def __len__(self) -> int:
        return math.ceil(self.count / self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        for start in range(0, self.count, self.batch_size):
            rows = list(range(start, min(start + self.batch_size, self.count)))
            batch = {
                "image": self.pictures[rows],
                "text": self.texts[rows],
                "text_mask": torch.ones(len(rows), 5, dtype=torch.bool),
                "index": torch.tensor(rows) * 3,
                "key": [f"s{row}" for row in rows],
                "meta": [{"row": row} for row in rows],
            }
            yield {name: value for name, value in batch.items() if name not in self.leave}


def test_rows_stay_in_order_and_the_model_is_put_back() -> None:
    model, seen = Towers(), []
    model.train()
    model.frozen.eval()
    got = encode_pairs(model, Source(), "cpu", lambda done, total: seen.append((done, total)))
    assert (model.training, model.dropout.training, model.frozen.training) == (True, True, False)
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert len(got) == 11
    assert got.keys == [f"s{row}" for row in range(11)]
    assert got.meta == [{"row": row} for row in range(11)]
    assert got.index.tolist() == [3 * row for row in range(11)]
    assert got.skipped == {"s99": "its picture cannot be decoded"}
    model.eval()
    source = Source()
    with torch.inference_mode():
        torch.testing.assert_close(got.image, model.encode_image(source.pictures))
        torch.testing.assert_close(got.text, model.encode_text(source.texts))
    assert got.image.dtype == got.text.dtype == torch.float32


def test_half_precision_features_become_float32() -> None:
    assert encode_images(Towers().bfloat16(), HalfSource(), "cpu").image.dtype == torch.float32


class HalfSource(Source):
    def __iter__(self) -> Iterator[Batch]:
        for batch in super().__iter__():
            yield {**batch, "image": batch["image"].bfloat16()}


def test_pictures_alone() -> None:
    class Pictures(nn.Module):
        def encode_image(self, image: Tensor) -> Tensor:
            return F.normalize(image.flatten(1), dim=-1)

    got = encode_images(Pictures(), Source(leave=("text", "text_mask", "meta")), "cpu")
    assert got.image.shape == (11, 12) and got.text is None and got.meta == []
    with pytest.raises(TypeError, match="Pictures has no method encode_text"):
        encode_pairs(Pictures(), Source(), "cpu")
    with pytest.raises(TypeError, match="Linear has no method encode_image"):
        encode_images(nn.Linear(2, 2), Source(), "cpu")


def test_missing_field_is_named_and_the_model_is_put_back() -> None:
    model = Towers()
    with pytest.raises(ValueError, match=r"no field 'text', only \['image'\]"):
        encode_pairs(model, Source(leave=("text", "index", "key", "meta", "text_mask")), "cpu")
    assert model.training


def test_features_that_are_not_finite_name_side_count_and_sample() -> None:
    model, source = Towers(), Source()
    source.texts[5] = source.texts[7] = 0
    with torch.no_grad():
        model.table.weight[0] = math.nan
    with pytest.raises(UserError, match=r"text features that are not finite for 2 of 11 samples \(first: s5\)"):
        encode_pairs(model, source, "cpu")


def test_no_sample_is_an_error() -> None:
    source = Source()
    source.count = 0
    with pytest.raises(UserError, match="no usable sample"):
        encode_pairs(Towers(), source, "cpu")


class Share(Source):
    """A rank's share of the eleven samples, as make_loader deals it."""

    def __init__(self, rank: int, world: int) -> None:
        super().__init__()
        self.skipped = {f"s9{rank}": "damaged"}
        self.rows = list(range(rank, Source.count, world))
        self.count = len(self.rows)

    def __iter__(self) -> Iterator[Batch]:
        for start in range(0, self.count, self.batch_size):
            rows = self.rows[start : start + self.batch_size]
            yield Batch(
                image=self.pictures[rows], text=self.texts[rows], index=torch.tensor(rows) * 3, key=[f"s{row}" for row in rows],
                meta=[{"row": row} for row in rows],
            )  # fmt: skip


def ranks_share_an_evaluation(rank: int, world: int) -> None:
    """All have the features of one process; each has run the model as often as the others, for a model spread over them."""
    model, calls = Towers(), []
    encode = model.encode_text
    model.encode_text = lambda *arguments: calls.append(1) or encode(*arguments)
    found = encode_pairs(model, Share(rank, world), "cpu", ranks=world)
    expected = encode_pairs(Towers(), Source(("text_mask",)), "cpu")
    assert len(calls) == math.ceil(math.ceil(Source.count / world) / Source.batch_size)
    assert torch.allclose(found.image, expected.image, atol=1e-6) and torch.allclose(found.text, expected.text, atol=1e-6)
    assert torch.equal(found.index, expected.index) and found.keys == expected.keys and found.meta == expected.meta
    assert found.skipped == {f"s9{r}": "damaged" for r in range(world)}


@pytest.mark.parametrize("world", [2, 5])
def test_ranks_share_an_evaluation(world: int, tmp_path: Path) -> None:
    run(world, tmp_path, [ranks_share_an_evaluation])
