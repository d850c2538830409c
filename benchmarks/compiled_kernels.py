"""Compiles every Triton kernel of the project ahead of time, without a GPU: registers, spills, shared memory, instructions.

    python benchmarks/compiled_kernels.py            writes benchmarks/results/compiled/<chip>.json and docs/kernels.md
    python benchmarks/compiled_kernels.py --only pair_logsumexp --dtype bfloat16 --chip sm_90      only prints

An operator is in the table by one row in CALLS: a call of its kernels on meta tensors of the size that is reported. What it would
launch is compiled with the shipped tiles, as the launch would: divisibility by 16 of pointers, sizes and strides included.
Speeds are no part of it: they need a GPU.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vlpfast.ops import _triton
from vlpfast.ops._schemas import SEGMENT_MODES
from vlpfast.ops._triton import Launch
from vlpfast.ops.contrastive import triton_distill, triton_pair, triton_sample, triton_softplus
from vlpfast.ops.contrastive.distill import triton_width
from vlpfast.ops.maxsim import triton_kernels as triton_maxsim
from vlpfast.ops.maxsim import triton_score
from vlpfast.ops.temporal import triton_attention, triton_segments
from vlpfast.ops.temporal import triton_kernels as triton_temporal
from vlpfast.ops.tokens import triton_match, triton_merge, triton_merge_norm, triton_rows, triton_select

ROOT = Path(__file__).resolve().parents[1]
CHIPS = ("sm_80", "sm_90")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
N, D = 32768, 768
INSTRUCTIONS = {"HMMA": r"\bHMMA", "HGMMA": r"\bHGMMA", "UTMALDG": r"\bUTMALDG", "LDGSTS": r"\bLDGSTS", "MUFU": r"\bMUFU"}


def pair_logsumexp(dtype: torch.dtype, keep: int) -> None:
    """One step: forward, then backward with all gradients."""
    x, y = (torch.empty(N, D, dtype=dtype, device="meta") for _ in range(2))
    scale = torch.empty((), device="meta")
    problem = x, y, scale, None, None, 0, None, None
    rows, columns, *saved = triton_pair.forward(*problem, True, True, True, keep)
    triton_pair.backward(rows, columns, *problem, True, True, *saved, True, True, True, False)


def pair_logsumexp_rows(dtype: torch.dtype, keep: int) -> None:
    """The same for rows alone, with an index of own columns, as the head of a language model has it."""
    x, y = (torch.empty(N, D, dtype=dtype, device="meta") for _ in range(2))
    own = torch.empty(N, dtype=torch.int64, device="meta")
    problem = x, y, torch.empty((), device="meta"), None, own, None, None, None
    rows, columns, *saved = triton_pair.forward(*problem, True, False, False, keep)
    triton_pair.backward(rows, columns, *problem, True, False, *saved, True, True, False, False)


def pair_softplus(dtype: torch.dtype) -> None:
    """All gradients, with a bias."""
    x, y = (torch.empty(N, D, dtype=dtype, device="meta") for _ in range(2))
    scale, bias = (torch.empty((), device="meta") for _ in range(2))
    triton_softplus.forward(x, y, scale, bias, None, 0, None, None, 1.0, True, True, True, True)


def sample_hard_negatives(dtype: torch.dtype, uniform: float) -> None:
    """One for each row."""
    x, y = (torch.empty(N, D, dtype=dtype, device="meta") for _ in range(2))
    seed = torch.empty((), dtype=torch.int64, device="meta")
    triton_sample.sample(x, y, torch.empty((), device="meta"), None, 0, None, None, 1, uniform, seed)


def pair_distill(dtype: torch.dtype, need_y: bool) -> None:
    """64 rows against a queue of 65,536 in one pass, or a square problem with a gradient for y."""
    m, n, d = (N, N, D) if need_y else (64, 65536, triton_width(dtype))
    x, y = (torch.empty(size, d, dtype=dtype, device="meta") for size in (m, n))
    scale, offset = torch.empty((), device="meta"), 0 if need_y else None
    problem = x, y, x, None, scale, scale, None, None, offset, None, None
    student, _, cross, stats, _, stash = triton_distill.forward(*problem, not need_y, 0)
    if need_y:
        triton_distill.backward(student, cross, *problem, stats, stash, True, True)


def maxsim(dtype: torch.dtype, m: int, p: int, n: int, t: int, d: int, both: bool, own: int | None = None) -> None:
    """One step: the scores of m x n sets of p and t tokens, their winners kept, then both gradients; own: candidates each."""
    x, y = (torch.empty(size, d, dtype=dtype, device="meta") for size in (m * p, n * t))
    x_start, y_start = (torch.empty(sets + 1, dtype=torch.int64, device="meta") for sets in (m, n))
    problem = x, y, x_start, y_start, None, None, p, t, own
    x_to_y, y_to_x, *winners = triton_maxsim.forward(*problem, True, both, True, False, True)
    triton_maxsim.backward(x_to_y, y_to_x if both else None, *problem, True, False, *winners, True, True)


def frame_shift(dtype: torch.dtype, cyclic: bool) -> None:
    """All-in-one's roll of 8 x 8 frames, or TSM's shift in its own layout, and in place."""
    if cyclic:
        x = torch.empty(8, 8, 1, 197 * 768, dtype=dtype, device="meta")
        triton_temporal.frame_shift(x, 768, 25 * 768, 173 * 768, 197 * 768, True)
    else:
        x = torch.empty(2, 8, 1, 256 * 56 * 56, dtype=dtype, device="meta")
        fold = 32 * 56 * 56
        triton_temporal.frame_shift(x, fold, 2 * fold, 0, fold, False)
        triton_temporal.frame_shift_(x, fold, 2 * fold, 0, fold)


def pool_tokens(dtype: torch.dtype, largest: bool) -> None:
    """One step of 8 videos of 16 x 24 x 24 tokens to 16 x 12 x 12."""
    x = torch.empty(8, 16, 24, 24, 1024, dtype=dtype, device="meta")
    pooled, winners = triton_temporal.pool_tokens_fwd(x, 16, 12, 12, largest, True)
    triton_temporal.pool_tokens_bwd(pooled, winners, 16, 24, 24, largest)


def score_contrastive_loss(dtype: torch.dtype, smoothing: bool) -> None:
    """Loss and gradients of the scores of 128 x 128 sets, both ways: float32 whatever the features are."""
    if dtype != torch.float32:
        return
    x_to_y, y_to_x = (torch.empty(128, 128, device="meta") for _ in range(2))
    scale, weights = torch.empty((), device="meta"), torch.empty(128, device="meta")
    options = (scale, weights, weights) if smoothing else (None, None, None)
    triton_score.forward(x_to_y, y_to_x, scale, *options, 0, 0.0, 0.5, 0.5, True, True, True)


def segment_pool(dtype: torch.dtype, mode: int) -> None:
    """256 segments of 24576 tokens together; scores of 12 heads."""
    x = torch.empty(24576, 768, dtype=dtype, device="meta")
    start = torch.empty(257, dtype=torch.int64, device="meta")
    score = torch.empty(24576, 12, device="meta") if SEGMENT_MODES[mode] == "attention" else None
    pooled = triton_segments.forward(x, start, score, mode)
    triton_segments.backward(pooled, x, start, score, 24576, mode, True, score is not None)


def temporal_attention(dtype: torch.dtype, frames: int) -> None:
    """12 heads at 8 x 196 positions, from one product of queries, keys and values."""
    q, k, v = torch.empty(8, frames, 196, 3 * 768, dtype=dtype, device="meta").chunk(3, -1)
    out = triton_attention.forward(q, k, v, None, 12, 0.125, False)
    triton_attention.backward(out, q, k, v, None, 12, 0.125, False)


def match_tokens(dtype: torch.dtype) -> None:
    """ViT-B's tokens by their keys, r = 16."""
    metric = torch.empty(256, 197, 64, dtype=dtype, device="meta")
    triton_match.match(metric, None, None, 2, 1, 16, False, None)


