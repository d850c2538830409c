"""maxsim_topk: the best documents of a corpus for each query, the corpus a chunk at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from vlpfast.ops import backends
from vlpfast.ops._checks import DTYPES, check_choice, check_count, check_flag
from vlpfast.ops._schemas import accumulate_dtype
from vlpfast.ops.maxsim._checks import check_tokens
from vlpfast.ops.maxsim.int8 import maxsim_int8
from vlpfast.ops.maxsim.maxsim import KERNELS, maxsim

Array = Tensor | np.ndarray
CHUNK_BYTES = 1 << 26  # of a chunk's tokens in the dtype they are read in, and of its scores


def maxsim_topk(
    queries: Tensor,
    corpus: Array,
    k: int,
    *,
    query_mask: Tensor | None = None,
    corpus_mask: Array | None = None,
    corpus_cu_seqlens: Array | None = None,
    corpus_scale: Array | None = None,
    reduction: Literal["mean", "sum"] = "sum",
    normalize: bool = False,
    chunk: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """The k documents with the largest late-interaction scores for each query: ColBERT's exhaustive search.

        score[q, n] = sum (or mean) over kept p of max over kept t of <queries[q, p], corpus[n, t]>

    The corpus is read once, a chunk at a time, and may be a memory-mapped file larger than memory: only a chunk of it and its
    scores are held, on the queries' device. On a CPU the compiled kernel reads int8 and half types, as float32, out of the file's
    own pages: no chunk is copied, unless floating tokens are normalized or cast. Nothing is differentiated.

    Args:
        queries: [Q, P, D], dtypes as in `maxsim`; query_mask: [Q, P] bool, True = keep.
        corpus: [N, T, D], or packed [L, D] with corpus_cu_seqlens: a tensor on any device or a numpy array (np.load(...,
            mmap_mode="r")), float32, float64, float16, bfloat16 (tensors), or int8 with corpus_scale (`quantize_tokens`).
        k: in [1, N].
        corpus_mask: [N, T] bool; corpus_cu_seqlens: int32 or int64 [N + 1], document n has the tokens from
            corpus_cu_seqlens[n] to corpus_cu_seqlens[n + 1]. A document without tokens scores 0.
        corpus_scale: [N, T] or [L] floats, for an int8 corpus alone: what each token is multiplied by (in float32).
        reduction, normalize: see `maxsim`; for an int8 corpus `maxsim_int8`.
        chunk: documents at a time; None: as many as have 64 MiB of tokens and 64 MiB of scores.
        progress: called after each chunk with the number of documents that are done, and N.

    Returns:
        scores [Q, k] float32 (float64 for float64 tokens), falling, and indices [Q, k] int64, on the queries' device. Of equal
        scores the lowest index comes first. A score that is NaN counts as the largest, so that it is seen.

    Raises:
        TypeError, ValueError: a wrong argument, named.

    Khattab and Zaharia 2020, "ColBERT: efficient and effective passage search via contextualized late interaction over BERT".
    """
    check_tokens("queries", queries, query_mask, None, "[Q, P, D]")
    check_choice("reduction", reduction, ("mean", "sum"))
    check_flag("normalize", normalize)
    documents = _Corpus(corpus, corpus_mask, corpus_cu_seqlens, corpus_scale, queries, normalize)
    check_count("k", k, 1)
    if k > documents.count:
        raise ValueError(f"k: expected at most the {documents.count} documents of the corpus, got {k}")
    if chunk is not None:
        check_count("chunk", chunk, 1)
    scores = indices = None
    with torch.no_grad():
        for start, end in documents.chunks(chunk):
            tokens, scale, mask, cu_seqlens = documents.read(start, end)
            options = {"reduction": reduction, "normalize": normalize, "y_cu_seqlens": cu_seqlens}
            if scale is not None:
                found = maxsim_int8(queries, tokens, scale, query_mask, mask, **options)
            else:
                found = maxsim(queries, tokens, query_mask, mask, directions="x_to_y", **options)
            places = torch.arange(start, end, device=found.device).expand(found.shape)
            if scores is not None:  # first, so that on ties the lower index stays first
                found, places = torch.cat([scores, found], 1), torch.cat([indices, places], 1)
            found, order = found.sort(dim=1, descending=True, stable=True)
            scores, indices = found[:, :k].clone(), places.gather(1, order[:, :k])
            if progress is not None:
                progress(end, documents.count)
    return scores, indices


class _Corpus:
    """Documents [N, T, D] or packed [L, D], and how to bring some of them to the queries."""

    def __init__(self, corpus: Any, mask: Any, cu_seqlens: Any, scale: Any, queries: Tensor, normalize: bool) -> None:
        kinds = {"corpus": corpus, "corpus_mask": mask, "corpus_cu_seqlens": cu_seqlens, "corpus_scale": scale}
        for name, value in kinds.items():
            if not isinstance(value, Tensor | np.ndarray) and (name == "corpus" or value is not None):
                raise TypeError(f"{name}: expected a tensor or a numpy array, got {type(value).__name__}")
        int8 = _dtype(corpus) == torch.int8
        if _dtype(corpus) not in (*DTYPES, torch.int8):
            raise TypeError(f"corpus: expected float32, float64, bfloat16, float16 or int8, got {corpus.dtype}")
        width = queries.shape[2]
        expected = "[L, D] with corpus_cu_seqlens" if cu_seqlens is not None else "[N, T, D]"
        if corpus.ndim != (2 if cu_seqlens is not None else 3):
            raise ValueError(f"corpus: expected shape {expected}, got {tuple(corpus.shape)}")
        if corpus.shape[-1] != width:
            raise ValueError(f"corpus: expected width {width} as queries have, got {corpus.shape[-1]}")
        if mask is not None and cu_seqlens is not None:
            raise ValueError("corpus_mask: expected None with corpus_cu_seqlens, got a mask")
        if mask is not None:
            _check_like("corpus_mask", mask, corpus, (torch.bool,))
        if (scale is not None) != int8:
            raise ValueError(f"corpus_scale: expected {'one for an' if int8 else 'None but for an'} int8 corpus")
        if scale is not None:
            _check_like("corpus_scale", scale, corpus, DTYPES)
        self.corpus, self.mask, self.scale, self.device = corpus, mask, scale, queries.device
        wide = torch.promote_types(torch.float32 if int8 else _dtype(corpus), queries.dtype)
        in_place = backends.choose("maxsim", KERNELS, self.device, wide) == "cpp" and (int8 or not normalize)
        self.token_bytes = max(1, queries.shape[2] * (_dtype(corpus) if in_place else wide).itemsize)
        self.score_bytes = max(1, queries.shape[0] * accumulate_dtype(wide).itemsize)  # of one document
        self.ends = None if cu_seqlens is None else _ends(cu_seqlens, corpus.shape[0])  # [N + 1] int64, on the host
        self.count = corpus.shape[0] if self.ends is None else len(self.ends) - 1

    def chunks(self, chunk: int | None) -> Iterator[tuple[int, int]]:
        tokens = max(1, CHUNK_BYTES // self.token_bytes)
        most = CHUNK_BYTES // self.score_bytes
        start = 0
        while start < self.count:
            if chunk is not None:
                end = start + chunk
            elif self.ends is None:
                end = start + min(most, tokens // max(1, self.corpus.shape[1]))
            else:
                end = min(start + most, int(np.searchsorted(self.ends, self.ends[start] + tokens, side="right")) - 1)
            end = min(self.count, max(end, start + 1))
            yield start, end
            start = end

    def read(self, start: int, end: int) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """Tokens, scale, mask and cu_seqlens of these documents on the queries' device."""
        cu_seqlens = None
        rows = slice(start, end)
        if self.ends is not None:
            cu_seqlens = torch.from_numpy(self.ends[start : end + 1] - self.ends[start]).to(self.device)
            rows = slice(int(self.ends[start]), int(self.ends[end]))
        tokens, scale, mask = (
            None if values is None else _tensor(values[rows], self.device) for values in (self.corpus, self.scale, self.mask)
        )
        return tokens, None if scale is None else scale.float(), mask, cu_seqlens


