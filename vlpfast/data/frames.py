"""Which frames of a clip are shown: decided on the host before one is decoded, a function of (seed, epoch, index) alone.

Every sampler takes the clips' numbers of frames, [B] integers >= 1, and gives int64 [B, count] of places that never fall along a
row. Where a clip has fewer frames than `count`, all of them are taken and the last one is repeated.
"""

from __future__ import annotations

import numpy as np

from vlpfast.data.order import uniform

_DRAW = 1 << 20  # of a sample's draws, those from here on belong to its frames
_SHORT_VIEW = _DRAW + (1 << 10)


def uniform_frames(lengths: np.ndarray, count: int) -> np.ndarray:
    """The middle of each of `count` equal parts of the clip: HiTeA's and PLLaVA's frames of evaluation."""
    lengths = _checked(lengths, count)
    return _padded((2 * np.arange(count) + 1) * lengths // (2 * count), lengths)


def segment_frames(lengths: np.ndarray, index: np.ndarray, count: int, *, seed: int, epoch: int) -> np.ndarray:
    """A random frame of each of `count` equal parts of the clip (Wang et al. 2016, "Temporal Segment Networks")."""
    lengths = _checked(lengths, count)
    return _segment_frames(lengths, index, count, seed, epoch, _DRAW)


def head_tail_frames(lengths: np.ndarray, index: np.ndarray, count: int, *, seed: int, epoch: int) -> np.ndarray:
    """count // 2 different random frames of the clip's first half and the others of its second half: ALPRO's."""
    lengths = _checked(lengths, count)
    half, head = lengths // 2, count // 2
    first = _subset(half, index, head, seed, epoch, _DRAW)
    second = half + _subset(lengths - half, index, count - head, seed, epoch, _DRAW + head)
    return _padded(np.concatenate([first, second], axis=1), lengths)


def dense_frames(lengths: np.ndarray, index: np.ndarray, count: int, stride: int, *, seed: int, epoch: int) -> np.ndarray:
    """`count` frames `stride` apart from a random place on. Past the clip's end: its last frame."""
    lengths = _checked(lengths, count, stride)
    places = np.maximum(1, lengths - (count - 1) * stride)
    start = (uniform(seed, epoch, _column(index), _DRAW) * places).astype(np.int64)
    return np.minimum(start + stride * np.arange(count), lengths - 1)


def middle_frames(lengths: np.ndarray, count: int, stride: int, middle: np.ndarray | None = None) -> np.ndarray:
    """The frame `middle` ([B]; None: the clip's) and those before and after it, `stride` apart; HD-VILA has 7, 12 apart.

    Of an even `count` one more is before it. Past the clip's ends: its first and its last frame.
    """
    lengths = _checked(lengths, count, stride)
    centre = lengths // 2 if middle is None else _column(middle)
    if ((centre < 0) | (centre >= lengths)).any():
        raise ValueError(f"middle: expected places in [0, length) of each clip, got {centre.ravel().tolist()}")
    return np.clip(centre + stride * (np.arange(count) - count // 2), 0, lengths - 1)


def two_views(
    lengths: np.ndarray, index: np.ndarray, count: int, short_count: int, share: tuple[float, float], *, seed: int, epoch: int
) -> tuple[np.ndarray, np.ndarray]:
    """HiTeA's views: `count` frames of the whole clip, and `short_count` of a random moment of it, both by segment_frames.

    share: the moment's length over the clip's is uniform between these, 0 < low <= high <= 1; but it has `short_count` frames if
        the clip has as many.
    Returns [B, count] and [B, short_count].
    """
    lengths = _checked(lengths, count)
    low, high = share
    if not 0 < low <= high <= 1:
        raise ValueError(f"share: expected 0 < low <= high <= 1, got {share}")
    _checked(lengths, short_count)
    u = uniform(seed, epoch, _column(index)[..., None], _SHORT_VIEW + np.arange(2))[:, 0]  # [B, 2]
    moment = np.rint(lengths[:, 0] * (low + u[:, 0] * (high - low))).astype(np.int64)
    moment = np.minimum(np.maximum(moment, short_count), lengths[:, 0])[:, None]
    start = (u[:, 1:] * (lengths - moment + 1)).astype(np.int64)
    short = start + _segment_frames(moment, index, short_count, seed, epoch, _SHORT_VIEW + 2)
    return _segment_frames(lengths, index, count, seed, epoch, _DRAW), short


def _segment_frames(lengths: np.ndarray, index: np.ndarray, count: int, seed: int, epoch: int, draw: int) -> np.ndarray:
    edges = np.arange(count + 1) * lengths // count  # [B, count + 1]
    u = uniform(seed, epoch, _column(index), draw + np.arange(count))
    return _padded(edges[:, :-1] + (u * np.diff(edges)).astype(np.int64), lengths)


def _subset(lengths: np.ndarray, index: np.ndarray, count: int, seed: int, epoch: int, draw: int) -> np.ndarray:
    """`count` different places below each length, in order, every subset as likely (Floyd's algorithm). [B, count]"""
    u = uniform(seed, epoch, _column(index), draw + np.arange(count))
    chosen = np.full((len(lengths), count), -1)
    for i in range(count):
        last = lengths[:, 0] - count + i  # negative where there are too few: what comes out is replaced by _padded
        place = (u[:, i] * (last + 1)).astype(np.int64)
        taken = (chosen[:, :i] == place[:, None]).any(axis=1)
        chosen[:, i] = np.where(taken, last, place)
    return np.sort(chosen, axis=1)


def _padded(places: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    count = places.shape[1]
    return np.where(lengths < count, np.minimum(np.arange(count), lengths - 1), places)


def _column(values: np.ndarray) -> np.ndarray:
    return np.asarray(values).astype(np.int64)[:, None]


def _checked(lengths: np.ndarray, count: int, stride: int = 1) -> np.ndarray:
    """[B, 1] int64"""
    lengths = np.asarray(lengths).astype(np.int64).reshape(len(lengths), 1)
    if (lengths < 1).any():
        raise ValueError(f"lengths: expected clips of at least one frame, got {lengths.ravel().tolist()}")
    for name, number in (("count", count), ("stride", stride)):
        if number < 1:
            raise ValueError(f"{name}: expected >= 1, got {number}")
    return lengths
