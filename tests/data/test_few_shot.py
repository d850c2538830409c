from __future__ import annotations

import numpy as np
import pytest

from vlpfast.data.few_shot import few_shot_indices, split_classes

LABELS = np.random.default_rng(0).integers(0, 7, 300)


def test_so_many_of_each_class_and_none_twice() -> None:
    for shots in (1, 2, 4, 8, 16):
        chosen = few_shot_indices(LABELS, shots, seed=1)
        assert chosen.dtype == np.int64 and (np.diff(chosen) > 0).all()
        assert (np.bincount(LABELS[chosen], minlength=7) == shots).all()


def test_a_small_class_gives_all_it_has() -> None:
    assert few_shot_indices([5, 3, 5, 3, 3, 9], 2, seed=0).tolist()[-1] == 5
    assert np.bincount(np.array([5, 3, 5, 3, 3, 9])[few_shot_indices([5, 3, 5, 3, 3, 9], 2, seed=0)], minlength=10)[9] == 1
    assert few_shot_indices([], 4, seed=0).tolist() == []


def test_the_seed_decides_and_fewer_shots_are_some_of_more() -> None:
    four, again, other = (few_shot_indices(LABELS.tolist(), 4, seed) for seed in (1, 1, 2))
    assert np.array_equal(four, again) and not np.array_equal(four, other)
    assert np.isin(few_shot_indices(LABELS, 2, 1), four).all()
    assert np.array_equal(few_shot_indices([0, 0, 0, 0, 1, 1], 1, 3), [0, 4])  # the same on every machine


def test_validation_draws_at_most_four_others() -> None:
    for shots, expected in ((1, 1), (2, 2), (16, 4)):
        training, held_back = (few_shot_indices(LABELS, shots, 1, validation=validation) for validation in (False, True))
        assert (np.bincount(LABELS[held_back], minlength=7) == expected).all()
        assert not np.isin(held_back, training).any()


def test_base_and_new_classes() -> None:
    names = ["e", "a", "d", "b", "c"]
    assert split_classes(names, "base") == ["e", "a", "d"] and split_classes(names, "new") == ["b", "c"]
    assert split_classes(names[:4], "base") == ["e", "a"] and split_classes([], "base") == []
    with pytest.raises(ValueError, match="part: expected base or new, got 'all'"):
        split_classes(names, "all")


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(TypeError, match="labels: expected whole numbers, got float64"):
        few_shot_indices([0.5, 1.0], 1, 0)
    with pytest.raises(ValueError, match=r"labels: expected shape \[N\], got \(1, 2\)"):
        few_shot_indices([[0, 1]], 1, 0)
    with pytest.raises(ValueError, match="shots: expected at least 1, got 0"):
        few_shot_indices([0, 1], 0, 0)
