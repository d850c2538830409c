"""Trains every registered system by its configuration, and writes docs/systems.md: what there is, and how well it does.

    python benchmarks/systems.py                    every configs/NAME.yaml: one run each, into results/MACHINE/systems.json
    python benchmarks/systems.py --only tcl coop    these; the other rows of the file stay
    python benchmarks/systems.py --table            docs/systems.md alone, from the registry and the newest results

A row: seconds of `vlpfast-train` from its start to its end (the made pictures are there beforehand; how long making them takes is
a figure of its own), samples a second of the training steps, and one held-out figure beside chance and beside the same network
before training, with the standard error of a share of so many samples. --runs keeps the run folders.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from vlpfast import models
from vlpfast.cli import assemble
from vlpfast.cli.evaluate import evaluate
from vlpfast.training.run_folder import environment

ROOT = Path(__file__).resolve().parents[1]
# The figure of a system is the first of these that its evaluation has: metric, chance, number of samples.
FIGURES = (
    ("written_accuracy", "written_chance_accuracy", "written_samples"),
    ("answers_accuracy", "answers_chance_accuracy", "answers_samples"),
    ("classification_top1", "classification_chance_top1", "classification_samples"),
    ("text_to_image_R@10", "text_to_image_chance_R@10", "retrieval_samples"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=models.names(), default=None)
    parser.add_argument("--table", action="store_true", help="measure nothing")
    parser.add_argument("--runs", type=Path, help="a folder that keeps the run folders; default: a temporary one")
    args = parser.parse_args()
    if not args.table:
        measure(args.only or [name for name in models.names() if (ROOT / "configs" / f"{name}.yaml").exists()], args.runs)
    (ROOT / "docs" / "systems.md").write_text(table(), encoding="utf-8")
    print("written: docs/systems.md")


def measure(names: list[str], runs: Path | None) -> None:
    about = environment()
    machine = f"{about['cpu']} {about['cores']} cores" + "".join(f", {gpu}" for gpu in about["gpus"])
    path = ROOT / "benchmarks/results" / re.sub(r"\W+", "-", machine).strip("-") / "systems.json"
    found = json.loads(path.read_text()) if path.exists() else {"machine": machine, "rows": {}}
    with tempfile.TemporaryDirectory() as temporary:
        for name in names:
            row = measured(name, (runs or Path(temporary)) / name)
            found["rows"][name] = {"commit": about["commit"], "torch": about["torch"], **row}
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(found, indent=1) + "\n")
            print(name, json.dumps(row), flush=True)
    print(f"written: {path}")


def measured(name: str, run_dir: Path) -> dict[str, Any]:
    config = assemble.load_config(ROOT / "configs" / f"{name}.yaml", [f"train.run_dir={run_dir}"])
    started = time.perf_counter()
    sources = assemble.prepare_data(config)
    making = time.perf_counter() - started
    started = time.perf_counter()
    command = [sys.executable, "-m", "vlpfast.cli.train", str(ROOT / "configs" / f"{name}.yaml"), f"train.run_dir={run_dir}"]
    out = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    seconds = time.perf_counter() - started
    metrics = json.loads(out.splitlines()[-1])
    metric, chance, samples = next(figure for figure in FIGURES if figure[0] in metrics)
    tokenizers = assemble.build_tokenizers(config, sources, run_dir)
    untrained = evaluate(config, assemble.build_model(config), tokenizers, sources, torch.device("cpu")).metrics
    steps = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    value, count = metrics[metric], metrics[samples]
    return {
        "seconds": seconds,
        "making_data_seconds": making,
        "samples_per_s": statistics.median(step["samples_per_s"] for step in steps),
        "steps": len(steps),
        "metric": metric,
        "value": value,
        "standard_error": math.sqrt(max(value * (1 - value), 1 / count) / count),
        "chance": metrics[chance],
        "untrained": untrained[metric],
        "samples": count,
        "metrics": metrics,
    }


def table() -> str:
    lines = [
        "# Systems",
        "",
        "Written by `benchmarks/systems.py --table` from the registry and the files in `benchmarks/results/`; not by hand.",
        "Parameters are of the Config's defaults, counted on meta tensors, without momentum copies. The held-out figure is of",
        "the small preset on the made pictures, trained by `vlpfast-train configs/NAME.yaml`: it shows that the system learns,",
        "not what the paper reached.",
        "",
        "| name | what, and by whom | parameters (published) | held-out figure (chance; before training) | training | claims |",
        "|---|---|---|---|---|---|",
    ]
    rows, machines = newest("systems.json")
    for name in models.names():
        cls = models.get(name)
        with torch.device("meta"):
            named = cls(cls.Config()).named_parameters()
            count = sum(parameter.numel() for key, parameter in named if not key.startswith("momentum."))
        published = f"{cls.PUBLISHED_PARAMETERS / 1e6:,.1f} M" if cls.PUBLISHED_PARAMETERS else "not published"
        published = f"{count / 1e6:,.1f} M ({published})"
        first = " ".join(cls.__doc__.strip().split("\n\n")[0].split())
        cells = (f"`{name}`", f"{first} {cls.PAPER}", published, figure(rows.get(name)), speed(rows.get(name)), claims(name))
        lines.append(f"| {' | '.join(cells)} |")
    if machines:
        lines += ["", f"Measured on: {'; '.join(machines)}."]
    return "\n".join(lines) + "\n"


def newest(file: str) -> tuple[dict[str, Any], list[str]]:
    rows, machines = {}, []
    for path in sorted((ROOT / "benchmarks/results").glob(f"*/{file}")):
        found = json.loads(path.read_text())
        rows |= found["rows"]
        machines.append(found["machine"])
    return rows, machines


def figure(row: dict[str, Any] | None) -> str:
    if row is None:
        return "not measured"
    value, error, chance, before = (100 * row[key] for key in ("value", "standard_error", "chance", "untrained"))
    return f"{row['metric'].replace('_', ' ')} {value:.1f} ± {error:.1f} % ({chance:.1f}; {before:.1f})"


def speed(row: dict[str, Any] | None) -> str:
    return "" if row is None else f"{row['seconds']:.0f} s, {row['samples_per_s']:,.0f} samples/s"


def claims(name: str) -> str:
    found = []
    for path in sorted((ROOT / "benchmarks/results").glob(f"*/claims-{name}.json")):
        found += [
            f"{'held' if one['held'] else 'did not hold'}: {one['claim']}" for one in json.loads(path.read_text())["claims"]
        ]
    return "; ".join(found)


if __name__ == "__main__":
    main()
