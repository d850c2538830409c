"""CLIP's loss, forward and backward: vlpfast beside open_clip's formulation and other losses, with time, memory and errors.

    python benchmarks/contrastive.py --device cpu            N = 4096 and 8192, D = 512, float32
    python benchmarks/contrastive.py --device cpu --quick    N = 1024, in seconds

Time: every formulation takes its turn in each of the --repeats rounds, and so does the plain matrix product of the same size
(x @ y.T), in whose units the last column counts: "products". The smallest and the median time of the rounds are shown.
Memory: beyond the inputs, at the peak of one forward and backward; the gradients (2 N D numbers) are part of it. On a CPU each
formulation runs in a process of its own, and the figure is the growth of its resident memory (VmHWM after, VmRSS before); on a
GPU it is torch.cuda.max_memory_allocated.
Errors: of loss and gradients against float64, relative (Frobenius), on the first rows of the same features (at most 1024).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vlpfast.ops import backends
from vlpfast.ops.contrastive import KERNELS, clip_loss

ROOT = Path(__file__).resolve().parents[1]
SCALE = 1 / 0.07  # CLIP's initial temperature
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Formulation:
    loss: Loss  # (x [N, D], y [N, D], scale []) -> []
    products: float  # matrix products that it takes forward and backward, by its own count
    scale_gradient: bool = True


def two_matrices(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    """As open_clip writes it: one matrix of logits for each direction, two cross-entropies."""
    labels = torch.arange(len(x), device=x.device)
    return (F.cross_entropy(scale * x @ y.T, labels) + F.cross_entropy(scale * y @ x.T, labels)) / 2


def one_matrix(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    labels = torch.arange(len(x), device=x.device)
    logits = scale * x @ y.T
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def part_kept(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    """With the largest stash that stays under a tenth of what two_matrices holds at N = 8192, D = 512."""
    size = len(x) * len(y) * max(4, x.dtype.itemsize)
    return clip_loss(x, y, scale, stash_bytes=int(0.18 * size))


def formulations(device: str) -> dict[str, Formulation]:
    found = {
        "vlpfast, stash": Formulation(clip_loss, 3),
        "vlpfast, part": Formulation(part_kept, 3.82),
        "vlpfast, recompute": Formulation(lambda x, y, scale: clip_loss(x, y, scale, stash_bytes=0), 4),
        "open_clip": Formulation(two_matrices, 6),
        "one matrix": Formulation(one_matrix, 3),
    }
    if backends.choose("clip_loss", KERNELS, torch.device(device)) == "reference":
        for plan in ("stash", "part", "recompute"):
            del found[f"vlpfast, {plan}"]
        found = {"vlpfast, reference": Formulation(clip_loss, 3)} | found
    if device == "cuda":
        found["open_clip, compiled"] = Formulation(torch.compile(two_matrices), 6)
        if find_spec("memeff"):
            from memeff import MemoryEfficientCLIPLoss

            loss = MemoryEfficientCLIPLoss(temperature=1 / SCALE, normalized_inputs=True, stable=False)
            found["memeff"] = Formulation(lambda x, y, scale: loss(x, y), 4, scale_gradient=False)
        if find_spec("inf_cl"):
            from inf_cl import cal_flash_loss

            def inf_cl(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
                return (cal_flash_loss(x, y, scale=scale).mean() + cal_flash_loss(y, x, scale=scale).mean()) / 2

            found["inf-cl"] = Formulation(inf_cl, 10)
    return found


def make_inputs(n: int, d: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Unit vectors as a half-trained model gives them: row i of y is nearest to row i of x."""
    generator = torch.Generator().manual_seed(0)
    x = F.normalize(torch.randn(n, d, generator=generator), dim=1)
    y = F.normalize(x + 1.5 * F.normalize(torch.randn(n, d, generator=generator), dim=1), dim=1)
    x, y = (t.to(device, dtype).requires_grad_() for t in (x, y))
    return x, y, torch.tensor(SCALE, device=device, requires_grad=True)


