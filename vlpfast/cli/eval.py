"""vlpfast-eval: the figures and the report of a trained model."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlpfast.cli._run import run
from vlpfast.types import UserError

if TYPE_CHECKING:
    from vlpfast.training.config import DataConfig, RunConfig

HELP = """\
Evaluates a checkpoint of the run folder RUN_DIR: retrieval both ways over the held-out pairs and, where the classes are known,
zero-shot classification. Writes evaluation.json and report.html into the folder, prints a table and, as the last line, all
figures as one JSON object (R@k and top-k are fractions).
"""

EXAMPLES = """\
examples:
  vlpfast-eval runs/clip                                        the newest checkpoint, on the run's own held-out data
  vlpfast-eval runs/clip --checkpoint 300                       the checkpoint of step 300, while it is kept
  vlpfast-eval runs/clip --shards 'data/coco-{000..004}.tar'    on other shards
  vlpfast-eval runs/clip evaluation.class_names=classes.txt --shards data/birds
                                                                with zero-shot classification over the names in classes.txt
  vlpfast-eval runs/clip evaluation.batch_size=1000 --device cuda:1 --no-report | tail -n 1

overrides are key=value with the keys of RUN_DIR/config.yaml; they stand before --shards. Above all:
  evaluation.batch_size   pairs encoded at a time              data.loader   auto, dali or plain
  evaluation.zero_shot    false leaves it out                  data.cache_dir   where emojiworld is kept

exit codes: 0 done; 2 a mistake in what was asked for.
"""


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="vlpfast-eval", description=HELP, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run_dir", metavar="RUN_DIR", type=Path, help="the folder of a run, as vlpfast-train leaves it")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="settings that replace those of the run")
    parser.add_argument("--checkpoint", metavar="STEP", default="latest", help="a step, or latest (the default)")
    parser.add_argument(
        "--shards", metavar="PATTERN", nargs="+", help="evaluate on these: tar files, globs, folders, with {a..b} and {a,b}"
    )
    parser.add_argument("--device", default="auto", help="auto (the GPU where there is one, the default), cpu, cuda, cuda:1")
    parser.add_argument("--no-report", action="store_true", help="leave report.html as it is")
    arguments = parser.parse_intermixed_args(argv)

    # Here, because they take a while to load: --help should not wait for them.
    from vlpfast.cli import assemble
    from vlpfast.cli.evaluate import evaluate
    from vlpfast.evaluation.report import write_report
    from vlpfast.training import checkpoint, run_folder
    from vlpfast.training.precision import choose_device

    run_dir: Path = arguments.run_dir
    if not run_dir.is_dir():
        raise UserError(f"run folder {run_dir} does not exist: expected one that vlpfast-train made")
    if not (run_dir / "config.yaml").exists():
        raise UserError(f"{run_dir} is no run folder: it has no config.yaml")
    config = assemble.load_config(run_dir / "config.yaml", arguments.overrides)
    device = choose_device(arguments.device)
    step, chosen = find_checkpoint(run_dir / "checkpoints", arguments.checkpoint)
    sources = assemble.prepare_data(config, _evaluation_data(config, arguments.shards))
    tokenizers = assemble.load_tokenizers(config, run_dir)
    model = assemble.build_model(config)
    assemble.give_classes(config, model, tokenizers, sources)
    checkpoint.load_weights(chosen, model)
    model.to(device)

    print(f"evaluating the checkpoint of step {step} on {device}", file=sys.stderr)
    evaluation = evaluate(config, model, tokenizers, sources, device, _say_batch if sys.stderr.isatty() else None)
    result: dict[str, Any] = {"step": step, **evaluation.metrics}
    if arguments.shards:
        result["shards"] = arguments.shards
    with run_folder.full_disk_named(run_dir):
        run_folder.replace(run_dir / "evaluation.json", json.dumps(result, indent=1) + "\n")
    if not arguments.no_report:
        report = write_report(run_dir, evaluation=result, **evaluation.sheets())
        print(f"report: {report}", file=sys.stderr)
    print(table(evaluation.metrics))
    print(json.dumps(result))
    return 0


def find_checkpoint(folder: Path, which: str) -> tuple[int, Path]:
    from vlpfast.training import checkpoint

    if which == "latest":
        path, notes = checkpoint.find_newest(folder)
        for note in notes:
            print(note, file=sys.stderr)
        if path is None:
            raise UserError(f"there is no finished checkpoint in {folder}: has the run saved one yet?")
        return int(path.name.removeprefix("step-")), path
    kept = {int(path.name.removeprefix("step-")): path for path in folder.glob("step-*[0-9]")}
    if not which.isdecimal() or int(which) not in kept:
        steps = ", ".join(map(str, sorted(kept))) or "none"
        raise UserError(f"--checkpoint {which}: expected latest or the step of a checkpoint in {folder} (there: {steps})")
    return int(which), kept[int(which)]


def _evaluation_data(config: RunConfig, shards: list[str] | None) -> DataConfig:
    """The run's data section as far as evaluation needs it: the training shards may be gone."""
    data = config.data
    if shards:
        return dataclasses.replace(data, source="shards", train=shards, heldout=shards)
    if data.source == "shards":
        if not data.heldout:
            raise UserError("the run has no held-out data (data.heldout is empty): say what to evaluate on with --shards")
        return dataclasses.replace(data, train=data.heldout)
    return data


def _say_batch(done: int, total: int) -> None:
    print(f"\rbatch {done:,} of {total:,}", end="\n" if done == total else "", file=sys.stderr, flush=True)


def table(metrics: dict[str, float]) -> str:
    """The headline figures for people: one line for each task, percentages with chance in brackets."""

    def cell(name: str, chance: str) -> str:
        return f"{100 * metrics[name]:5.1f} % ({100 * metrics[chance]:.1f})"

    lines = []
    for name in ("text_to_image", "image_to_text"):
        if f"{name}_R@1" not in metrics:
            continue
        shown = (f"R@{k} {cell(f'{name}_R@{k}', f'{name}_chance_R@{k}')}" for k in (1, 5, 10))
        lines.append("  ".join((f"{name.replace('_', ' '):16}", *shown, f"median rank {metrics[f'{name}_median_rank']:g}")))
        if f"reranked_{name}_R@1" in metrics:
            shown = (f"R@{k} {cell(f'reranked_{name}_R@{k}', f'{name}_chance_R@{k}')}" for k in (1, 5, 10))
            lines.append("  ".join((f"{'  reordered':16}", *shown)))
    for name, share in (("classification", "top1"), ("answers", "accuracy"), ("written", "accuracy")):
        if f"{name}_{share}" in metrics:
            lines.append(f"{name:16}  right {cell(f'{name}_{share}', f'{name}_chance_{share}')}")
    if "zero_shot_top1" in metrics:
        shown = (f"top-{k} {cell(f'zero_shot_top{k}', f'zero_shot_chance_top{k}')}" for k in (1, 5))
        lines.append("  ".join((f"{'zero-shot':16}", *shown)))
    return "\n".join([*lines, "(in brackets: chance)"])


def entry() -> None:
    run(main)


if __name__ == "__main__":
    entry()
