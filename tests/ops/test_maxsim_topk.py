"""maxsim_topk against a full sort of dense scores in float64: chunks, layouts, files, ties, memory."""

from __future__ import annotations

import gc
import itertools
import math
import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conformance import relative_error
from test_maxsim_losses import Largest, mask, tokens
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from vlpfast.ops import backends
from vlpfast.ops.maxsim import maxsim, maxsim_topk, quantize_tokens
from vlpfast.ops.maxsim import topk as module

pytestmark = pytest.mark.skipif(bool(backends.available()["cpp"]), reason="waits for the compiled library vlpfast/_C.so")


def dense(queries: Tensor, corpus: Tensor, query_mask: Tensor | None = None, corpus_mask: Tensor | None = None) -> Tensor:
    s = torch.einsum("qpd,ntd->qnpt", queries.double(), corpus.double())
    if corpus_mask is not None:
        s = s.masked_fill(~corpus_mask[:, None], -math.inf)
    best = s.max(3).values
    best = best.masked_fill(best == -math.inf, 0)
    return (best if query_mask is None else best * query_mask[:, None]).sum(2)


def ranked(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """By a plain sort of (-score, index)."""
    order = torch.tensor([sorted(range(len(row)), key=lambda i, row=row: (-float(row[i]), i))[:k] for row in scores])
    return scores.gather(1, order.reshape(len(scores), k)), order.reshape(len(scores), k)


def assert_found(found: tuple[Tensor, Tensor], scores: Tensor, k: int, bound: float = 1e-12) -> None:
    values, order = ranked(scores, k)
    assert torch.equal(found[1], order)
    assert relative_error(found[0], values) < bound


QUERIES, CORPUS = tokens(3, 4, 9, 0), tokens(37, 6, 9, 1)
MASKS = mask(3, 4, 2), mask(37, 6, 3)
LENGTHS = torch.tensor([3, 0, 1, 7, 2, 5] * 6 + [4])


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("chunk", [None, 1, 7, 36, 37, 100])
@pytest.mark.parametrize("k", [1, 5, 37])
def test_finds_the_best(k: int, chunk: int | None, backend: str) -> None:
    with backends.use(backend):
        assert_found(maxsim_topk(QUERIES, CORPUS, k, chunk=chunk), dense(QUERIES, CORPUS), k)
        found = maxsim_topk(QUERIES, CORPUS, k, query_mask=MASKS[0], corpus_mask=MASKS[1], chunk=chunk)
    assert_found(found, dense(QUERIES, CORPUS, *MASKS), k)
    assert found[0].dtype == torch.float64 and found[1].dtype == torch.int64


@pytest.mark.parametrize("chunk", [None, 1, 7, 40])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_packed_documents(dtype: torch.dtype, chunk: int | None) -> None:
    packed = tokens(1, int(LENGTHS.sum()), 9, 1)[0]
    ends = F.pad(LENGTHS.cumsum(0), (1, 0)).to(dtype)
    padded = torch.nn.utils.rnn.pad_sequence(list(packed.split(LENGTHS.tolist())), batch_first=True)
    kept = torch.arange(padded.shape[1]) < LENGTHS[:, None]
    for cu_seqlens in (ends, ends.numpy()):
        found = maxsim_topk(QUERIES, packed, 37, corpus_cu_seqlens=cu_seqlens, chunk=chunk)
        assert_found(found, dense(QUERIES, padded, None, kept), 37)


def test_chunks_hold_so_many_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed documents of 0 to 7 tokens, of 72 bytes each, and padded ones of 6."""
    monkeypatch.setattr(module, "CHUNK_BYTES", 10 * 72)
    packed, ends = tokens(1, int(LENGTHS.sum()), 9, 1)[0], F.pad(LENGTHS.cumsum(0), (1, 0))
    done: list[tuple[int, int]] = []
    found = maxsim_topk(QUERIES, packed, 3, corpus_cu_seqlens=ends, progress=lambda *d: done.append(d))
    reached = [0, *(d for d, _ in done)]
    sizes = [int(ends[b] - ends[a]) for a, b in itertools.pairwise(reached)]
    assert max(sizes) <= 10 and reached[-1] == 37 and all(total == 37 for _, total in done)
    assert all(size + int(LENGTHS[b]) > 10 for size, b in zip(sizes[:-1], reached[1:-1], strict=True))
    monkeypatch.setattr(module, "CHUNK_BYTES", 1)
    again = maxsim_topk(QUERIES, packed, 3, corpus_cu_seqlens=ends)
    assert torch.equal(found[1], again[1]) and torch.equal(found[0], again[0])
    done.clear()
    monkeypatch.setattr(module, "CHUNK_BYTES", 20 * 72)
    maxsim_topk(QUERIES, CORPUS, 3, progress=lambda *d: done.append(d))
    assert [d for d, _ in done] == [*range(3, 37, 3), 37]
    many = QUERIES[:1].expand(60, -1, -1)  # of scores 480 bytes a document
    for corpus, more in ((CORPUS, {}), (CORPUS.flatten(0, 1), {"corpus_cu_seqlens": torch.arange(0, 223, 6)})):
        done.clear()
        monkeypatch.setattr(module, "CHUNK_BYTES", 2 * 480)
        maxsim_topk(many, corpus, 3, progress=lambda *d: done.append(d), **more)
        assert [d for d, _ in done] == [*range(2, 37, 2), 37]


@pytest.mark.parametrize("chunk", [None, 5])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_int8_of_unit_length(backend: str, packed: bool, chunk: int | None) -> None:
    """The scale drops out: what a document's token stands for is a direction."""
    codes, scale = quantize_tokens(CORPUS)
    corpus = F.normalize(codes.double(), dim=-1)
    more: dict[str, Any] = {"corpus_scale": scale * torch.logspace(-9, 9, 37 * 6).reshape(37, 6), "chunk": chunk}
    if packed:
        codes = codes.flatten(0, 1)
        more |= {"corpus_cu_seqlens": torch.arange(0, 223, 6), "corpus_scale": more["corpus_scale"].flatten()}
    with backends.use(backend):
        for queries, bound in ((3 * QUERIES, 1e-13), (3 * QUERIES.float(), 1e-6)):
            found = maxsim_topk(queries, codes, 5, normalize=True, query_mask=MASKS[0], **more)
            assert_found(found, dense(QUERIES, corpus, MASKS[0]), 5, bound)


@pytest.mark.parametrize(
    ("dtype", "options", "number"),  # bytes of one number of a chunk
    [
        (torch.int8, {}, 1),
        (torch.int8, {"normalize": True}, 1),
        (torch.float16, {}, 2),
        (torch.float16, {"normalize": True}, 4),
        (torch.float32, {}, 4),
    ],
)
def test_chunks_hold_so_many_bytes_as_they_are_read_in(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, options: dict[str, Any], number: int
) -> None:
    codes, scale = quantize_tokens(CORPUS)
    corpus = codes if dtype == torch.int8 else CORPUS.to(dtype)
    options = options | {"corpus_scale": scale if dtype == torch.int8 else None}
    for backend, each in (("cpp", number), ("reference", 4)):
        monkeypatch.setattr(module, "CHUNK_BYTES", 18 * 9 * each + 8)
        done: list[tuple[int, int]] = []
        with backends.use(backend):
            maxsim_topk(QUERIES.float(), corpus, 3, progress=lambda *d, done=done: done.append(d), **options)
        assert [d for d, _ in done] == [*range(3, 37, 3), 37]


@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_ties_go_to_the_lowest_index(chunk: int) -> None:
    corpus = torch.ones(11, 2, 3)
    corpus[7] = 2
    scores, indices = maxsim_topk(torch.ones(2, 1, 3), corpus, 5, chunk=chunk)
    assert indices.tolist() == [[7, 0, 1, 2, 3]] * 2 and scores.tolist() == [[6, 3, 3, 3, 3]] * 2


@pytest.fixture
def files(tmp_path: Path) -> Iterator[Callable[[str, Any], np.ndarray]]:
    def write(name: str, values: Any) -> np.ndarray:
        np.save(tmp_path / f"{name}.npy", np.asarray(values))
        return np.load(tmp_path / f"{name}.npy", mmap_mode="r")

    yield write


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_memory_mapped_corpus(files: Callable[[str, Any], np.ndarray], dtype: type) -> None:
    corpus = files("corpus", CORPUS.numpy().astype(dtype))
    kept = files("mask", MASKS[1].numpy())
    assert isinstance(corpus, np.memmap)
    found = maxsim_topk(QUERIES.float(), corpus, 5, corpus_mask=kept, chunk=8)
    assert found[0].dtype == (torch.float64 if dtype == np.float64 else torch.float32)
    exact = dense(QUERIES.float(), torch.from_numpy(np.array(corpus)), None, MASKS[1])
    assert_found(found, exact, 5, 1e-12 if dtype == np.float64 else 1e-6)


@pytest.mark.parametrize("packed", [False, True])
def test_int8_with_a_scale_for_each_token(files: Callable[[str, Any], np.ndarray], packed: bool) -> None:
    scale = CORPUS.abs().amax(-1) / 127
    codes = (CORPUS / scale[..., None]).round().to(torch.int8)
    corpus = codes.double() * scale.half().double()[..., None]
    stored, scales = codes.numpy(), scale.numpy().astype(np.float16)
    more = {}
    if packed:
        stored, scales = stored.reshape(-1, 9), scales.reshape(-1)
        more = {"corpus_cu_seqlens": np.arange(0, 37 * 6 + 1, 6)}
    found = maxsim_topk(QUERIES.float(), files("codes", stored), 5, corpus_scale=files("scale", scales), chunk=5, **more)
    assert_found(found, dense(QUERIES, corpus), 5, 1e-6)
    assert relative_error(found[0], ranked(dense(QUERIES, CORPUS), 5)[0]) < 1e-2
    same = maxsim_topk(QUERIES.float(), torch.from_numpy(stored), 5, corpus_scale=torch.from_numpy(scales), **more)
    assert torch.equal(same[0], found[0]) and torch.equal(same[1], found[1])


def test_half_queries_mean_and_length() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        q, c = QUERIES.to(dtype), CORPUS.to(dtype)
        assert_found(maxsim_topk(q, c, 5, chunk=10), dense(q, c), 5, 1e-6)
    mean, order = maxsim_topk(QUERIES, CORPUS, 5, query_mask=MASKS[0], reduction="mean")
    total, same = maxsim_topk(QUERIES, CORPUS, 5, query_mask=MASKS[0])
    assert torch.equal(order, same)
    torch.testing.assert_close(mean * MASKS[0].sum(1, keepdim=True), total)
    assert_found(maxsim_topk(3 * QUERIES, CORPUS / 7, 5, normalize=True, chunk=3), dense(QUERIES, CORPUS), 5)


def test_scores_are_those_of_maxsim_and_nothing_is_differentiated() -> None:
    q, c = QUERIES.clone().requires_grad_(), CORPUS.clone().requires_grad_()
    scores, indices = maxsim_topk(q, c, 37, chunk=5)
    assert not scores.requires_grad
    expected = maxsim(QUERIES, CORPUS, directions="x_to_y", reduction="sum")
    torch.testing.assert_close(scores, expected.gather(1, indices))


def test_no_query_no_token_no_number() -> None:
    assert [t.shape for t in maxsim_topk(QUERIES[:0], CORPUS, 3)] == [(0, 3)] * 2
    scores, indices = maxsim_topk(QUERIES[:, :0], CORPUS, 3, chunk=2)
    assert not scores.any() and indices.tolist() == [[0, 1, 2]] * 3
    scores, indices = maxsim_topk(QUERIES, CORPUS[:, :0], 3)
    assert not scores.any() and indices.tolist() == [[0, 1, 2]] * 3
    corpus = CORPUS.clone()
    corpus[20, 3, 3] = math.nan
    for chunk in (None, 1, 9):
        scores, indices = maxsim_topk(QUERIES, corpus, 2, chunk=chunk)
        assert indices[:, 0].tolist() == [20] * 3 and scores[:, 0].isnan().all() and scores[:, 1].isfinite().all()


class Copied(TorchDispatchMode):
    """The bytes of the largest tensor that any operation gives outside of the memory of `file`."""

    def __init__(self, file: np.ndarray) -> None:
        super().__init__()
        self.begin, self.end, self.bytes, self.inside = file.ctypes.data, file.ctypes.data + file.nbytes, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else (out,):
            if isinstance(t, Tensor) and self.begin <= t.data_ptr() < self.end:
                self.inside = max(self.inside, t.numel() * t.itemsize)
            elif isinstance(t, Tensor):
                self.bytes = max(self.bytes, t.numel() * t.itemsize)
        return out


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [np.int8, np.float16, np.float32])
def test_pages_of_a_file_are_read_where_they_are(files: Callable[[str, Any], np.ndarray], dtype: type, packed: bool) -> None:
    codes, scale = quantize_tokens(tokens(300, 20, 33, 1))
    corpus, more = files("corpus", codes.numpy() if dtype == np.int8 else tokens(300, 20, 33, 1).numpy().astype(dtype)), {}
    if dtype == np.int8:
        more["corpus_scale"] = files("scale", scale.numpy())
    if packed:
        corpus, more = corpus.reshape(-1, 33), {name: s.reshape(-1) for name, s in more.items()}
        more["corpus_cu_seqlens"] = np.arange(0, 6001, 20)
    assert not corpus.flags.writeable
    queries = tokens(3, 7, 33, 0).float()
    torch.set_warn_always(True)
    try:
        with Copied(corpus) as copied, warnings.catch_warnings():
            warnings.simplefilter("error")  # torch's word about memory that may not be written to
            found = maxsim_topk(queries, corpus, 5, chunk=150, **more)
    finally:
        torch.set_warn_always(False)
    assert copied.inside == 150 * 20 * 33 * corpus.itemsize
    assert 8 * copied.bytes < copied.inside  # int8's scales, starts of documents, scores
    assert not corpus.flags.writeable
    exact = torch.from_numpy(np.array(corpus)).double().reshape(300, 20, 33)
    assert_found(found, dense(queries, exact * scale.double()[..., None] if dtype == np.int8 else exact), 5, 1e-6)


