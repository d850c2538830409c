"""Whole training steps of CLIP beside open_clip's formulation of them, and the data path alone; or what a run took.

    python benchmarks/train.py                              CLIP tiny on the CPU; on a GPU ViT-B/32 in bf16
    python benchmarks/train.py --model ViT-B-16 ViT-L-14    others
    python benchmarks/train.py --quick                      small batches, two rounds
    python benchmarks/train.py runs/clip                    a row for benchmarks/results of a finished run's folder

A step: forward, loss, backward, optimiser, on random pictures and words that are on the device. Both formulations train the same
network from the same weights under the same autocast, in turns in each of --repeats rounds; the smallest time counts. On a CPU
each has a process of its own, because the trainer's tells the C library to keep freed memory (training/memory.py) where batches
are not divided.
    open_clip   its ClipLoss (logits, two cross entropies) in eager, torch's AdamW as its script makes it; accumulation as there:
                features of all parts without gradients first, then for every part the forward again and the loss of the whole
                batch with that part's features in place
    vlpfast     clip_loss, fused AdamW with the trainer's gradient norm and its check for numbers that are not finite;
                accumulation by the feature cache (train.micro_batch): one loss for all parts
Both are written from the description of the method; open_clip itself is not run. Their first losses must agree.
Memory: on a GPU torch.cuda.max_memory_allocated; on a CPU the growth of a process of its own from before the model to its peak.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import _data_path
import torch
import torch.nn.functional as F
import yaml
from _measure import ROOT, environment, machine, process_memory, seconds
from torch import Tensor

from vlpfast.models.clip import CLIP
from vlpfast.nn.text import TextConfig
from vlpfast.nn.vit import ViTConfig
from vlpfast.training import feature_cache
from vlpfast.training.config import Stage, TrainConfig
from vlpfast.training.flops_count import Speed
from vlpfast.training.memory import keep_freed_memory
from vlpfast.training.optim import build_optimizer, gradient_norm
from vlpfast.training.parallel import Spread, World
from vlpfast.types import Batch, Progress

MODELS: dict[str, tuple[Callable[[], CLIP.Config], int]] = {  # with the samples of a part
    "tiny": (CLIP.Config.tiny, 64),
    "ViT-B-32": (CLIP.Config, 512),
    "ViT-B-16": (lambda: CLIP.Config(vision=ViTConfig(patch_size=16)), 256),
    "ViT-L-14": (
        lambda: CLIP.Config(
            vision=ViTConfig(patch_size=14, width=1024, layers=24, heads=16), text=TextConfig(width=768, heads=12), embed_dim=768
        ),
        128,
    ),
}
TRAIN = TrainConfig(lr=5e-4, betas=[0.9, 0.98], eps=1e-6, weight_decay=0.2, clip_grad_norm=0.0)
CHECKED = 3  # first steps, whose losses are compared
AGREE = {"cpu": 1e-3, "cuda": 2e-2}  # relative, in fp32 and under bf16
Step = Callable[[], Tensor]  # -> the loss, detached


def random_batch(config: CLIP.Config, samples: int, device: str) -> Batch:
    generator = torch.Generator().manual_seed(0)
    size, length = config.data.image.size, config.data.text.context_length
    end = config.text.eos_id
    words = (3, config.text.vocab_size) if end < 3 else (0, end)  # none of them the end token
    text = torch.randint(*words, (samples, length), generator=generator)
    text[:, length // 2] = end
    return Batch(image=torch.randn(samples, 3, size, size, generator=generator).to(device), text=text.to(device))


def open_clip_loss(features: dict[str, Tensor], scale: Tensor) -> Tensor:
    image, text = features["image"], features["text"]
    logits = scale * image @ text.T
    labels = torch.arange(len(image), device=image.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def open_clip_step(model: CLIP, batch: Batch, part: int, autocast: Callable[[], Any]) -> Step:
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": others, "weight_decay": 0.0}, {"params": matrices, "weight_decay": TRAIN.weight_decay}]
    optimizer = torch.optim.AdamW(groups, lr=TRAIN.lr, betas=tuple(TRAIN.betas), eps=TRAIN.eps)
    parts = feature_cache.divide(batch, part)

    def step() -> Tensor:
        optimizer.zero_grad()
        if len(parts) == 1:
            with autocast():
                loss = open_clip_loss(model.encode(batch), model.logit_scale.exp())
            loss.backward()
        else:
            with torch.no_grad(), autocast():
                cached = [model.encode(one) for one in parts]
            for number, one in enumerate(parts):
                with autocast():
                    made = [model.encode(one) if number == other else cached[other] for other in range(len(parts))]
                    joined = {key: torch.cat([features[key] for features in made]) for key in made[0]}
                    loss = open_clip_loss(joined, model.logit_scale.exp())
                loss.backward()
        optimizer.step()
        model.before_step(Progress(0, 1))  # it too keeps the scale from growing beyond 100
        return loss.detach()

    return step


def vlpfast_step(model: CLIP, batch: Batch, part: int, autocast: Callable[[], Any]) -> Step:
    if batch["image"].device.type == "cpu" and part >= len(batch["text"]):
        keep_freed_memory()  # as the trainer does
    optimizer = build_optimizer(model, TRAIN, "train", Stage())
    spread = Spread(model, TRAIN, World(device=batch["image"].device))
    spread.begin_stage()

    def step() -> Tensor:
        model.before_step(Progress(0, 1))
        if part < len(batch["text"]):
            loss, _ = feature_cache.backward(spread, batch, part, lambda losses: losses["contrastive"], autocast)
        else:
            with autocast():
                loss = spread("__call__", batch, Progress(0, 1))["contrastive"]
            loss.backward()
        norm = gradient_norm(model, TRAIN.clip_grad_norm)
        optimizer.found_inf = (~torch.isfinite(torch.stack([loss.detach().float(), norm])).all()).float()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


FORMULATIONS = {"vlpfast": vlpfast_step, "open_clip": open_clip_step}


def prepared(name: str, formulation: str, samples: int, part: int, device: str) -> Step:
    torch.manual_seed(0)
    config = MODELS[name][0]()
    autocast = partial(torch.autocast, device, torch.bfloat16) if device == "cuda" else nullcontext
    return FORMULATIONS[formulation](CLIP(config).to(device), random_batch(config, samples, device), part, autocast)


def peak_memory(name: str, formulation: str, samples: str, part: str, device: str) -> int:
    """Bytes of weights, optimiser and three steps. On a CPU: of this process, so call it in a fresh one."""
    before = process_memory("VmRSS")
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    step = prepared(name, formulation, int(samples), int(part), device)
    for _ in range(3):
        step()
    return (torch.cuda.max_memory_allocated() if device == "cuda" else process_memory("VmHWM")) - before


def memory_in_a_process(arguments: list[str], threads: int) -> int:
    command = [sys.executable, __file__, "--memory-of", *arguments, "--threads", str(threads)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment())
    return int(done.stdout.splitlines()[-1])


def steps(name: str, part: int, parts: int, device: str, threads: int, repeats: int) -> list[dict[str, Any]]:
    """A row for each formulation, of one part and of several."""
    config = MODELS[name][0]()
    speed = Speed(CLIP(config).to(device), torch.device(device), torch.bfloat16 if device == "cuda" else None)
    rows = []
    for samples in (part, part * parts):
        count = speed.begin_stage("train", Stage(), random_batch(config, samples, device), Progress(0, 1))
        with runners(name, samples, part, device, threads) as table:
            taken, apart = timed(table, f"{name}, {samples} samples", AGREE[device], repeats)
        for formulation, found in taken.items():
            arguments = [name, formulation, str(samples), str(part), device]
            row = {
                "model": name,
                "name": formulation,
                "samples": samples,
                "part": part,
                "seconds_min": min(found),
                "seconds_median": statistics.median(found),
                "samples_per_s": samples / min(found),
                "mfu": count.flops / min(found) / speed.peak.flops_per_s,
                "peak": speed.peak.source,
                "peak_bytes": peak_memory(*arguments) if device == "cuda" else memory_in_a_process(arguments, threads),
                "losses_apart": apart,
            }
            rows.append(row)
    return rows


Runner = Callable[[], tuple[float, float]]  # one step -> its loss and seconds


def in_this_process(name: str, formulation: str, samples: int, part: int, device: str) -> Runner:
    step = prepared(name, formulation, samples, part, device)
    loss: list[Tensor] = []

    def run() -> tuple[float, float]:
        taken = seconds(lambda: loss.append(step()), device)
        return float(loss.pop()), taken

    return run


@contextmanager
def runners(name: str, samples: int, part: int, device: str, threads: int) -> Iterator[dict[str, Runner]]:
    """A step of each formulation; on a CPU in a process of its own, which stands still in the others' turns."""
    if device != "cpu":
        yield {formulation: in_this_process(name, formulation, samples, part, device) for formulation in FORMULATIONS}
        return
    with ExitStack() as stack:
        yield {
            formulation: stack.enter_context(_in_a_process([name, formulation, str(samples), str(part), device], threads))
            for formulation in FORMULATIONS
        }


