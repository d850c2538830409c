"""The linear assignment problem on the host: csrc/host/assignment.cpp, and the same algorithm in numpy as its definition."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from vlpfast.ops import backends

KERNELS = {"cpp": "cpu"}  # beside `reference`; tensors of other devices are copied to the host


def assignment(similarity: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """The plan of 0 and 1 with the largest sum of similarities in which no row and no column occurs twice.

    similarity [m, n, P, T] float32 or float64, rows [m, 1, P] and columns [1, n, T] bool: what takes part -> plan [m, n, P, T] in
    the similarity's dtype. All of the side with fewer are matched; where something that takes part is not finite nothing is.
    """
    m, n, p, t = similarity.shape
    partner = torch.ops.vlpfast.assignment(similarity, rows.expand(m, n, p), columns.expand(m, n, t))
    place = torch.arange(p, device=similarity.device)
    return (partner[:, :, None] == place[:, None]).to(similarity.dtype)


@torch.library.impl("vlpfast::assignment", "CompositeExplicitAutograd")
def _(similarity: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    many = similarity.shape[:-2]
    arrays = [a.detach().cpu().contiguous().numpy() for a in (similarity, rows, columns)]
    problems, row_kept, column_kept = (a.reshape(math.prod(many), *a.shape[len(many) :]) for a in arrays)
    if backends.choose("assignment", KERNELS, torch.device("cpu")) == "cpp":
        from vlpfast import _host

        partner = _host.assign(problems, row_kept, column_kept, torch.get_num_threads())
    else:
        partner = np.stack([_solve(*one) for one in zip(problems, row_kept, column_kept, strict=True)] or [np.zeros(0, int)])
    return torch.from_numpy(partner).reshape(columns.shape).to(similarity.device)


def _solve(similarity: np.ndarray, row_kept: np.ndarray, column_kept: np.ndarray) -> np.ndarray:
    """[P, T], [P], [T] -> [T] int64, the row of each column or -1: shortest augmenting paths (Jonker and Volgenant 1987).

    Of equal distances the column (row, where there are fewer columns) with the lowest index is taken first.
    """
    partner = np.full(len(column_kept), -1)
    rows, columns = np.flatnonzero(row_kept), np.flatnonzero(column_kept)
    cost = -similarity[np.ix_(rows, columns)].astype(np.float64)
    if not np.isfinite(cost).all() or not cost.size:
        return partner
    if transposed := len(rows) > len(columns):
        cost = cost.T
    n, m = cost.shape  # n <= m
    u, v = np.zeros(n), np.zeros(m)  # potentials: cost - u - v >= 0, and 0 for those matched
    taken_by = np.full(m, -1)
    for start in range(n):
        distance, before, done = np.full(m, np.inf), np.full(m, -1), np.zeros(m, bool)
        row, length, last = start, 0.0, -1
        while row >= 0:  # Dijkstra over the columns until one is free
            reduced = (length - u[row]) + cost[row] - v
            shorter = ~done & (reduced < distance)
            distance[shorter], before[shorter] = reduced[shorter], last
            last = int(np.where(done, np.inf, distance).argmin())
            done[last], length = True, distance[last]
            row = taken_by[last]
        for column in np.flatnonzero(done & (np.arange(m) != last)):
            u[taken_by[column]] += length - distance[column]
            v[column] -= length - distance[column]
        u[start] += length
        while last >= 0:  # turn the path around
            taken_by[last] = start if before[last] < 0 else taken_by[before[last]]
            last = before[last]
    if transposed:  # what was minimised over has the columns as its rows
        matched = np.flatnonzero(taken_by >= 0)
        partner[columns[taken_by[matched]]] = rows[matched]
    else:
        partner[columns] = np.where(taken_by >= 0, rows[taken_by], -1)
    return partner