def test_arrays_that_torch_cannot_have_are_copied() -> None:
    def read(values: np.ndarray) -> tuple[Tensor, bool]:
        tensor = module._tensor(values, torch.device("cpu"))
        np.testing.assert_array_equal(tensor.numpy(), values)
        return tensor, tensor.data_ptr() == values.ctypes.data

    array = np.arange(60, dtype=np.float32).reshape(5, 4, 3)
    array.flags.writeable = False
    for values in (array, array[1:, ::2], array.transpose(2, 0, 1), np.broadcast_to(array[:1], (4, 4, 3))):
        assert read(values)[1]
    apart = np.zeros(4, dtype=[("a", "i1"), ("b", "f4")])["b"]  # every 5 bytes
    unaligned = np.frombuffer(bytes(range(41)), dtype=np.float32, offset=1)
    for values in (array[::-1], array[..., ::-1], apart, unaligned):
        assert not read(values)[1]
    assert not read(array[:0])[0].numel()
    owner = array.copy()
    gone, tensor = weakref.ref(owner), module._tensor(owner, torch.device("cpu"))
    del owner
    gc.collect()
    assert gone() is not None and tensor.tolist() == array.tolist()  # the tensor keeps it
    del tensor
    gc.collect()
    assert gone() is None
    codes, scale = quantize_tokens(CORPUS)
    backwards = codes.numpy()[::-1], scale.numpy()[::-1]
    found = maxsim_topk(QUERIES.float(), backwards[0], 5, corpus_scale=backwards[1], chunk=8)
    assert_found(found, dense(QUERIES, (codes * scale[..., None]).flip(0)), 5, 1e-6)