def merge_tokens(dtype: torch.dtype, mean: bool, largest: bool) -> None:
    """One step with the tokens' sizes, for a mean with the gradient of these too."""
    x = torch.empty(256, 197, 768, dtype=dtype, device="meta")
    weight = torch.empty(256, 197, device="meta") if mean else None
    index, kept, source, target = (torch.empty(256, n, dtype=torch.int64, device="meta") for n in (197, 181, 16, 16))
    y, total = triton_merge.forward(x, weight, kept, source, target, mean, largest)
    triton_merge.backward(y, total, index, weight, total, x, mean, largest, True, mean)


def add_merge_norm(dtype: torch.dtype, half_delta: bool, c: int = 768) -> None:
    """One step with the tokens' sizes; half_delta: float32 tokens and a residual in bfloat16, as under autocast."""
    if half_delta and dtype != torch.float32:
        return
    x = torch.empty(256, 197, c, dtype=dtype, device="meta")
    delta = torch.empty_like(x, dtype=torch.bfloat16 if half_delta else dtype)
    size, weight, bias = (torch.empty(*shape, device="meta") for shape in ((256, 197), (c,), (c,)))
    index, kept, source, target = (torch.empty(256, n, dtype=torch.int64, device="meta") for n in (197, 181, 16, 16))
    y, _, normed, stats = triton_merge_norm.forward(x, delta, size, kept, source, target, weight, bias, 1e-5, True, False)
    of_delta = delta.dtype if half_delta else None
    triton_merge_norm.backward(y, normed, y, stats, size, index, kept, weight, of_delta, True, True)