def _dtype(values: Array) -> torch.dtype | None:
    """None for what torch has no dtype of."""
    if isinstance(values, Tensor):
        return values.dtype
    try:
        return torch.from_numpy(np.empty(0, values.dtype)).dtype
    except (TypeError, ValueError):  # the latter for another order of bytes
        return None


def _tensor(values: Array, device: torch.device) -> Tensor:
    """The array's own memory where torch can have it, a memory-mapped file's pages too. Nothing may write to it."""
    if isinstance(values, np.ndarray):
        torch_like = values.flags.aligned and all(s >= 0 and s % values.itemsize == 0 for s in values.strides)
        values = torch.from_numpy(np.asarray(_Borrowed(values)) if torch_like else np.array(values))
    return values.to(device)


class _Borrowed:
    """An array's memory without the mark that it is read-only, at which torch would warn; it lives as long as this does."""

    def __init__(self, values: np.ndarray) -> None:
        self.values = values
        self.__array_interface__ = values.__array_interface__ | {"data": (values.ctypes.data, False)}


def _check_like(name: str, values: Array, corpus: Array, dtypes: tuple[torch.dtype, ...]) -> None:
    if _dtype(values) not in dtypes:
        raise TypeError(f"{name}: expected {' or '.join(str(dtype) for dtype in dtypes)}, got {values.dtype}")
    if values.shape != corpus.shape[:-1]:
        raise ValueError(f"{name}: expected shape {tuple(corpus.shape[:-1])}, got {tuple(values.shape)}")


def _ends(cu_seqlens: Array, length: int) -> np.ndarray:
    if _dtype(cu_seqlens) not in (torch.int32, torch.int64):
        raise TypeError(f"corpus_cu_seqlens: expected int32 or int64, got {cu_seqlens.dtype}")
    if cu_seqlens.ndim != 1 or not len(cu_seqlens):
        raise ValueError(f"corpus_cu_seqlens: expected a vector of N + 1 numbers, got shape {tuple(cu_seqlens.shape)}")
    ends = np.array(cu_seqlens.cpu().numpy() if isinstance(cu_seqlens, Tensor) else cu_seqlens, dtype=np.int64)
    if ends[0] != 0 or ends[-1] != length or (np.diff(ends) < 0).any():
        raise ValueError(f"corpus_cu_seqlens: expected numbers that never fall, from 0 to {length} tokens")
    return ends
