"""InstructBLIP's ablations, small: whether the Q-Former reads the instruction, and how data sets of unequal sizes are drawn.

    python benchmarks/claims/instructblip.py            at most seven minutes on two cores; the row is claims-instructblip.json

A tiny language model learns the texts of emojiworld's instructions without the pictures, a tiny tower and Q-Former BLIP-2's first
stage. Both once; then, over seeds, instruction tuning with the language model and the tower frozen (configs/instructblip.yaml):
instructed      the Q-Former's two queries see the instruction, or not (BLIP-2's way). Tried on held-out pictures, with ways to
                ask that were seen in training, and with one that was not.
sampling        a data set of 6,000 pictures with any question but where things are, and one of 120 that asks this alone, drawn in
                proportion to their sizes or to the square roots of these. Tried on held-out pictures: where things are.
Accuracy is that of the words that are written, by greedy search; descriptions are left out of it.

The claims, as the paper has them (table 3): with the instruction the answers are better, and more so where the way to ask is new;
square roots are better for the small data set. Outcomes are written whichever way they fall.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from vlpfast.cli import assemble
from vlpfast.data import make_loader
from vlpfast.data.emojiworld import Split, World, build
from vlpfast.data.shards import ShardSet, ShardWriter
from vlpfast.training.parallel import World as Ranks
from vlpfast.training.run_folder import environment
from vlpfast.training.trainer import Trainer

ROOT = Path(__file__).resolve().parents[2]
SEEDS = (1, 2, 3)
BIG, SMALL = 6000, 120
Record = dict[str, Any]


def rewritten(pattern: str, folder: Path, choose: Callable[[Record], list[Record]], count: int) -> str:
    """Shards of the first `count` samples that `choose` leaves instructions of, and these alone -> their pattern."""
    if not folder.exists():
        shards = ShardSet([pattern])
        aside = folder.with_suffix(".tmp")
        left = count
        with ShardWriter(aside, "part", samples_per_shard=500) as writer:
            for number in range(len(shards)):
                one = np.array([number])
                record = json.loads(shards.read(one, ("json",))[0].tobytes())
                if not (instructions := choose(record)):
                    continue
                members = {"jpg": shards.read(one, ("jpg",))[0].tobytes(), "txt": shards.read(one, ("txt",))[0].tobytes()}
                writer.write(record["key"], members | {"json": json.dumps(record | {"instructions": instructions}).encode()})
                left -= 1
                if not left:
                    break
        if left:
            raise SystemExit(f"{pattern} has {left} samples of the kind too few")
        aside.rename(folder)
    return str(folder / "part-*.tar")


def kinds(field: str, *wanted: str, without: bool = False) -> Callable[[Record], list[Record]]:
    return lambda record: [one for one in record[field] if (one["kind"] in wanted) != without]


def trained(run_dir: Path, changes: dict[str, Any], stages: dict[str, Any], base: Path | None, seed: int) -> tuple[Any, Any]:
    """-> the model behind the stages and its tokenizers. A run folder that has been there before goes on where it stopped."""
    config = yaml.safe_load((ROOT / "configs/instructblip.yaml").read_text())
    config["stages"] = {name: config["stages"][name] | stage for name, stage in stages.items()}
    for key, value in changes.items():
        section, _, name = key.partition(".")
        config[section][name] = value
    config["train"] |= {"run_dir": str(run_dir), "seed": seed, "tensorboard_every": 0, "checkpoint_every": 0}
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        yaml.safe_dump(config, file)
        file.flush()
        settings = assemble.load_config(file.name)
    sources = assemble.prepare_data(settings)
    run_dir.mkdir(parents=True, exist_ok=True)
    if base is not None:
        for path in base.glob("tokenizer-*.json"):
            (run_dir / path.name).write_bytes(path.read_bytes())
        settings.data.tokenizers = {name: str(run_dir / f"tokenizer-{name}.json") for name in ("lm", "qformer")}
    tokenizers = assemble.build_tokenizers(settings, sources.train, run_dir)
    model = assemble.build_model(settings)
    trainer = Trainer(settings, model, partial(assemble.open_loader, settings, sources, tokenizers, Ranks()), Ranks())
    if not trainer.fit():
        raise SystemExit("stopped; start again to go on")
    return model.eval(), tokenizers


def letters(text: str) -> str:
    """Of "t - shirt" and "T-shirt" the same."""
    return re.sub(r"\W", "", text.lower())


def accuracy(model: Any, tokenizers: Any, pattern: str, field: str = "instructions") -> float:
    """Of the first question of each picture."""
    data = model.config.data
    prompt, answer = (f"{{{field}.{part}}}" for part in ("instruction", "answer"))
    text = replace(data.text, templates=[prompt], answer=[answer])
    spec = replace(data, text=text, texts={"instruction": replace(data.texts["instruction"], templates=[prompt])})
    loader = make_loader([pattern], spec, tokenizers, 250, train=False, with_meta=True)
    right = []
    try:
        for batch in loader:
            written = model.generate(batch, beams=1, repetition_penalty=1.0, max_new_tokens=12)
            for ids, record in zip(written.tolist(), batch["meta"], strict=True):
                right.append(letters(tokenizers["lm"].decode(ids)) == letters(record[field][0]["answer"]))
    finally:
        loader.close()
    return statistics.mean(right)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--run-dir", type=Path, default=ROOT / "runs/claims-instructblip", help="keeps the models: started again they are there"
    )
    parser.add_argument("--cache-dir", type=Path, default=ROOT / ".cache/vlpfast")
    parser.add_argument("--steps", type=int, nargs=4, default=(250, 90, 180, 120), help="language, pretrain, instruct, sampling")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--json", type=Path, help="default: results/MACHINE/claims-instructblip.json")
    args = parser.parse_args()
    started = time.perf_counter()

    world = World(seed=11)
    splits = {
        "train": Split(8_000, (1, 2)),
        "place": Split(200, (1, 1)),
        "heldout": Split(600, (1, 2), heldout=True),
        "heldout_place": Split(600, (1, 1), heldout=True),
    }
    folder = args.cache_dir / "claims-instructblip"
    patterns = build(folder, world, splits)
    parts = folder.with_name("claims-instructblip-parts")
    seen = kinds("instructions", "caption", without=True)
    unseen = kinds("heldout_instructions", "caption", "place", without=True)
    place = kinds("heldout_instructions", "place")
    big = rewritten(patterns["train"], parts / "big", seen, BIG)
    small = rewritten(patterns["place"], parts / "small", place, SMALL)
    tests = {
        "seen template": rewritten(patterns["heldout"], parts / "seen", seen, 500),
        "new template": rewritten(patterns["heldout"], parts / "unseen", unseen, 500),
        "place": rewritten(patterns["heldout_place"], parts / "place", place, 400),
    }
    shards = {"data.source": "shards", "data.world": {}, "data.cache_dir": str(args.cache_dir)}

    language, pretrain, instruct, sampling = args.steps
    base = args.run_dir / "base"
    whole = {"data.train": [patterns["train"]]}
    trained(base, shards | whole, {"language": {"steps": language}, "pretrain": {"steps": pretrain}}, None, 0)
    print(f"language model and first stage: {time.perf_counter() - started:.0f} s", file=sys.stderr)

    start = {"init_from": str(base / "model.safetensors")}
    rows = []
    for seed in args.seeds:
        for instructed in (True, False):
            run_dir = args.run_dir / f"instructed-{instructed}-{seed}".lower()
            changes = shards | whole | {"model.instructed": instructed}
            made = trained(run_dir, changes, {"instruct": start | {"steps": instruct}}, base, seed)
            on = {name: accuracy(*made, tests[name]) for name in ("seen template", "new template")}
            rows.append({"claim": "instructed", "seed": seed, "instructed": instructed, "accuracy": on})
            print(json.dumps(rows[-1]), flush=True)
        for weights in ("size", "sqrt"):
            mixture = {"big": {"shards": [big]}, "small": {"shards": [small]}}
            changes = shards | {"data.mixture": mixture, "data.weights": weights}
            made = trained(args.run_dir / f"{weights}-{seed}", changes, {"instruct": start | {"steps": sampling}}, base, seed)
            on = {name: accuracy(*made, tests[name]) for name in ("place", "seen template")}
            rows.append({"claim": "sampling", "seed": seed, "weights": weights, "accuracy": on})
            print(json.dumps(rows[-1]), flush=True)

    def mean(test: str, **which: Any) -> float:
        return statistics.mean(row["accuracy"][test] for row in rows if which.items() <= row.items())

    means = {
        "instructed": {
            str(on): {test: mean(test, claim="instructed", instructed=on) for test in ("seen template", "new template")}
            for on in (True, False)
        },
        "sampling": {
            weights: {test: mean(test, claim="sampling", weights=weights) for test in ("place", "seen template")}
            for weights in ("size", "sqrt")
        },
    }
    with_it, without = means["instructed"]["True"], means["instructed"]["False"]
    gains = {test: with_it[test] - without[test] for test in with_it}
    claims = {
        "with the instruction in the Q-Former answers are better, asked in ways that were seen": gains["seen template"] > 0,
        "and in a way that was not": gains["new template"] > 0,
        "more so there": gains["new template"] > gains["seen template"],
        "square roots of sizes are better for the small data set": means["sampling"]["sqrt"]["place"]
        > means["sampling"]["size"]["place"],
    }
    for what, found in means.items():
        for kind, on in found.items():
            print(f"{what:12}{kind:8}" + "".join(f"{test:>16}{100 * value:6.1f}" for test, value in on.items()))
    for claim, held in claims.items():
        print(f"{'held' if held else 'DID NOT HOLD':15}{claim}")
    about = environment()
    machine = f"{about['cpu']} {about['cores']} cores" + "".join(f", {gpu}" for gpu in about["gpus"])
    found = {
        "machine": machine,
        **{key: about[key] for key in ("torch", "commit", "threads")},
        "seconds": time.perf_counter() - started,
        "steps": dict(zip(("language", "pretrain", "instruct", "sampling"), args.steps, strict=True)),
        "means": means,
        "claims": [{"claim": claim, "held": held} for claim, held in claims.items()],
        "rows": rows,
    }
    path = args.json or ROOT / "benchmarks/results" / re.sub(r"\W+", "-", machine).strip("-") / "claims-instructblip.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")
    print(f"written: {path}")


if __name__ == "__main__":
    main()
