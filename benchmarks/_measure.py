"""What the benchmark scripts share: several formulations of one subject, side by side in time, memory and error.

Time: every formulation takes its turn in each of the --repeats rounds, and so does the subject's unit (one matrix product, one
copy), in which the column of its name counts. The smallest and the median time of the rounds are shown. "of floor" is the time
that the subject's floor, so many units, would take over the time that was taken.
Memory: beyond the inputs, at the peak of one forward and backward; the gradients are part of it. On a CPU each formulation runs
in a process of its own, and the figure is the growth of its resident memory (VmHWM after, VmRSS before); on a GPU it is
torch.cuda.max_memory_allocated.
Errors: of results and gradients against the base formulation in float64, relative (Frobenius), at the subject's small size.
"""

from __future__ import annotations

import argparse
import itertools
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
from torch import Tensor

from vlpfast.ops import backends

ROOT = Path(__file__).resolve().parents[1]
Size = dict[str, int]
Inputs = dict[str, Tensor]  # those that require a gradient are leaves
WRONG = {"float32": 1e-3, "bfloat16": 3e-2, "float16": 1e-2}  # relative errors that no rounding explains


@dataclass(frozen=True)
class Formulation:
    function: Callable[..., Tensor]  # (**inputs) -> [], or a tensor that is summed
    units: float  # that it takes forward and backward, by its own count
    reads: tuple[str, ...] = ()  # the inputs that it reads, where formulations differ in that


@dataclass(frozen=True)
class Subject:
    base: str  # the formulation that ratios and errors refer to
    inputs: Callable[[Size, torch.dtype, str], Inputs]  # size, dtype, device
    formulations: Callable[[str], dict[str, Formulation]]  # device; vlpfast's first
    sizes: dict[str, tuple[Size, ...]]  # cpu, cuda, quick, and small: where errors are measured
    unit: Callable[[Inputs], Any]
    unit_name: str  # "products", "copies"
    work: Callable[[Size], int]  # operations or bytes of one unit
    floor: float  # units that no formulation can do without
    shapes: tuple[Size, ...] = ()  # where every formulation is checked against the base in float64, for the list of wrong results


@dataclass(frozen=True)
class Case:
    name: str
    subject: Subject
    size: Size
    dtype: str
    device: str

    def inputs(self, size: Size | None = None) -> Inputs:
        return self.subject.inputs(size or self.size, getattr(torch, self.dtype), self.device)

    def formulations(self, only: str | None = None) -> dict[str, Formulation]:
        return {name: f for name, f in self.subject.formulations(self.device).items() if only in (None, name)}

    def __str__(self) -> str:
        return f"{self.name}: {', '.join(f'{key.upper()} = {value}' for key, value in self.size.items())}, {self.dtype}"


def step(formulation: Formulation, inputs: Inputs) -> dict[str, Tensor]:
    """Result and gradients of one forward and backward."""
    for t in inputs.values():
        t.grad = None
    result = formulation.function(**inputs)
    if result.requires_grad:
        (result if result.ndim == 0 else result.sum()).backward()
    return {"result": result.detach()} | {name: t.grad for name, t in inputs.items() if t.grad is not None}


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


def times(case: Case, repeats: int, only: str | None) -> tuple[list[float], dict[str, list[float]]]:
    """Seconds of the unit and of every formulation, in each round."""
    inputs = case.inputs()
    detached = {name: t.detach() for name, t in inputs.items()}
    unit: list[float] = []
    table = {name: lambda f=f: step(f, inputs) for name, f in case.formulations(only).items()}
    found: dict[str, list[float]] = {name: [] for name in table}
    for function in (lambda: case.subject.unit(detached), *table.values()):
        function()  # warm up, compile
    for _ in range(repeats):
        unit.append(seconds(lambda: case.subject.unit(detached), case.device))
        for name, function in table.items():
            found[name].append(seconds(function, case.device))
    return unit, found


def extra_memory(case: Case, name: str) -> int:
    """Bytes beyond the inputs at the peak of one forward and backward. On a CPU: of this process, so call it in a fresh one."""
    formulation = case.formulations()[name]
    step(formulation, case.inputs(case.subject.sizes["small"][0]))  # what libraries set up once does not count
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
    command = [sys.executable, sys.argv[0], "--memory-of", name, "--subject", case.name]
    command += [word for key, value in case.size.items() for word in (f"--{key}", str(value))]
    command += ["--dtype", case.dtype, "--device", case.device, "--threads", str(threads)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment())
    return int(done.stdout.splitlines()[-1])


