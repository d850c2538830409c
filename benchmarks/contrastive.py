"""Contrastive losses, forward and backward: vlpfast beside the formulations in use, with time, memory and errors.

    python benchmarks/contrastive.py --device cpu            every loss; CLIP's at N = 4096 and 8192, D = 512, float32
    python benchmarks/contrastive.py --device cpu --quick    small sizes, in seconds
    python benchmarks/contrastive.py --loss clip --n 65536 --only "vlpfast, recompute"

Losses: `clip` (InfoNCE in both directions), `sigmoid` (SigLIP).
Time: every formulation takes its turn in each of the --repeats rounds, and so does the plain matrix product of the same size
(rows @ columns.T), in whose units the column "products" counts. The smallest and the median time of the rounds are shown.
Memory: beyond the inputs, at the peak of one forward and backward; the gradients are part of it. On a CPU each formulation runs
in a process of its own, and the figure is the growth of its resident memory (VmHWM after, VmRSS before); on a GPU it is
torch.cuda.max_memory_allocated.
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
from vlpfast.ops.contrastive import KERNELS, clip_loss, sigmoid_loss

ROOT = Path(__file__).resolve().parents[1]
Inputs = dict[str, Tensor]  # those that require a gradient are leaves


@dataclass(frozen=True)
class Formulation:
    loss: Callable[..., Tensor]  # (**inputs) -> []
    products: float  # matrix products that it takes forward and backward, by its own count


@dataclass(frozen=True)
class Subject:
    """A loss with its inputs and its formulations; the first one of vlpfast's is what float64 errors are measured with."""

    base: str  # the formulation that ratios refer to
    inputs: Callable[[int, int, torch.dtype, str], Inputs]  # n, d, dtype, device
    formulations: Callable[[str], dict[str, Formulation]]  # device
    sizes: dict[str, tuple[int, ...]]  # cpu, cuda, quick
    width: int


def half_trained(n: int, d: int) -> tuple[Tensor, Tensor]:
    """Unit vectors as a half-trained model gives them: row i of y is nearest to row i of x."""
    generator = torch.Generator().manual_seed(0)
    x = F.normalize(torch.randn(n, d, generator=generator), dim=1)
    return x, F.normalize(x + 1.5 * F.normalize(torch.randn(n, d, generator=generator), dim=1), dim=1)


# --- CLIP -------------------------------------------------------------------------------------------------------------

CLIP_SCALE = 1 / 0.07


def clip_inputs(n: int, d: int, dtype: torch.dtype, device: str) -> Inputs:
    x, y = (t.to(device, dtype).requires_grad_() for t in half_trained(n, d))
    return {"x": x, "y": y, "scale": torch.tensor(CLIP_SCALE, device=device, requires_grad=True)}