def step(formulation: Formulation, inputs: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Loss and gradients of one forward and backward."""
    for t in inputs:
        t.grad = None
    loss = formulation.loss(*inputs)
    loss.backward()
    return (loss.detach(), *(t.grad for t in inputs))


def seconds(function: Callable[[], Any], device: str) -> float:
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3
    before = time.perf_counter()
    function()
    return time.perf_counter() - before


def times(n: int, d: int, dtype: torch.dtype, device: str, repeats: int) -> dict[str, list[float]]:
    inputs = make_inputs(n, d, dtype, device)
    x, y = (t.detach() for t in inputs[:2])
    table = {"product": lambda: x @ y.T}
    table |= {name: lambda f=f: step(f, inputs) for name, f in formulations(device).items()}
    found: dict[str, list[float]] = {name: [] for name in table}
    for function in table.values():
        function()  # warm up, compile
    for _ in range(repeats):
        for name, function in table.items():
            found[name].append(seconds(function, device))
    return found


def extra_memory(name: str, n: int, d: int, dtype: torch.dtype, device: str) -> int:
    """Bytes beyond the inputs at the peak of one forward and backward. On a CPU: of this process, so call it in a fresh one."""
    formulation = formulations(device)[name]
    step(formulation, make_inputs(64, d, dtype, device))  # what libraries set up once does not count
    inputs = make_inputs(n, d, dtype, device)
    if device == "cuda":
        step(formulation, inputs)  # compiled code is ready
        for t in inputs:
            t.grad = None
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(formulation, inputs)
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again
    before = process_memory("VmRSS")
    step(formulation, inputs)
    return process_memory("VmHWM") - before


def process_memory(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{field}:\s+(\d+) kB", status).group(1)) * 1024


def memory_in_a_process(name: str, n: int, d: int, dtype: str, device: str, threads: int) -> int:
    if device == "cuda":
        return extra_memory(name, n, d, getattr(torch, dtype), device)
    command = [sys.executable, __file__, "--memory-of", name, "--n", str(n), "--d", str(d), "--dtype", dtype]
    done = subprocess.run(
        [*command, "--device", device, "--threads", str(threads)], capture_output=True, text=True, check=True, env=environment()
    )
    return int(done.stdout.splitlines()[-1])


def environment() -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return os.environ | {"PYTHONPATH": path, "MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed goes back at once


def errors(n: int, d: int, dtype: torch.dtype, device: str) -> dict[str, dict[str, float]]:
    rows = min(n, 1024)
    inputs = tuple(t.detach()[:rows].clone().requires_grad_() if t.ndim else t for t in make_inputs(n, d, dtype, device))
    exact_inputs = tuple(t.detach().double().requires_grad_() for t in inputs)
    with backends.use("reference"):
        exact = step(Formulation(clip_loss, 3), exact_inputs)

    def relative(a: Tensor | None, b: Tensor) -> float:
        return float("nan") if a is None else float((a.double() - b).norm() / b.norm())

    return {
        name: dict(zip(("loss", "dx", "dy", "dscale"), map(relative, step(f, inputs), exact), strict=True))
        for name, f in formulations(device).items()
    }


def machine(device: str, threads: int) -> dict[str, Any]:
    names = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()) if Path("/proc/cpuinfo").exists() else []
    processor = names[0] if names else platform.machine()
    name = torch.cuda.get_device_name() if device == "cuda" else f"{processor} {os.cpu_count()} cores"
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    return {
        "machine": re.sub(r"\W+", "-", name).strip("-"),
        "processor": processor,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "device": device,
        "threads": threads,
        "torch": torch.__version__,
        "commit": subprocess.run(describe, cwd=ROOT, capture_output=True, text=True).stdout.strip() or "unknown",
        "backends": backends.available(),
    }


def measure(n: int, d: int, dtype: str, device: str, threads: int, repeats: int) -> list[dict[str, Any]]:
    """One row for each formulation."""
    timed = times(n, d, getattr(torch, dtype), device, repeats)
    product = timed.pop("product")
    wrong = errors(n, d, getattr(torch, dtype), device)
    table = formulations(device)
    flops = 2 * n * n * d
    return [
        {
            "n": n,
            "d": d,
            "dtype": dtype,
            "name": name,
            "seconds_min": min(found),
            "seconds_median": statistics.median(found),
            "products": min(found) / min(product),
            "gflops": table[name].products * flops / min(found) / 1e9,
            "product_gflops": flops / min(product) / 1e9,
            "extra_bytes": memory_in_a_process(name, n, d, dtype, device, threads),
            "gradient_bytes": 2 * n * d * getattr(torch, dtype).itemsize,
            "errors": wrong[name],
        }
        for name, found in timed.items()
    ]


def show(rows: list[dict[str, Any]]) -> None:
    base = next(row for row in rows if row["name"] == "open_clip")
    n, d, dtype, rate = (rows[0][key] for key in ("n", "d", "dtype", "product_gflops"))
    gradients = rows[0]["gradient_bytes"] / 2**20
    print(f"\nN = {n}, D = {d}, {dtype}: one product runs at {rate:.0f} GFLOP/s; of the memory {gradients:.0f} MiB are gradients")
    columns = f"{'min':>9} {'median':>9} {'faster':>7} {'products':>9} {'GFLOP/s':>8} {'MiB':>8} {'memory':>7}"
    print(f"{'':22}{columns}   error of loss, gradients")
    for row in rows:
        gradient = max(value for key, value in row["errors"].items() if key != "loss" and value == value)
        print(
            f"{row['name']:22}{row['seconds_min'] * 1e3:7.1f}ms {row['seconds_median'] * 1e3:7.1f}ms"
            f" {base['seconds_min'] / row['seconds_min']:6.2f}x {row['products']:9.2f} {row['gflops']:8.0f}"
            f" {row['extra_bytes'] / 2**20:8.1f} {row['extra_bytes'] / base['extra_bytes']:7.3f}"
            f"   {row['errors']['loss']:.0e} {gradient:.0e}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--n", type=int, nargs="+", help="rows of each side (default: 4096 8192; on a GPU 8192 32768)")
    parser.add_argument("--d", type=int, default=512, help="width of the features")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: float32; on a GPU bfloat16")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the CPU")
    parser.add_argument("--repeats", type=int, default=5, help="rounds")
    parser.add_argument("--json", type=Path, help="default: results/MACHINE/contrastive-DEVICE.json; with --quick none")
    parser.add_argument("--quick", action="store_true", help="N = 1024, two rounds")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device")
    torch.set_num_threads(args.threads)
    dtype = args.dtype or ("bfloat16" if args.device == "cuda" else "float32")
    if args.memory_of:
        print(extra_memory(args.memory_of, args.n[0], args.d, getattr(torch, dtype), args.device))
        return
    sizes = args.n or ([1024] if args.quick else [8192, 32768] if args.device == "cuda" else [4096, 8192])
    repeats = 2 if args.quick else args.repeats
    about = machine(args.device, args.threads)
    print(", ".join(f"{key} {about[key]}" for key in ("machine", "processor", "instructions", "threads", "torch", "commit")))
    print("vlpfast, stash: the default plan (stash_bytes = 4 GiB); part: 18 % of the exponentials are kept; recompute: none")
    rows = []
    for n in sizes:
        measured = measure(n, args.d, dtype, args.device, args.threads, repeats)
        show(measured)
        rows += measured
    path = args.json
    if path is None and not args.quick:
        path = ROOT / "benchmarks/results" / about["machine"] / f"contrastive-{args.device}.json"
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(about | {"scale": SCALE, "repeats": repeats, "rows": rows}, indent=1) + "\n")
        print(f"\nwritten: {path}")


if __name__ == "__main__":
    main()