def environment() -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return os.environ | {"PYTHONPATH": path, "MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed goes back at once


def errors(case: Case, only: str | None) -> dict[str, dict[str, float]]:
    inputs = case.inputs(case.subject.sizes["small"][0])
    exact_inputs = {
        name: t.detach().double().requires_grad_(t.requires_grad) if t.is_floating_point() else t for name, t in inputs.items()
    }
    exact = step(case.formulations()[case.subject.base], exact_inputs)

    def relative(a: Tensor | None, b: Tensor) -> float:
        return float("nan") if a is None else float((a.double() - b).norm() / b.norm())

    return {
        name: {key: relative(found.get(key), value) for key, value in exact.items()}
        for name, found in ((name, step(f, inputs)) for name, f in case.formulations(only).items())
    }


def wrong(case: Case, only: str | None) -> dict[str, list[str]]:
    """For each formulation the sizes at which its result is off by more than WRONG, or what it raised there."""
    found: dict[str, list[str]] = {name: [] for name in case.formulations(only)}
    for size in case.subject.shapes:
        inputs = {name: t.detach() for name, t in case.inputs(size).items()}
        exact = case.formulations()[case.subject.base].function(**{name: t.double() for name, t in inputs.items()})
        for name, formulation in case.formulations(only).items():
            try:
                error = float((formulation.function(**inputs).double() - exact).norm() / exact.norm())
            except Exception as raised:  # whatever a peer does is the finding
                found[name].append(f"{size}: {type(raised).__name__}: {raised}")
            else:
                if not error <= WRONG[case.dtype]:
                    found[name].append(f"{size}: error {error:.0e}")
    return found


def square_rate(device: str, dtype: str) -> float:
    """GFLOP/s of a product of two matrices of 2048 x 2048 (on a GPU 8192 x 8192), the best of ten."""
    n = 8192 if device == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device).to(getattr(torch, dtype)) for _ in range(2))
    return 2 * n**3 / min(seconds(lambda: a @ b, device) for _ in range(10)) / 1e9


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
    unit, timed = times(case, repeats, only)
    wrong = errors(case, only)
    table, work = case.formulations(), case.subject.work(case.size)
    inputs = case.inputs()
    gradients = sum(t.nbytes for t in inputs.values() if t.requires_grad)
    return [
        {
            "subject": case.name,
            **case.size,
            "dtype": case.dtype,
            "name": name,
            "seconds_min": min(found),
            "seconds_median": statistics.median(found),
            case.subject.unit_name: min(found) / min(unit),
            "of_floor": case.subject.floor * min(unit) / min(found),
            "giga_per_second": table[name].units * work / min(found) / 1e9,
            "unit_giga_per_second": work / min(unit) / 1e9,
            "extra_bytes": memory_in_a_process(case, name, threads),
            "gradient_bytes": gradients,
            "errors": wrong[name],
        }
        | ({"read_bytes": sum(inputs[read].nbytes for read in table[name].reads)} if table[name].reads else {})
        for name, found in timed.items()
    ]


def show(case: Case, rows: list[dict[str, Any]]) -> None:
    unit, floor = case.subject.unit_name, case.subject.floor
    base = next((row for row in rows if row["name"] == case.subject.base), rows[0])
    rate, gradients = "GFLOP/s" if unit == "products" else "GB/s", rows[0]["gradient_bytes"] / 2**20
    print(f"\n{case}: the unit runs at {rows[0]['unit_giga_per_second']:.0f} {rate}; the floor is {floor:g} {unit};", end=" ")
    print(f"of the memory {gradients:.0f} MiB are gradients")
    columns = f"{'min':>10} {'median':>10} {'faster':>7} {unit:>9} {'of floor':>8} {rate:>8} {'MiB':>8} {'memory':>7}"
    print(f"{'':24}{columns}   error of result, gradients")
    for row in rows:
        gradient = max((value for key, value in row["errors"].items() if key != "result" and value == value), default=0)
        memory = row["extra_bytes"] / max(1, base["extra_bytes"])
        print(
            f"{row['name']:24}{row['seconds_min'] * 1e3:8.2f}ms {row['seconds_median'] * 1e3:8.2f}ms"
            f" {base['seconds_min'] / row['seconds_min']:6.2f}x {row[unit]:9.2f} {row['of_floor']:8.0%}"
            f" {row['giga_per_second']:8.0f} {row['extra_bytes'] / 2**20:8.1f} {memory:7.3f}"
            f"   {row['errors']['result']:.0e} {gradient:.0e}"
            + (f", {row['read_bytes'] / 2**20:.1f} MiB read" if "read_bytes" in row else ""),
            flush=True,
        )