def test_scores_of_the_whole_corpus_are_not_held() -> None:
    queries, corpus = tokens(16, 4, 8, 0).float(), tokens(2000, 5, 8, 1).float().numpy()
    with Largest() as largest:
        maxsim_topk(queries, corpus, 3, chunk=50)
    assert largest.bytes <= 50 * 5 * 8 * 8 and 10 * largest.bytes < 16 * 2000 * 4


ONES, ENDS = torch.ones(4, 2, 3), torch.tensor([0, 3, 8])
INT8 = ONES.to(torch.int8)
WRONG: dict[str, tuple[type[Exception], Callable[[], Any]]] = {
    r"queries: expected shape \[Q, P, D\], got \(4, 3\)": (ValueError, lambda: maxsim_topk(ONES[:, 0], ONES, 1)),
    "queries_mask: expected torch.bool": (TypeError, lambda: maxsim_topk(ONES, ONES, 1, query_mask=torch.ones(4, 2))),
    "corpus: expected a tensor or a numpy array, got list": (TypeError, lambda: maxsim_topk(ONES, [1.0], 1)),
    "corpus: expected float32, .* or int8, got int64": (TypeError, lambda: maxsim_topk(ONES, np.ones((4, 2, 3), np.int64), 1)),
    "corpus: expected float32, .* or int8, got <U1": (TypeError, lambda: maxsim_topk(ONES, np.full((4, 2, 3), "a"), 1)),
    "corpus: expected float32, .* or int8, got >f4": (TypeError, lambda: maxsim_topk(ONES, np.ones((4, 2, 3), ">f4"), 1)),
    r"corpus: expected shape \[N, T, D\], got \(8, 3\)": (ValueError, lambda: maxsim_topk(ONES, ONES.flatten(0, 1), 1)),
    r"corpus: expected shape \[L, D\] with corpus_cu_seqlens, got \(4, 2, 3\)": (
        ValueError,
        lambda: maxsim_topk(ONES, ONES, 1, corpus_cu_seqlens=ENDS),
    ),
    "corpus: expected width 3 as queries have, got 2": (ValueError, lambda: maxsim_topk(ONES, ONES[..., :2], 1)),
    "k: expected at most the 4 documents of the corpus, got 5": (ValueError, lambda: maxsim_topk(ONES, ONES, 5)),
    "k: expected >= 1, got 0": (ValueError, lambda: maxsim_topk(ONES, ONES, 0)),
    "k: expected an int, got float": (TypeError, lambda: maxsim_topk(ONES, ONES, 1.0)),
    "chunk: expected >= 1, got 0": (ValueError, lambda: maxsim_topk(ONES, ONES, 1, chunk=0)),
    "corpus_mask: expected None with corpus_cu_seqlens": (
        ValueError,
        lambda: maxsim_topk(ONES, ONES.flatten(0, 1), 1, corpus_cu_seqlens=ENDS, corpus_mask=ENDS),
    ),
    r"corpus_mask: expected shape \(4, 2\), got \(4, 3\)": (
        ValueError,
        lambda: maxsim_topk(ONES, ONES, 1, corpus_mask=np.ones((4, 3), bool)),
    ),
    "corpus_mask: expected torch.bool, got uint8": (
        TypeError,
        lambda: maxsim_topk(ONES, ONES, 1, corpus_mask=np.ones((4, 2), np.uint8)),
    ),
    "corpus_cu_seqlens: expected numbers that never fall, from 0 to 8 tokens": (
        ValueError,
        lambda: maxsim_topk(ONES, ONES.flatten(0, 1), 1, corpus_cu_seqlens=ENDS.flip(0)),
    ),
    "corpus_cu_seqlens: expected int32 or int64, got torch.float32": (
        TypeError,
        lambda: maxsim_topk(ONES, ONES.flatten(0, 1), 1, corpus_cu_seqlens=ENDS.float()),
    ),
    r"corpus_cu_seqlens: expected a vector of N \+ 1 numbers, got shape \(1, 3\)": (
        ValueError,
        lambda: maxsim_topk(ONES, ONES.flatten(0, 1), 1, corpus_cu_seqlens=ENDS[None]),
    ),
    "corpus_scale: expected one for an int8 corpus": (ValueError, lambda: maxsim_topk(ONES, INT8, 1)),
    "corpus_scale: expected None but for an int8 corpus": (
        ValueError,
        lambda: maxsim_topk(ONES, ONES, 1, corpus_scale=ONES[..., 0]),
    ),
    r"corpus_scale: expected shape \(4, 2\), got \(4, 2, 3\)": (
        ValueError,
        lambda: maxsim_topk(ONES, INT8, 1, corpus_scale=ONES),
    ),
    "reduction: expected 'mean' or 'sum', got 'max'": (ValueError, lambda: maxsim_topk(ONES, ONES, 1, reduction="max")),
    "normalize: expected True or False, got 1": (TypeError, lambda: maxsim_topk(ONES, ONES, 1, normalize=1)),
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments_are_named(message: str) -> None:
    error, call = WRONG[message]
    with pytest.raises(error, match=message):
        call()
