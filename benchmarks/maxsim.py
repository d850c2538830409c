"""Late interaction: vlpfast beside the formulations in use, with time, memory and errors.

    python benchmarks/maxsim.py --device cpu --threads 1    every subject at its full size, float32
    python benchmarks/maxsim.py --device cpu --quick        small sizes, in seconds
    python benchmarks/maxsim.py --subject train --m 32 --n 32 --t 512

M sets of P tokens, N sets of T tokens of width D, every pair scored. The unit is the product of matrices of all tokens,
[M P, D] x [D, N T]; what gradients add to it grows with the tokens alone.
    rerank     ColBERT's score of one query and many documents: one direction, sum, forward alone
    train      ColBERT's in-batch scores, forward and backward
    cross      as `train`, long documents
    filip      FILIP's two mean similarities of images and texts, both directions, forward and backward
    search     the ten best of N documents in a memory-mapped file for each of M queries, the file in float32, float16 or int8
               (with a scale for each token); its pages are in memory before. "eager" has 32 documents in float32 at a time
"recompute" is stash_bytes = 0: winners are found again in the backward. Other packages take part where they can be imported;
maxsim_cpu runs in a process of its own, whose memory is not counted: what shows is the copy of the tokens that it is handed.
Results of `rerank` are checked at several lengths and widths; where one is wrong it is listed.
How time, memory and errors are taken is told in benchmarks/_measure.py.
"""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import _measure
import numpy as np
import torch
import torch.multiprocessing
import torch.nn.functional as F
from _measure import Formulation, Inputs, Size, Subject
from torch import Tensor

from vlpfast.ops.maxsim import maxsim, maxsim_topk, quantize_tokens