def select_tokens(dtype: torch.dtype, normalize: bool) -> None:
    """One step: a class token and 70 % of the others stay, the rest is fused by scores in float32."""
    x, score = torch.empty(256, 197, 768, dtype=dtype, device="meta"), torch.empty(256, 197, device="meta")
    kept, indices = triton_select.forward(x, score, None, 137, 1, False, True, normalize)
    triton_select.backward(kept, x, score, None, indices, True, normalize, True, True)


def mask_tokens(dtype: torch.dtype) -> None:
    """One step: a quarter of the tokens stays, is put back beside the mask token, and the gradients of both."""
    x, token = torch.empty(256, 197, 768, dtype=dtype, device="meta"), torch.empty(768, device="meta")
    indices, inverse = triton_select.random_keep(torch.empty((), dtype=torch.int64, device="meta"), 256, 197, 49, 1, False)
    back = triton_rows.gather_rows(triton_rows.gather_rows(x, indices, None), inverse, token)
    triton_rows.filled_rows_sum(back, inverse)
    triton_rows.gather_rows(triton_rows.gather_rows(back, indices, None), inverse, None)


# operator -> a call with features of a dtype
CALLS: dict[str, Callable[[torch.dtype], None]] = {
    "pair_logsumexp, stash": lambda dtype: pair_logsumexp(dtype, N * N),
    "pair_logsumexp, recompute": lambda dtype: pair_logsumexp(dtype, 0),
    "pair_logsumexp, rows alone, stash": lambda dtype: pair_logsumexp_rows(dtype, 2 * N * N),
    "pair_logsumexp, rows alone, recompute": lambda dtype: pair_logsumexp_rows(dtype, 0),
    "pair_softplus": pair_softplus,
    "pair_distill, one pass": lambda dtype: pair_distill(dtype, False),
    "pair_distill, recompute": lambda dtype: pair_distill(dtype, True),
    "maxsim, 128 x 128 sets of 32 and 300, D 128": lambda dtype: maxsim(dtype, 128, 32, 128, 300, 128, False),
    "maxsim, 128 x 128 sets of 197 and 77, D 256, both ways": lambda dtype: maxsim(dtype, 128, 197, 128, 77, 256, True),
    "maxsim, 128 sets of 32, 16 candidates of 300 each, D 128": lambda dtype: maxsim(dtype, 128, 32, 2048, 300, 128, False, 16),
    "score_contrastive_loss": lambda dtype: score_contrastive_loss(dtype, False),
    "score_contrastive_loss, smoothing, weights": lambda dtype: score_contrastive_loss(dtype, True),
    "sample_hard_negatives": lambda dtype: sample_hard_negatives(dtype, 0.0),
    "sample_hard_negatives, uniform part": lambda dtype: sample_hard_negatives(dtype, 1e-4),
    "token_roll, 8 x 8 frames of 197 tokens, D 768": lambda dtype: frame_shift(dtype, True),
    "channel_shift, 16 frames of 256 x 56 x 56": lambda dtype: frame_shift(dtype, False),
    "pool_tokens, mean": lambda dtype: pool_tokens(dtype, False),
    "pool_tokens, largest": lambda dtype: pool_tokens(dtype, True),
    "segment_pool, mean": lambda dtype: segment_pool(dtype, 0),
    "segment_pool, max": lambda dtype: segment_pool(dtype, 1),
    "segment_pool, logsumexp": lambda dtype: segment_pool(dtype, 2),
    "segment_pool, attention": lambda dtype: segment_pool(dtype, 3),
    "temporal_attention, 8 frames": lambda dtype: temporal_attention(dtype, 8),
    "temporal_attention, 32 frames": lambda dtype: temporal_attention(dtype, 32),
    "bipartite_match, 256 images of 197 tokens, C 64, r 16": match_tokens,
    "merge, weighted, 256 images of 197 tokens, C 768, r 16": lambda dtype: merge_tokens(dtype, True, False),
    "merge, sum": lambda dtype: merge_tokens(dtype, False, False),
    "merge, largest": lambda dtype: merge_tokens(dtype, False, True),
    "add_merge_norm, weighted, 256 images of 197 tokens, C 768, r 16": lambda dtype: add_merge_norm(dtype, False),
    "add_merge_norm, a residual in bfloat16": lambda dtype: add_merge_norm(dtype, True),
    "add_merge_norm, C 4096": lambda dtype: add_merge_norm(dtype, False, 4096),
    "select, 256 images of 197 tokens, C 768, k 137, fused": lambda dtype: select_tokens(dtype, False),
    "select, normalised": lambda dtype: select_tokens(dtype, True),
    "random_mask, 256 images of 197 tokens, C 768, 75 %": mask_tokens,
}


