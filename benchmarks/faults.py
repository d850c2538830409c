"""A small training run that is killed again and again, compared with one that was not: a row for benchmarks/results.

    python benchmarks/faults.py --kills 30               one process, checkpoints written in the background
    python benchmarks/faults.py --kills 10 --ranks 2     two under torchrun; one of them is killed, torchrun ends the other

Kills (SIGKILL) come at random moments of a seeded generator and, half of them, while a checkpoint is being written. After each
every finished checkpoint has to be whole. A run that is done has to have the metrics (but for what a clock measures) and the
model of the unbroken run, bit for bit; then another one begins, until there were enough kills. The script ends with an error, and
names its seed, where a promise is broken. It measures no speed. tests/training/test_faults.py is the short form.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "training"))

from storm import storm  # noqa: E402

from vlpfast.training.run_folder import environment  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--at-once", action="store_true", help="checkpoints are written while the training waits")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seed", type=int, help="of the moments; default: drawn")
    parser.add_argument("--json", type=Path, help="default: results/MACHINE/faults-RANKS.json")
    args = parser.parse_args()
    seed = random.randrange(10**6) if args.seed is None else args.seed
    settings = (f"train.steps={args.steps}", "train.checkpoint_every=3", "train.batch_size=4")
    background = f"train.async_checkpoint={not args.at_once}"
    with tempfile.TemporaryDirectory() as folder:
        met = storm(
            Path(folder), args.kills, args.ranks, seed, *settings, background, seconds=0.01, torchrun=args.ranks > 1, say=print
        )
    about = environment()
    machine = f"{about['cpu']} {about['cores']} cores" + "".join(f", {gpu}" for gpu in about["gpus"])
    found = {"machine": machine, **{key: about[key] for key in ("torch", "commit")}, **met}
    path = args.json or ROOT / "benchmarks/results" / re.sub(r"\W+", "-", machine).strip("-") / f"faults-{args.ranks}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")
    print(f"{met['kills']} kills, {met['runs']} runs, all as if unbroken; written: {path}")


if __name__ == "__main__":
    main()