def inputs(size: Size, dtype: torch.dtype, device: str, *, gradients: bool = True) -> Inputs:
    """Unit vectors; half of the tokens of set n of y are near tokens of set n of x, as in a half-trained model."""
    generator = torch.Generator().manual_seed(0)
    m, n, p, t, d = (size[key] for key in "mnptd")
    x, y = (F.normalize(torch.randn(*shape, d, generator=generator), dim=-1) for shape in ((m, p), (n, t)))
    pairs, tokens = min(m, n), min(p, t // 2)
    y[:pairs, :tokens] = F.normalize(x[:pairs, :tokens] + y[:pairs, :tokens], dim=-1)
    return {name: v.to(device, dtype).requires_grad_(gradients) for name, v in (("x", x), ("y", y))}


def product(found: Inputs) -> None:
    """All products of tokens; where there are more than 2^30, slice by slice."""
    x, y = (found[name].flatten(0, 1) for name in ("x", "y"))
    for part in x.split(max(1, 2**30 // max(1, len(y)))):
        part @ y.T


# --- one direction, ColBERT -------------------------------------------------------------------------------------------


def colbert(x: Tensor, y: Tensor, **options: Any) -> Tensor:
    return maxsim(x, y, directions="x_to_y", reduction="sum", **options)


def eager(x: Tensor, y: Tensor) -> Tensor:
    return torch.einsum("mpd,ntd->mnpt", x, y).max(3).values.sum(2)


def training(device: str) -> dict[str, Formulation]:
    found = {
        "vlpfast": Formulation(colbert, 1),
        "vlpfast, recompute": Formulation(lambda x, y: colbert(x, y, stash_bytes=0), 2),
    }
    return found | one_direction(device, 3)


def reranking(device: str) -> dict[str, Formulation]:
    found = {"vlpfast": Formulation(colbert, 1)} | one_direction(device, 1)
    if device == "cpu" and find_spec("maxsim_cpu"):
        found["maxsim-cpu"] = Formulation(maxsim_cpu_apart, 1)
    return found


def one_direction(device: str, units: int) -> dict[str, Formulation]:
    """units: products that a dense formulation takes."""
    found = {"eager": Formulation(eager, units)}
    if find_spec("pylate"):
        from pylate.scores import colbert_scores

        found["pylate"] = Formulation(lambda x, y: colbert_scores(x, y, backend="torch"), units)
    if device == "cuda":
        found["eager, compiled"] = Formulation(torch.compile(eager), units)
        if find_spec("late_interaction_kernels"):
            from late_interaction_kernels.autograd import maxsim as lik

            found["late-interaction-kernels"] = Formulation(lik, 1)
        if find_spec("flash_maxsim"):
            from flash_maxsim import flash_maxsim_batched, flash_maxsim_batched_train

            flash = flash_maxsim_batched_train if units > 1 else flash_maxsim_batched
            found["flash-maxsim"] = Formulation(lambda x, y: flash(x, y, shared_docs=True), 1)
    return found


class Apart:
    """maxsim_cpu.maxsim_scores in a process that it may take down without taking this one; tokens are in shared memory."""

    def __init__(self) -> None:
        self.tokens: tuple[Tensor, ...] | None = None

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        if self.tokens is None or self.tokens[0] is not x or self.tokens[1] is not y:
            context = torch.multiprocessing.get_context("spawn")
            self.tokens = (x, y)
            self.connection, other = context.Pipe()
            shared = [t.detach().clone().share_memory_() for t in (x[0], y)]
            self.process = context.Process(target=serve, args=(other, *shared, torch.get_num_threads()), daemon=True)
            self.process.start()
            other.close()
        self.connection.send("score")
        try:
            return self.connection.recv()[None]
        except EOFError:
            self.process.join()
            raise RuntimeError(f"maxsim_cpu took its process down (exit code {self.process.exitcode})") from None


def serve(connection: Any, x: Tensor, y: Tensor, threads: int) -> None:
    os.environ["RAYON_NUM_THREADS"] = str(threads)
    import maxsim_cpu

    with suppress(EOFError):  # when the other end has gone
        while connection.recv():
            connection.send(torch.from_numpy(maxsim_cpu.maxsim_scores(x.numpy(), y.numpy())))


maxsim_cpu_apart = Apart()


# --- both directions, FILIP -------------------------------------------------------------------------------------------


def both(scores: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., Tensor]:
    """Their sum, weighted so that no two gradients are the same."""
    return lambda x, y: sum(
        (s * torch.linspace(0.5, 1.5, s.numel(), dtype=s.dtype, device=s.device).reshape(s.shape)).sum() for s in scores(x, y)
    )


def eager_both(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    products = torch.einsum("mpd,ntd->mnpt", x, y)
    return products.max(3).values.mean(2), products.max(2).values.mean(2)


def two_calls(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return maxsim(x, y, directions="x_to_y"), maxsim(x, y, directions="y_to_x")


def filip(device: str) -> dict[str, Formulation]:
    found = {
        "vlpfast": Formulation(both(maxsim), 1),
        "vlpfast, recompute": Formulation(both(lambda x, y: maxsim(x, y, stash_bytes=0)), 2),
        "vlpfast, two calls": Formulation(both(two_calls), 2),
        "eager": Formulation(both(eager_both), 3),
    }
    if device == "cuda":
        found["eager, compiled"] = Formulation(torch.compile(both(eager_both)), 3)
        if find_spec("late_interaction_kernels"):
            from late_interaction_kernels.autograd import maxsim as lik

            found["late-interaction-kernels"] = Formulation(
                both(lambda x, y: (lik(x, y) / x.shape[1], lik(y, x).T / y.shape[1])), 2
            )
    return found


# --- search -----------------------------------------------------------------------------------------------------------

BEST = 10
STEP = 32  # documents that eager has at a time


@functools.lru_cache(maxsize=2)
def documents(n: int, t: int, d: int) -> dict[str, Tensor]:
    """Unit tokens in files that are gone from their folder and live as long as they are mapped."""
    generator = torch.Generator().manual_seed(0)
    kinds = {"float32": (n, t, d), "float16": (n, t, d), "int8": (n, t, d), "scale": (n, t)}
    with tempfile.TemporaryDirectory() as folder:
        files = {
            name: np.lib.format.open_memmap(Path(folder, name), "w+", np.dtype("float32" if name == "scale" else name), shape)
            for name, shape in kinds.items()
        }
        for start in range(0, n, STEP):
            tokens = F.normalize(torch.randn(min(STEP, n - start), t, d, generator=generator), dim=-1)
            made = dict(zip(kinds, (tokens, tokens.half(), *quantize_tokens(tokens)), strict=True))
            for name, values in made.items():
                files[name][start : start + STEP] = values.numpy()
        found = {name: torch.from_numpy(np.load(Path(folder, name), mmap_mode="c")) for name in files}
    for values in found.values():
        values.sum()  # brings the pages in
    return found


def search_inputs(size: Size, dtype: torch.dtype, device: str) -> Inputs:
    x = F.normalize(torch.randn(size["m"], size["p"], size["d"], generator=torch.Generator().manual_seed(1)), dim=-1)
    return {"x": x.to(device, dtype), **documents(size["n"], size["t"], size["d"])}


def search(stored: str) -> Formulation:
    def function(x: Tensor, scale: Tensor, **files: Tensor) -> Tensor:
        return maxsim_topk(x, files[stored], BEST, corpus_scale=scale if stored == "int8" else None)[0]

    return Formulation(function, 1, reads(stored))


def eager_search(stored: str) -> Formulation:
    def function(x: Tensor, scale: Tensor, **files: Tensor) -> Tensor:
        found = []
        for start in range(0, len(scale), STEP):
            tokens = files[stored][start : start + STEP].to(x)
            if stored == "int8":
                tokens = tokens * scale[start : start + STEP, :, None].to(x)
            found.append(eager(x, tokens))
        return torch.cat(found, 1).topk(BEST).values

    return Formulation(function, 1, reads(stored))


def reads(stored: str) -> tuple[str, ...]:
    return (stored, "scale") if stored == "int8" else (stored,)


def searching(device: str) -> dict[str, Formulation]:
    return {
        f"{name}, {stored}": formulation(stored)
        for name, formulation in (("vlpfast", search), ("eager", eager_search))
        for stored in ("float32", "float16", "int8")
    }


def product_with_file(found: Inputs) -> None:
    rows = found["x"].flatten(0, 1)
    for part in found["float32"].split(STEP):
        rows @ part.flatten(0, 1).to(rows).T


def size(m: int, n: int, p: int, t: int, d: int) -> Size:
    return {"m": m, "n": n, "p": p, "t": t, "d": d}


def subject(
    formulations: Callable[[str], dict[str, Formulation]], full: Size, quick: Size, shapes: tuple[Size, ...] = (), **options: Any
) -> Subject:
    return Subject(
        "eager",
        lambda *arguments: inputs(*arguments, **options),
        formulations,
        {"cpu": (full,), "cuda": (full,), "quick": (quick,), "small": (quick,)},
        product,
        "products",
        work,
        1,
        shapes,
    )


def work(s: Size) -> int:
    return 2 * s["m"] * s["n"] * s["p"] * s["t"] * s["d"]


# lengths and widths of queries and documents in use, multiples of something and not
SHAPES = (
    *(
        size(1, 7, p, t, d)
        for p, t, d in ((1, 180, 128), (32, 30, 128), (32, 180, 128), (33, 180, 128), (48, 300, 96), (64, 64, 128), (17, 13, 50))
    ),
    size(1, 3, 128, 1024, 128),
    size(1, 3, 1024, 1024, 128),
)

SUBJECTS = {
    "rerank": subject(reranking, size(1, 1000, 32, 300, 128), size(1, 40, 32, 30, 128), SHAPES, gradients=False),
    "train": subject(training, size(64, 64, 32, 128, 128), size(8, 8, 32, 100, 128)),
    "cross": subject(training, size(128, 128, 32, 300, 128), size(8, 9, 32, 150, 128)),
    "filip": subject(filip, size(64, 64, 197, 77, 256), size(5, 6, 197, 77, 256)),
    "search": Subject(
        "eager, float32",
        search_inputs,
        searching,
        {
            "cpu": (size(32, 2000, 32, 300, 128),),
            "cuda": (size(32, 2000, 32, 300, 128),),
            "quick": (size(4, 60, 32, 30, 128),),
            "small": (size(4, 60, 32, 30, 128),),
        },
        product_with_file,
        "products",
        work,
        1,
    ),
}

if __name__ == "__main__":
    _measure.main("maxsim", SUBJECTS, __doc__)