@dataclass
class Compiled:
    kernel: str
    operators: list[str]
    dtype: str
    tile: str
    programs: int
    registers: int
    spills: int  # bytes of local memory a thread
    shared: int  # bytes
    instructions: dict[str, int]


def compile_launch(launch: Launch, chip: str) -> tuple[Any, dict[str, int]]:
    """Triton's compiled kernel, and its block sizes and options, specialised as the launcher specialises its arguments."""
    names = launch.kernel.arg_names
    constant = {p.name for p in launch.kernel.params if p.is_constexpr}
    signature, constants, attributes = {}, {}, {}
    for i, name in enumerate(names):
        value = launch.arguments[name]
        if name in constant or value is None or (isinstance(value, int) and value == 1):
            signature[name], constants[name] = "constexpr", value
            continue
        if isinstance(value, Tensor):
            dtype = {"uint8": "u8", "bool": "i1", "int16": "i16", "int32": "i32", "int64": "i64"}
            dtype |= {"float64": "fp64", "float32": "fp32", "float16": "fp16"}
            signature[name] = "*" + dtype.get(str(value.dtype).removeprefix("torch."), "bf16")
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
        if isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0):
            attributes[(i,)] = [["tt.divisibility", 16]]
    options = {k: v for k, v in launch.arguments.items() if k not in names}
    source = ASTSource(launch.kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", int(chip.removeprefix("sm_")), 32), options=options)
    shown = ("GROUP", "num_warps", "num_stages")
    return compiled, {k: v for k, v in launch.arguments.items() if k.startswith("BLOCK_") or k in shown}


def read(compiled: Any) -> tuple[int, int, int, dict[str, int]]:
    """Registers, bytes of local memory, bytes of shared memory, instructions: from the machine code."""
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run([tools / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
        code = subprocess.run([tools / "cuobjdump", "-sass", file.name], capture_output=True, text=True, check=True).stdout
    registers, local = (int(re.search(rf"\b{what}:(\d+)", usage)[1]) for what in ("REG", "LOCAL"))
    stack = int(re.search(r"\bSTACK:(\d+)", usage)[1])
    counts = {name: len(re.findall(pattern, code)) for name, pattern in INSTRUCTIONS.items()}
    return registers, max(local, stack), compiled.metadata.shared, counts


def table(chip: str, only: str = "", dtypes: tuple[torch.dtype, ...] = DTYPES, kernel: str = "") -> list[Compiled]:
    """Every kernel whose name contains `kernel`, once for each way it is specialised."""
    found: dict[tuple[str, str], Compiled] = {}
    for operator, call in CALLS.items():
        if only not in operator:
            continue
        for dtype in dtypes:
            with _triton.recording(chip) as launches:
                call(dtype)
            for launch in launches:
                if kernel not in launch.kernel.__name__:
                    continue
                compiled, tile = compile_launch(launch, chip)
                key = compiled.hash, str(dtype)
                if key not in found:
                    found[key] = Compiled(
                        launch.kernel.__name__.lstrip("_") + variant(launch), [], str(dtype).removeprefix("torch."),
                        " ".join(f"{k.removeprefix('BLOCK_')}={v}" for k, v in tile.items()), launch.grid[0], *read(compiled),
                    )  # fmt: skip
                if operator not in found[key].operators:
                    found[key].operators.append(operator)
    return list(found.values())


def variant(launch: Launch) -> str:
    """Which of a kernel's forms it is, by the constants that choose one."""
    along = {1: " (rows)", 0: " (columns)", None: ""}[launch.arguments.get("ALONG")]
    if "kept_line" in launch.arguments:
        along = " (rows)" if launch.arguments["kept_other"] == 1 else " (columns)"
    if launch.kernel.__name__ in ("_pool", "_pool_gradient") and launch.arguments["winners"] is not None:
        along = ", largest"
    if "MODE" in launch.arguments:
        along = f", {SEGMENT_MODES[launch.arguments['MODE']]}"
    if "QUERIES" in launch.arguments:
        along = f", {launch.arguments['QUERIES']} frames"
    parts = launch.arguments.get("FIRST"), launch.arguments.get("WHOLE")
    kept = ", kept" if launch.arguments.get("kept_rows") is not None else ""
    sums = ", summed" if launch.arguments.get("row_partial") is not None else ""
    if launch.kernel.__name__ in ("_centred", "_centred_gradient") and (
        launch.arguments.get("row_shifts") is not None or launch.arguments.get("COLUMNS")
    ):
        along += ", rows alone"
    return along + sums + kept + {(True, False): ", first chunk", (False, False): ", next chunk"}.get(parts, "")


def page(results: dict[str, list[Compiled]]) -> str:
    """docs/kernels.md"""
    tables = []
    for chip, kernels in results.items():
        rows = [
            f"| {k.kernel} | {k.dtype} | {k.tile} | {k.registers} | {k.spills} | {k.shared // 1024} | "
            + ", ".join(f"{count} {name}" for name, count in k.instructions.items() if count)
            + " |"
            for k in kernels
        ]
        head = "| kernel | features | tile | registers | spilled bytes | shared KiB | instructions |\n" + "|---" * 7 + "|\n"
        tables.append(f"## {chip}\n\n{head}" + "\n".join(rows))
    template = Path(__file__).with_name("compiled_kernels.md").read_text()
    return template.format(n=N, d=D, triton=triton.__version__, tables="\n\n".join(tables))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="operators whose name contains this; nothing is written then")
    parser.add_argument("--kernel", default="", help="likewise, kernels whose name contains this")
    parser.add_argument("--chip", choices=CHIPS, help="likewise")
    parser.add_argument("--dtype", choices=[str(d).removeprefix("torch.") for d in DTYPES], help="likewise")
    args = parser.parse_args()
    if _triton.INTERPRETED.value:
        raise SystemExit("TRITON_INTERPRET is set: the interpreter compiles nothing")
    dtypes = tuple(d for d in DTYPES if args.dtype in (None, str(d).removeprefix("torch.")))
    results = {chip: table(chip, args.only, dtypes, args.kernel) for chip in ([args.chip] if args.chip else CHIPS)}
    for chip, kernels in results.items():
        for k in kernels:
            print(json.dumps({"chip": chip} | asdict(k)))
    if args.only or args.kernel or args.chip or args.dtype:
        return
    folder = ROOT / "benchmarks/results/compiled"
    folder.mkdir(parents=True, exist_ok=True)
    for chip, kernels in results.items():
        record = {"chip": chip, "triton": triton.__version__, "n": N, "d": D, "kernels": [asdict(k) for k in kernels]}
        (folder / f"{chip}.json").write_text(json.dumps(record, indent=1) + "\n")
    (ROOT / "docs/kernels.md").write_text(page(results))


if __name__ == "__main__":
    main()
