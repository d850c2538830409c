from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from vlpfast.data.frames import dense_frames, head_tail_frames, middle_frames, segment_frames, two_views, uniform_frames

RANDOM = {"seed": 3, "epoch": 1}
LENGTHS = np.array([1, 2, 3, 4, 5, 7, 8, 9, 30, 31, 1000])
INDEX = np.arange(len(LENGTHS))
SAMPLERS: dict[str, Callable[[np.ndarray, np.ndarray, int], np.ndarray]] = {
    "uniform": lambda lengths, index, count: uniform_frames(lengths, count),
    "segment": lambda lengths, index, count: segment_frames(lengths, index, count, **RANDOM),
    "head, tail": lambda lengths, index, count: head_tail_frames(lengths, index, count, **RANDOM),
    "dense": lambda lengths, index, count: dense_frames(lengths, index, count, 1, **RANDOM),
    "dense, stride 4": lambda lengths, index, count: dense_frames(lengths, index, count, 4, **RANDOM),
    "middle": lambda lengths, index, count: middle_frames(lengths, count, 3),
    "long view": lambda lengths, index, count: two_views(lengths, index, count, 3, (0.2, 0.5), **RANDOM)[0],
    "short view": lambda lengths, index, count: two_views(lengths, index, 3, count, (0.2, 0.5), **RANDOM)[1],
}


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("count", [1, 2, 4, 7, 16])
def test_in_bounds_in_order_and_the_same_again(name: str, count: int) -> None:
    sample = SAMPLERS[name]
    places = sample(LENGTHS, INDEX, count)
    assert places.dtype == np.int64 and places.shape == (len(LENGTHS), count)
    assert (places >= 0).all() and (places < LENGTHS[:, None]).all() and (np.diff(places, axis=1) >= 0).all()
    assert np.array_equal(places, sample(LENGTHS, INDEX, count))
    one_by_one = np.concatenate([sample(LENGTHS[i : i + 1], INDEX[i : i + 1], count) for i in INDEX])
    assert np.array_equal(places, one_by_one)  # whatever else is in the batch
    if name in ("uniform", "segment", "head, tail", "long view"):
        enough = count <= LENGTHS
        assert (np.diff(places[enough], axis=1) > 0).all()
        short = np.minimum(np.arange(count), LENGTHS[~enough, None] - 1)
        assert np.array_equal(places[~enough], short)


@pytest.mark.parametrize("name", ["segment", "head, tail", "dense", "long view", "short view"])
def test_other_clips_seeds_and_epochs_give_other_frames(name: str) -> None:
    lengths = np.full(200, 1000)
    places = SAMPLERS[name](lengths, np.arange(200), 4)
    assert len({tuple(row) for row in places}) > 150
    for other in ({"seed": 4}, {"epoch": 2}):
        drawn = segment_frames(lengths, np.arange(200), 4, **(RANDOM | other))
        assert (drawn != segment_frames(lengths, np.arange(200), 4, **RANDOM)).mean() > 0.9


def test_uniform_frames() -> None:
    assert uniform_frames(np.array([8, 9, 16, 100, 3]), 4).tolist() == [
        [1, 3, 5, 7],
        [1, 3, 5, 7],
        [2, 6, 10, 14],
        [12, 37, 62, 87],
        [0, 1, 2, 2],
    ]
    assert uniform_frames(np.array([16]), 16).tolist() == [list(range(16))]


def test_segment_frames_take_every_frame_of_each_part_as_often() -> None:
    places = segment_frames(np.full(6000, 10), np.arange(6000), 3, **RANDOM)
    for column, part in zip(places.T, ([0, 1, 2], [3, 4, 5], [6, 7, 8, 9]), strict=True):
        counts = np.bincount(column, minlength=10)
        assert counts.sum() == counts[part].sum() and (abs(counts[part] * len(part) / 6000 - 1) < 0.1).all()


def test_head_tail_frames_are_subsets_of_both_halves_equally_often() -> None:
    places = head_tail_frames(np.full(9000, 7), np.arange(9000), 4, **RANDOM)
    assert (places[:, :2] < 3).all() and (places[:, 2:] >= 3).all()
    for pairs, subsets in ((places[:, :2], 3), (places[:, 2:], 6)):
        _, counts = np.unique(pairs, axis=0, return_counts=True)
        assert len(counts) == subsets and (abs(counts * subsets / 9000 - 1) < 0.1).all()
    _, counts = np.unique(places, axis=0, return_counts=True)  # independent of each other
    assert len(counts) == 18 and (abs(counts * 18 / 9000 - 1) < 0.2).all()
    odd = head_tail_frames(np.array([10]), np.array([0]), 5, **RANDOM)[0]
    assert (odd[:2] < 5).all() and (odd[2:] >= 5).all()


def test_dense_frames() -> None:
    places = dense_frames(np.full(4000, 12), np.arange(4000), 4, 3, **RANDOM)
    assert (np.diff(places, axis=1) == 3).all()
    assert np.array_equal(np.unique(places[:, 0]), [0, 1, 2]) and (abs(np.bincount(places[:, 0]) * 3 / 4000 - 1) < 0.1).all()
    assert dense_frames(np.array([6]), np.array([0]), 4, 3, **RANDOM).tolist() == [[0, 3, 5, 5]]


def test_middle_frames() -> None:
    assert middle_frames(np.array([101]), 7, 12).tolist() == [[14, 26, 38, 50, 62, 74, 86]]
    assert middle_frames(np.array([101, 101]), 3, 12, np.array([5, 100])).tolist() == [[0, 5, 17], [88, 100, 100]]
    assert middle_frames(np.array([10]), 4, 1).tolist() == [[3, 4, 5, 6]]
    with pytest.raises(ValueError, match=r"middle: expected places in \[0, length\) of each clip, got \[10\]"):
        middle_frames(np.array([10]), 3, 1, np.array([10]))


def test_the_short_view_is_a_moment_of_the_clip() -> None:
    lengths = np.full(3000, 100)
    long, short = two_views(lengths, np.arange(3000), 8, 4, (0.2, 0.4), **RANDOM)
    assert np.array_equal(long, segment_frames(lengths, np.arange(3000), 8, **RANDOM))
    span = short[:, -1] - short[:, 0] + 1
    assert span.max() <= 40 and span.max() > 35 and short.min() == 0 and short.max() == 99
    assert abs(np.corrcoef(short[:, 0], long[:, 0])[0, 1]) < 0.1
    _, whole = two_views(lengths, np.arange(3000), 8, 4, (1.0, 1.0), **RANDOM)
    assert ((whole * 4 // 100) == np.arange(4)).all()
    _, least = two_views(lengths, np.arange(3000), 8, 4, (0.001, 0.001), **RANDOM)
    assert (np.diff(least, axis=1) == 1).all()


@pytest.mark.parametrize("share", [(0.0, 0.5), (0.5, 0.2), (0.5, 1.1)])
def test_wrong_shares(share: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="share: expected 0 < low <= high <= 1"):
        two_views(LENGTHS, INDEX, 4, 2, share, **RANDOM)


@pytest.mark.parametrize("name", SAMPLERS)
def test_wrong_arguments(name: str) -> None:
    with pytest.raises(ValueError, match=r"lengths: expected clips of at least one frame, got \[3, 0\]"):
        SAMPLERS[name](np.array([3, 0]), np.arange(2), 2)
    with pytest.raises(ValueError, match="count: expected >= 1, got 0"):
        SAMPLERS[name](LENGTHS, INDEX, 0)
    with pytest.raises(ValueError, match="stride: expected >= 1, got 0"):
        middle_frames(LENGTHS, 2, 0)