def plot(cases: list[tuple[Case, list[dict[str, Any]]]], about: dict[str, Any], path: Path) -> None:
    """Time and memory of every formulation, a panel for each case."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(cases), 2, figsize=(10, 0.6 + 1.9 * len(cases)), squeeze=False, layout="constrained")
    for (time_axis, memory_axis), (case, rows) in zip(axes, cases, strict=True):
        names = [row["name"] for row in rows]
        colours = ["tab:blue" if name.startswith("vlpfast") else "tab:gray" for name in names]
        for axis, values, unit in (
            (time_axis, [row["seconds_min"] * 1e3 for row in rows], "ms, forward and backward"),
            (memory_axis, [row["extra_bytes"] / 2**20 for row in rows], "MiB beyond the inputs"),
        ):
            axis.bar_label(axis.barh(names, values, color=colours), fmt="{:,.4g}", padding=3)
            axis.set_xlabel(unit)
            axis.margins(x=0.15)
            axis.invert_yaxis()
        time_axis.set_title(str(case), loc="left")
    figure.suptitle(f"{about['processor']}, {about['device']}, {about['threads']} CPU threads, commit {about['commit']}")
    figure.savefig(path, dpi=120)


def main(script: str, subjects: dict[str, Subject], description: str) -> None:
    """The command line of a benchmark. script: results are in results/MACHINE/{script}-DEVICE.json, where no choice is made."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--subject", choices=tuple(subjects), nargs="+", default=list(subjects))
    parser.add_argument("--only", metavar="NAME", help="one formulation alone")
    keys = dict.fromkeys(
        key for subject in subjects.values() for sizes in subject.sizes.values() for size in sizes for key in size
    )
    for key in keys:
        parser.add_argument(f"--{key}", type=int, nargs="+", help="size (default: by subject and device)")
    choices = ("float32", "bfloat16", "float16")
    parser.add_argument("--dtype", choices=choices, nargs="+", help="default: float32; on a GPU bfloat16")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the CPU")
    parser.add_argument("--repeats", type=int, default=5, help="rounds")
    parser.add_argument("--json", type=Path, help=f"default: results/MACHINE/{script}-DEVICE.json, unless a choice is made")
    parser.add_argument("--quick", action="store_true", help="small sizes, two rounds")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device")
    torch.set_num_threads(args.threads)
    chosen = {key: getattr(args, key) for key in keys if getattr(args, key)}
    cases = [
        Case(name, subjects[name], size, dtype, args.device)
        for name in args.subject
        for size in _sizes(subjects[name].sizes["quick" if args.quick else args.device], chosen)
        for dtype in args.dtype or ["bfloat16" if args.device == "cuda" else "float32"]
    ]
    if args.memory_of:
        print(extra_memory(cases[0], args.memory_of))
        return
    about = machine(args.device, args.threads)
    print(", ".join(f"{key} {about[key]}" for key in ("machine", "processor", "instructions", "threads", "torch", "commit")))
    about["square_giga_per_second"] = square_rate(args.device, cases[0].dtype)
    print(f"a large square product runs at {about['square_giga_per_second']:.0f} GFLOP/s")
    found = []
    repeats = 2 if args.quick else args.repeats
    for case in cases:
        rows = measure(case, args.threads, repeats, args.only)
        show(case, rows)
        shapes = len(case.subject.shapes)
        for name, sizes in wrong(case, args.only).items() if shapes else ():
            next(row for row in rows if row["name"] == name)["wrong"] = sizes
            print(f"{name}: right at {shapes - len(sizes)} of {shapes} shapes", *sizes, sep="\n    ")
        found.append((case, rows))
    path = args.json
    if path is None and not (args.quick or args.only or chosen or args.dtype or len(args.subject) < len(subjects)):
        path = ROOT / "benchmarks/results" / about["machine"] / f"{script}-{args.device}.json"
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [row for _, rows in found for row in rows]
        path.write_text(json.dumps(about | {"repeats": repeats, "rows": rows}, indent=1) + "\n")
        print(f"\nwritten: {path}")
        if find_spec("matplotlib"):
            plot(found, about, path.with_suffix(".png"))
            print(f"written: {path.with_suffix('.png')}")


def _sizes(defaults: tuple[Size, ...], chosen: dict[str, list[int]]) -> list[Size]:
    """The defaults with every combination of the chosen numbers put in."""
    sizes = []
    for size in defaults:
        numbers = [chosen.get(key, [value]) for key, value in size.items()]
        for combination in itertools.product(*numbers):
            new = dict(zip(size, combination, strict=True))
            if new not in sizes:
                sizes.append(new)
    return sizes