@contextmanager
def _in_a_process(arguments: list[str], threads: int) -> Iterator[Runner]:
    command = [sys.executable, __file__, "--steps-of", *arguments, "--threads", str(threads)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
    with subprocess.Popen(command, env=environment(), **pipes) as process:

        def run() -> tuple[float, float]:
            process.stdin.write("step\n")
            answer = process.stdout.readline()
            if not answer:
                raise SystemExit(f"the process of {arguments[1]} has ended with {process.wait()}")
            loss, taken = answer.split()
            return float(loss), float(taken)

        try:
            yield run
        finally:
            process.stdin.close()


def answer_steps(name: str, formulation: str, samples: str, part: str, device: str) -> None:
    """A step for each line of standard input, until it ends."""
    run = in_this_process(name, formulation, int(samples), int(part), device)
    for _ in sys.stdin:
        print(*run(), flush=True)


def timed(table: dict[str, Runner], what: str, agree: float, repeats: int) -> tuple[dict[str, list[float]], float]:
    """Seconds of every formulation in each round, and how far the losses of the first steps are apart, relatively."""
    losses = {formulation: [run()[0] for _ in range(CHECKED)] for formulation, run in table.items()}
    ours, theirs = losses["vlpfast"], losses["open_clip"]
    apart = max(abs(a - b) / b for a, b in zip(ours, theirs, strict=True))
    if not apart <= agree:
        raise SystemExit(f"{what}: the losses of the first steps are {apart:.1e} apart: {ours}, {theirs}")
    found: dict[str, list[float]] = {formulation: [] for formulation in table}
    for _ in range(repeats):
        for formulation, run in table.items():
            found[formulation].append(run()[1])
    return found, apart


def show(rows: list[dict[str, Any]]) -> None:
    head = f"{'samples/s':>10}{'min':>11}{'median':>11}{'MFU':>7}{'MiB':>9}{'faster':>8}"
    print(f"\n{'model':10}{'samples':>8}{'parts':>6}  {'':10}{head}")
    for row in rows:
        base = next(r for r in rows if r["name"] == "open_clip" and (r["model"], r["samples"]) == (row["model"], row["samples"]))
        milliseconds = "".join(f"{row[key] * 1e3:9.1f}ms" for key in ("seconds_min", "seconds_median"))
        print(
            f"{row['model']:10}{row['samples']:8}{row['samples'] // row['part']:6}  {row['name']:10}{row['samples_per_s']:10,.0f}"
            f"{milliseconds}{row['mfu']:7.1%}{row['peak_bytes'] / 2**20:9,.0f}{base['seconds_min'] / row['seconds_min']:7.2f}x"
        )


# --- of a finished run ------------------------------------------------------------------------------------------------


def summary(run_dir: Path) -> dict:
    """Seconds are summed over the steps of metrics.jsonl (samples / samples_per_s), without evaluations and checkpoints.

    samples/s is over all steps but the first ten."""
    config = yaml.safe_load((run_dir / "config.yaml").read_text())
    environment = json.loads((run_dir / "environment.json").read_text())
    steps = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    size = config["train"]["batch_size"]
    seconds = [size / step["samples_per_s"] for step in steps]
    first = min(10, len(seconds) - 1)  # the first ones are slower
    waited = [step["data_wait"] * taken for step, taken in zip(steps, seconds, strict=True)]
    return {
        "machine": f"{environment['cpu']} {environment['cores']} cores" + "".join(f", {gpu}" for gpu in environment["gpus"]),
        "torch": environment["torch"],
        "commit": environment["commit"],
        "threads": environment["threads"],
        "model": config["model"]["name"],
        "preset": config["model"]["preset"],
        "steps": len(steps),
        "batch_size": size,
        "seconds": sum(seconds),
        "samples_per_s": size * len(seconds[first:]) / sum(seconds[first:]),
        "data_wait": sum(waited) / sum(seconds),
        "micro_batch": config["train"]["micro_batch"],
        "memory_mib": max(step["memory_bytes"] for step in steps) / 2**20,
        "evaluation": json.loads((run_dir / "evaluation.json").read_text()),
    }


def write_summary(run_dir: Path, path: Path | None) -> None:
    found = summary(run_dir)
    folder = ROOT / "benchmarks/results" / re.sub(r"\W+", "-", found["machine"]).strip("-")
    write(path or folder / f"train-{found['model']}-{found['preset'] or 'default'}.json", found)
    print(json.dumps(found, indent=1))


def write(path: Path, found: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")
    print(f"\nwritten: {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path, nargs="?", help="a finished run to summarise instead")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--model", choices=tuple(MODELS), nargs="+", help="default: tiny; on a GPU ViT-B-32")
    parser.add_argument("--part", type=int, help="samples that are encoded at a time (default: by model)")
    parser.add_argument("--parts", type=int, default=4, help="of a large batch")
    parser.add_argument("--only", choices=("steps", "data"), help="one half alone")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the CPU")
    parser.add_argument("--repeats", type=int, default=5, help="rounds")
    parser.add_argument("--cache", type=Path, default=ROOT / ".cache/vlpfast", help="where the made pictures are kept")
    parser.add_argument("--json", type=Path, help="default: results/MACHINE/train-steps-DEVICE.json, unless a choice is made")
    parser.add_argument("--quick", action="store_true", help="small batches, two rounds")
    parser.add_argument("--memory-of", nargs=5, help=argparse.SUPPRESS)
    parser.add_argument("--steps-of", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run_dir is not None:
        if not (args.run_dir / "evaluation.json").exists():
            parser.error(f"{args.run_dir} holds no finished run: expected evaluation.json there")
        write_summary(args.run_dir, args.json)
        return
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device")
    torch.set_num_threads(args.threads)
    if args.memory_of:
        print(peak_memory(*args.memory_of))
        return
    if args.steps_of:
        answer_steps(*args.steps_of)
        return
    names = args.model or ["tiny" if args.device == "cpu" else "ViT-B-32"]
    repeats = 2 if args.quick else args.repeats
    about = machine(args.device, args.threads)
    print(", ".join(f"{key} {about[key]}" for key in ("machine", "processor", "instructions", "threads", "torch", "commit")))
    found: dict[str, Any] = about | {"repeats": repeats, "steps": [], "data": []}
    for name in names if args.only != "data" else ():
        part = args.part or (8 if args.quick else MODELS[name][1])
        found["steps"] += steps(name, part, 2 if args.quick else args.parts, args.device, args.threads, repeats)
    if found["steps"]:
        show(found["steps"])
    if args.only != "steps":
        spec = MODELS[names[0]][0]().data
        batch, batches, scenes = (16, 4, 96) if args.quick else (args.part or 64, 60, 4096)
        found["data"] = _data_path.measure(spec, batch, batches, scenes, repeats, args.device, args.threads, args.cache)
        print()
        for row in found["data"]:
            print(f"{row['name']:26}{row['samples_per_s']:10,.0f} samples/s, pictures {row['picture']} -> {row['view']}")
    chosen = args.quick or args.only or args.part or args.model
    path = args.json or (None if chosen else ROOT / "benchmarks/results" / about["machine"] / f"train-steps-{args.device}.json")
    if path is not None:
        write(path, found)


if __name__ == "__main__":
    main()
