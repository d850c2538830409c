"""What a training run took and reached, from its run folder: a row for benchmarks/results.

    vlpfast-train configs/clip.yaml
    python benchmarks/train.py runs/clip

Seconds are summed over the steps of metrics.jsonl (samples / samples_per_s), without evaluations and checkpoints; samples/s is
over all steps but the first ten.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]


def summary(run_dir: Path) -> dict:
    config = yaml.safe_load((run_dir / "config.yaml").read_text())
    environment = json.loads((run_dir / "environment.json").read_text())
    steps = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    size = config["train"]["batch_size"]
    seconds = [size / step["samples_per_s"] for step in steps]
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
        "samples_per_s": size * len(seconds[10:]) / sum(seconds[10:]),
        "data_wait": sum(waited) / sum(seconds),
        "evaluation": json.loads((run_dir / "evaluation.json").read_text()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path, help="a finished run")
    parser.add_argument("--json", type=Path, help="default: results/MACHINE/train-MODEL-PRESET.json")
    args = parser.parse_args()
    if not (args.run_dir / "evaluation.json").exists():
        parser.error(f"{args.run_dir} holds no finished run: expected evaluation.json there")
    found = summary(args.run_dir)
    folder = ROOT / "benchmarks/results" / re.sub(r"\W+", "-", found["machine"]).strip("-")
    path = args.json or folder / f"train-{found['model']}-{found['preset'] or 'default'}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))
    print(f"written: {path}")


if __name__ == "__main__":
    main()
