"""Whole vision transformers with and without merging or selection: what the count of operations promises, and what comes.

    python benchmarks/vit.py --device cpu --threads 1    ViT-B/16, L/16, L/14 at 336 pixels; forward, and forward and backward
    python benchmarks/vit.py --device cpu --quick        ViT-B/16 alone, two pictures, two rounds

Random weights: time does not depend on them. Variants of a model take turns in each of the --repeats rounds; the smallest time
counts. On a GPU: bfloat16 autocast, launched one by one and, in rows of their own, as CUDA graphs.
    promised    operations without a schedule over those with it (FlopCounterMode on the forward; products and attention)
    measured    time without over time with it
    gate        the measured speed-up is at least --gate of the promised one
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from _measure import ROOT, machine, seconds
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from vlpfast.nn.reduction import MergeConfig, SelectConfig
from vlpfast.nn.vit import ViT, ViTConfig

BASE = ViTConfig(patch_size=16)
LARGE = ViTConfig(patch_size=16, width=1024, layers=24, heads=16)
MODELS: dict[str, tuple[ViTConfig, int, dict[str, dict[str, Any]]]] = {  # config, picture size, schedules as published
    "B/16": (
        BASE,
        224,
        {
            "merge 13": {"merge": MergeConfig(r=13)},
            "merge 16": {"merge": MergeConfig(r=16)},
            "select 0.7": {"select": SelectConfig(layers=[3, 6, 9])},
        },
    ),
    "L/16": (LARGE, 224, {"merge 8": {"merge": MergeConfig(r=8)}, "select 0.7": {"select": SelectConfig(layers=[6, 12, 18])}}),
    "L/14 336": (
        replace(LARGE, patch_size=14),
        336,
        {"merge 23": {"merge": MergeConfig(r=23)}, "select 0.7": {"select": SelectConfig(layers=[6, 12, 18])}},
    ),
}


def operations(model: nn.Module, image: Tensor) -> int:
    """Of products and attention in one forward, by torch's counter, which has no formula for its CPU kernel of attention."""

    def attention_on_cpu(q: tuple, k: tuple, v: tuple, *_: Any, out_shape: Any = None, **__: Any) -> int:
        return sdpa_flop_count(q, k, v)

    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    with FlopCounterMode(display=False, custom_mapping={kernel: attention_on_cpu}) as counter, torch.no_grad():
        model(image)
    return counter.get_total_flops()


def step(model: ViT, image: Tensor, train: bool) -> None:
    with torch.autocast(image.device.type, torch.bfloat16, enabled=image.device.type == "cuda"):
        pooled = model.pool(*model(image, need_size=True))
    if train:
        pooled.float().square().mean().backward()


def runner(model: ViT, image: Tensor, train: bool, pool: Any) -> Callable[[], None]:
    """One step of it, ready to be timed. pool: memory of CUDA graphs; None: no graph."""
    model.train(train)

    def run() -> None:
        with torch.set_grad_enabled(train):
            step(model, image, train)

    if pool is None:
        return run
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
            model.zero_grad()
    torch.cuda.current_stream().wait_stream(stream)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured, pool=pool):
        run()
    return captured.replay


def measure(name: str, batch: int, device: str, train: bool, graph: bool, repeats: int) -> list[dict[str, Any]]:
    config, size, schedules = MODELS[name]
    image = torch.randn(batch, 3, size, size, device=device)
    runs, counts = {}, {}
    pool = torch.cuda.graph_pool_handle() if graph else None  # one for all variants: they never run at the same time
    for schedule, changes in {"none": {}, **schedules}.items():
        torch.manual_seed(0)
        model = ViT(replace(config, **changes), size).to(device)
        counts[schedule] = operations(model, image[:1])
        runs[schedule] = runner(model, image, train, pool)
        runs[schedule]()
    taken: dict[str, list[float]] = {schedule: [] for schedule in runs}
    for _ in range(repeats):
        for schedule, run in runs.items():
            taken[schedule].append(seconds(run, device))
    return [
        {
            "model": name,
            "schedule": schedule,
            "batch": batch,
            "train": train,
            "cuda_graph": graph,
            "seconds_min": min(found),
            "pictures_per_second": batch / min(found),
            "operations": counts[schedule],
            "promised": counts["none"] / counts[schedule],
            "measured": min(taken["none"]) / min(found),
        }
        for schedule, found in taken.items()
    ]


def show(rows: list[dict[str, Any]], gate: float) -> None:
    first = rows[0]
    kind = ("forward and backward" if first["train"] else "forward") + (", CUDA graph" if first["cuda_graph"] else "")
    print(f"\nViT-{first['model']}, {first['batch']} pictures, {kind}")
    print(f"{'':12}{'ms':>10} {'pictures/s':>11} {'GFLOP each':>11} {'promised':>9} {'measured':>9}  gate")
    for row in rows:
        share = row["measured"] / row["promised"]
        verdict = "" if row is first else f"{share:4.0%} of the promise: {'holds' if share >= gate else 'MISSED'} ({gate:.0%})"
        print(
            f"{row['schedule']:12}{row['seconds_min'] * 1e3:10.2f} {row['pictures_per_second']:11.1f}"
            f" {row['operations'] / 1e9:11.2f} {row['promised']:8.2f}x {row['measured']:8.2f}x  {verdict}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--model", choices=tuple(MODELS), nargs="+")
    parser.add_argument("--batch", type=int, help="pictures (default: 8, on a GPU 64)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the CPU")
    parser.add_argument("--repeats", type=int, default=5, help="rounds")
    parser.add_argument("--gate", type=float, default=0.9, help="share of the promised speed-up")
    parser.add_argument("--json", type=Path, help="default: results/MACHINE/vit-DEVICE.json, unless a choice is made")
    parser.add_argument("--quick", action="store_true", help="ViT-B/16, two pictures, two rounds")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device")
    torch.set_num_threads(args.threads)
    about = machine(args.device, args.threads)
    print(", ".join(f"{key} {about[key]}" for key in ("machine", "processor", "instructions", "threads", "torch", "commit")))
    models = args.model or (["B/16"] if args.quick else list(MODELS))
    batch = args.batch or (2 if args.quick else 64 if args.device == "cuda" else 8)
    rows = []
    for name in models:
        for train in (False, True):
            for graph in (False, True) if args.device == "cuda" else (False,):
                found = measure(name, batch, args.device, train, graph, 2 if args.quick else args.repeats)
                show(found, args.gate)
                rows += found
    path = args.json
    if path is None and not (args.quick or args.model or args.batch):
        path = ROOT / "benchmarks/results" / about["machine"] / f"vit-{args.device}.json"
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(about | {"gate": args.gate, "rows": rows}, indent=1) + "\n")
        print(f"\nwritten: {path}")


if __name__ == "__main__":
    main()
