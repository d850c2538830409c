"""What token merging, switched on after training alone, costs a trained model in accuracy: a row for benchmarks/results.

    vlpfast-train configs/clip.yaml
    python benchmarks/merged_accuracy.py runs/clip                       r = 0, 4, 8, 13 in each block, on the newest checkpoint
    python benchmarks/merged_accuracy.py runs/clip --select 0 --keep 0.7    selection in block 0, as well

Retrieval and zero-shot classification over the run's held-out data, as vlpfast-eval measures them, and how many tokens reach the
feed-forward part of the vision tower's last block. "promised" is not measured: operations of that tower for one picture without a
schedule over those with it (benchmarks/vit.py measures). The run's folder stays as it is. For one schedule alone there is
`vlpfast-eval runs/clip model.vision.merge.r=8`.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

import torch
from _measure import ROOT
from vit import operations

from vlpfast.cli import assemble
from vlpfast.cli.evaluate import evaluate
from vlpfast.training import checkpoint
from vlpfast.training.precision import choose_device
from vlpfast.training.run_folder import environment

SHOWN = ("zero_shot_top1", "text_to_image_R@1", "image_to_text_R@1")


def row(run_dir: Path, overrides: list[str], device: torch.device) -> dict:
    config = assemble.load_config(run_dir / "config.yaml", [f"model.vision.{override}" for override in overrides])
    chosen, _ = checkpoint.find_newest(run_dir / "checkpoints")
    if chosen is None:
        raise SystemExit(f"{run_dir}: there is no finished checkpoint")
    model = assemble.build_model(config)
    checkpoint.load_weights(chosen, model)
    model.to(device).eval()
    sources = assemble.prepare_data(config)
    metrics = evaluate(config, model, assemble.load_tokenizers(config, run_dir), sources, device).metrics
    lengths: list[int] = []
    for block in model.vision.transformer.blocks:
        block.fc1.register_forward_hook(lambda _, inputs, __: lengths.append(inputs[0].shape[1]))
    picture = torch.zeros(1, 3, model.vision.image_size, model.vision.image_size, device=device)
    count = operations(model.vision, picture)
    return {"schedule": " ".join(overrides) or "none", "tokens": lengths, "operations": count, "metrics": metrics}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path, help="a finished run of a model with a vision transformer")
    parser.add_argument("--r", type=int, nargs="+", default=[4, 8, 13], help="tokens merged away in each block")
    parser.add_argument("--select", type=int, nargs="+", help="blocks that select, in a row of its own")
    parser.add_argument("--keep", type=float, default=0.7, help="share of the patches that these keep")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path, help="default: results/MACHINE/merged-MODEL-PRESET.json")
    args = parser.parse_args()
    device = choose_device(args.device)
    schedules = [[], *([f"merge.r={r}"] for r in args.r)]
    if args.select:
        schedules.append([f"select.layers={args.select}", f"select.keep={args.keep}"])
    rows = []
    for overrides in schedules:
        rows.append(row(args.run_dir, overrides, device))
        found = rows[-1]["metrics"]
        shown = "  ".join(f"{name} {100 * found[name]:5.1f} %" for name in SHOWN if name in found)
        faster = rows[0]["operations"] / rows[-1]["operations"]
        print(f"{rows[-1]['schedule']:32} {rows[-1]['tokens'][-1]:4} tokens  {faster:5.2f}x promised  {shown}", flush=True)
    about = environment()
    config = assemble.load_config(args.run_dir / "config.yaml")
    machine = f"{about['cpu']} {about['cores']} cores" + "".join(f", {gpu}" for gpu in about["gpus"])
    found = {
        "machine": machine,
        **{key: about[key] for key in ("torch", "commit", "threads")},
        "model": config.model.name,
        "preset": config.model.preset,
        "device": str(device),
        "rows": rows,
    }
    name = f"merged-{config.model.name}-{config.model.preset or 'default'}.json"
    path = args.json or ROOT / "benchmarks/results" / re.sub(r"\W+", "-", machine).strip("-") / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")
    print(f"written: {path}")


if __name__ == "__main__":
    main()