def two_matrices(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    """As open_clip writes it: one matrix of logits for each direction, two cross-entropies."""
    labels = torch.arange(len(x), device=x.device)
    return (F.cross_entropy(scale * x @ y.T, labels) + F.cross_entropy(scale * y @ x.T, labels)) / 2


def one_matrix(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    labels = torch.arange(len(x), device=x.device)
    logits = scale * x @ y.T
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def clip_formulations(device: str) -> dict[str, Formulation]:
    found = {
        "vlpfast, stash": Formulation(clip_loss, 3),
        "vlpfast, recompute": Formulation(lambda x, y, scale: clip_loss(x, y, scale, stash_bytes=0), 4),
        "open_clip": Formulation(two_matrices, 6),
        "one matrix": Formulation(one_matrix, 3),
    }
    if device == "cuda":
        found["open_clip, compiled"] = Formulation(torch.compile(two_matrices), 6)
        if find_spec("memeff"):
            from memeff import MemoryEfficientCLIPLoss

            loss = MemoryEfficientCLIPLoss(temperature=1 / CLIP_SCALE, normalized_inputs=True, stable=False)
            found["memeff"] = Formulation(lambda x, y, scale: loss(x, y), 4)  # its scale has no gradient
        if find_spec("inf_cl"):
            from inf_cl import cal_flash_loss

            def inf_cl(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
                return (cal_flash_loss(x, y, scale=scale).mean() + cal_flash_loss(y, x, scale=scale).mean()) / 2

            found["inf-cl"] = Formulation(inf_cl, 10)
    return found


# --- SigLIP -----------------------------------------------------------------------------------------------------------


def sigmoid_inputs(n: int, d: int, dtype: torch.dtype, device: str) -> Inputs:
    scale, bias = (torch.tensor(v, device=device, requires_grad=True) for v in (10.0, -10.0))
    return clip_inputs(n, d, dtype, device) | {"scale": scale, "bias": bias}


def dense_sigmoid(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """As open_clip writes it on one process: labels of 1 and -1 as a matrix."""
    logits = scale * x @ y.T + bias
    labels = 2 * torch.eye(len(x), device=x.device, dtype=logits.dtype) - 1
    return -F.logsigmoid(labels * logits).sum() / len(x)


def sigmoid_formulations(device: str) -> dict[str, Formulation]:
    found = {"vlpfast": Formulation(sigmoid_loss, 3), "open_clip": Formulation(dense_sigmoid, 3)}
    if device == "cuda":
        found["open_clip, compiled"] = Formulation(torch.compile(dense_sigmoid), 3)
    return found


SUBJECTS = {
    "clip": Subject(
        "open_clip", clip_inputs, clip_formulations, {"cpu": (4096, 8192), "cuda": (8192, 32768), "quick": (1024,)}, 512
    ),
    "sigmoid": Subject(
        "open_clip", sigmoid_inputs, sigmoid_formulations, {"cpu": (8192,), "cuda": (32768,), "quick": (1024,)}, 512
    ),
}


# --- measuring --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    loss: str
    n: int
    d: int
    dtype: str
    device: str

    @property
    def subject(self) -> Subject:
        return SUBJECTS[self.loss]

    def inputs(self, n: int | None = None) -> Inputs:
        return self.subject.inputs(n or self.n, self.d, getattr(torch, self.dtype), self.device)

    def formulations(self, only: str | None = None) -> dict[str, Formulation]:
        found = self.subject.formulations(self.device)
        if backends.choose(f"{self.loss}_loss", KERNELS, torch.device(self.device)) == "reference":
            found = {("vlpfast, reference" if name == "vlpfast, stash" else name): f for name, f in found.items()}
            found.pop("vlpfast, recompute", None)
        return {name: f for name, f in found.items() if only in (None, name)}


def step(formulation: Formulation, inputs: Inputs) -> dict[str, Tensor]:
    """Loss and gradients of one forward and backward."""
    for t in inputs.values():
        t.grad = None
    loss = formulation.loss(**inputs)
    loss.backward()
    return {"loss": loss.detach()} | {name: t.grad for name, t in inputs.items() if t.grad is not None}


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


def times(case: Case, repeats: int, only: str | None) -> dict[str, list[float]]:
    inputs = case.inputs()
    x, y = inputs["x"].detach(), inputs["y"].detach()
    table: dict[str, Callable[[], Any]] = {"product": lambda: x @ y.T}
    table |= {name: lambda f=f: step(f, inputs) for name, f in case.formulations(only).items()}
    found: dict[str, list[float]] = {name: [] for name in table}
    for function in table.values():
        function()  # warm up, compile
    for _ in range(repeats):
        for name, function in table.items():
            found[name].append(seconds(function, case.device))
    return found


def extra_memory(case: Case, name: str) -> int:
    """Bytes beyond the inputs at the peak of one forward and backward. On a CPU: of this process, so call it in a fresh one."""
    formulation = case.formulations()[name]
    step(formulation, case.inputs(min(case.n, 64)))  # what libraries set up once does not count
    inputs = case.inputs()
    if case.device == "cuda":
        step(formulation, inputs)  # compiled code is ready
        for t in inputs.values():
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


def memory_in_a_process(case: Case, name: str, threads: int) -> int:
    if case.device == "cuda":
        return extra_memory(case, name)
    command = [sys.executable, __file__, "--memory-of", name, "--loss", case.loss, "--n", str(case.n), "--d", str(case.d)]
    command += ["--dtype", case.dtype, "--device", case.device, "--threads", str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment())
    return int(done.stdout.splitlines()[-1])


def environment() -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return os.environ | {"PYTHONPATH": path, "MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed goes back at once


def errors(case: Case, only: str | None) -> dict[str, dict[str, float]]:
    def leaf(t: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        short = t.detach()[:1024] if t.ndim else t.detach()
        return short.to(dtype or t.dtype, copy=True).requires_grad_(t.requires_grad)

    inputs = case.inputs()
    exact_inputs = {name: leaf(t, torch.float64) for name, t in inputs.items()}
    inputs = {name: leaf(t) for name, t in inputs.items()}
    exact = step(case.formulations()[case.subject.base], exact_inputs)

    def relative(a: Tensor | None, b: Tensor) -> float:
        return float("nan") if a is None else float((a.double() - b).norm() / b.norm())

    return {
        name: {key: relative(found.get(key), value) for key, value in exact.items()}
        for name, found in ((name, step(f, inputs)) for name, f in case.formulations(only).items())
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


def measure(case: Case, threads: int, repeats: int, only: str | None) -> list[dict[str, Any]]:
    """One row for each formulation."""
    timed = times(case, repeats, only)
    product = timed.pop("product")
    wrong = errors(case, only)
    table = case.formulations()
    flops = 2 * case.n * case.n * case.d
    gradients = sum(t.numel() * t.element_size() for t in case.inputs().values() if t.requires_grad)
    return [
        {
            "loss": case.loss,
            "n": case.n,
            "d": case.d,
            "dtype": case.dtype,
            "name": name,
            "seconds_min": min(found),
            "seconds_median": statistics.median(found),
            "products": min(found) / min(product),
            "gflops": table[name].products * flops / min(found) / 1e9,
            "product_gflops": flops / min(product) / 1e9,
            "extra_bytes": memory_in_a_process(case, name, threads),
            "gradient_bytes": gradients,
            "errors": wrong[name],
        }
        for name, found in timed.items()
    ]


def show(case: Case, rows: list[dict[str, Any]]) -> None:
    base = next((row for row in rows if row["name"] == case.subject.base), rows[0])
    rate, gradients = rows[0]["product_gflops"], rows[0]["gradient_bytes"] / 2**20
    print(f"\n{case.loss}: N = {case.n}, D = {case.d}, {case.dtype}: one product runs at {rate:.0f} GFLOP/s;", end=" ")
    print(f"of the memory {gradients:.0f} MiB are gradients")
    columns = f"{'min':>9} {'median':>9} {'faster':>7} {'products':>9} {'GFLOP/s':>8} {'MiB':>8} {'memory':>7}"
    print(f"{'':22}{columns}   error of loss, gradients")
    for row in rows:
        gradient = max(value for key, value in row["errors"].items() if key != "loss" and value == value)
        print(
            f"{row['name']:22}{row['seconds_min'] * 1e3:7.1f}ms {row['seconds_median'] * 1e3:7.1f}ms"
            f" {base['seconds_min'] / row['seconds_min']:6.2f}x {row['products']:9.2f} {row['gflops']:8.0f}"
            f" {row['extra_bytes'] / 2**20:8.1f} {row['extra_bytes'] / base['extra_bytes']:7.3f}"
            f"   {row['errors']['loss']:.0e} {gradient:.0e}",
            flush=True,
        )


def plot(rows: list[dict[str, Any]], about: dict[str, Any], path: Path) -> None:
    """Time and memory of every formulation, a panel for each loss and size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups: dict[tuple, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["loss"], row["n"], row["d"], row["dtype"]), []).append(row)
    figure, axes = pyplot.subplots(len(groups), 2, figsize=(10, 0.6 + 1.9 * len(groups)), squeeze=False, layout="constrained")
    for (time_axis, memory_axis), ((loss, n, d, dtype), group) in zip(axes, groups.items(), strict=True):
        names = [row["name"] for row in group]
        colours = ["tab:blue" if name.startswith("vlpfast") else "tab:gray" for name in names]
        for axis, values, unit in (
            (time_axis, [row["seconds_min"] * 1e3 for row in group], "ms, forward and backward"),
            (memory_axis, [row["extra_bytes"] / 2**20 for row in group], "MiB beyond the inputs"),
        ):
            axis.bar_label(axis.barh(names, values, color=colours), fmt="{:,.4g}", padding=3)
            axis.set_xlabel(unit)
            axis.margins(x=0.15)
            axis.invert_yaxis()
        time_axis.set_title(f"{loss}: N = {n}, D = {d}, {dtype}", loc="left")
    figure.suptitle(f"{about['processor']}, {about['device']}, {about['threads']} CPU threads, commit {about['commit']}")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--loss", choices=tuple(SUBJECTS), nargs="+", default=list(SUBJECTS))
    parser.add_argument("--only", metavar="NAME", help="one formulation alone")
    parser.add_argument("--n", type=int, nargs="+", help="rows of each side (default: by loss and device)")
    parser.add_argument("--d", type=int, nargs="+", help="width of the features (default: 512)")
    choices = ("float32", "bfloat16", "float16")
    parser.add_argument("--dtype", choices=choices, nargs="+", help="default: float32; on a GPU bfloat16")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the CPU")
    parser.add_argument("--repeats", type=int, default=5, help="rounds")
    parser.add_argument("--json", type=Path, help="default: results/MACHINE/contrastive-DEVICE.json, unless a choice is made")
    parser.add_argument("--quick", action="store_true", help="small sizes, two rounds")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device")
    torch.set_num_threads(args.threads)
    cases = [
        Case(loss, n, d, dtype, args.device)
        for loss, subject in ((loss, SUBJECTS[loss]) for loss in args.loss)
        for d in args.d or [subject.width]
        for n in args.n or subject.sizes["quick" if args.quick else args.device]
        for dtype in args.dtype or ["bfloat16" if args.device == "cuda" else "float32"]
    ]
    if args.memory_of:
        print(extra_memory(cases[0], args.memory_of))
        return
    about = machine(args.device, args.threads)
    print(", ".join(f"{key} {about[key]}" for key in ("machine", "processor", "instructions", "threads", "torch", "commit")))
    print("vlpfast, stash: the default plan (stash_bytes = 4 GiB); recompute: stash_bytes = 0")
    rows = []
    repeats = 2 if args.quick else args.repeats
    for case in cases:
        measured = measure(case, args.threads, repeats, args.only)
        show(case, measured)
        rows += measured
    path = args.json
    if path is None and not (args.quick or args.only or args.n or args.d or args.dtype or len(args.loss) < len(SUBJECTS)):
        path = ROOT / "benchmarks/results" / about["machine"] / f"contrastive-{args.device}.json"
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(about | {"repeats": repeats, "rows": rows}, indent=1) + "\n")
        print(f"\nwritten: {path}")
        if find_spec("matplotlib"):
            plot(rows, about, path.with_suffix(".png"))
            print(f"written: {path.with_suffix('.png')}")


if __name__ == "__main__":
    main()
