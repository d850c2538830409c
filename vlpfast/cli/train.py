"""vlpfast-train: from a configuration to a trained model, its figures and its report."""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import ExitStack
from functools import partial

from vlpfast.cli._run import run
from vlpfast.types import UserError

HELP = """\
Trains the model that CONFIG describes, evaluates it and writes a report. Everything goes into the folder train.run_dir:
config.yaml, metrics.jsonl (one line per step), checkpoints/, evaluation.jsonl, report.html, model.safetensors.
Starting again with the same folder goes on where the run stopped, exactly as if it had not been interrupted.
"""

EXAMPLES = """\
examples:
  vlpfast-train configs/clip.yaml                              the demo: a small CLIP on made-up pictures, in a few minutes
  vlpfast-train configs/clip.yaml train.steps=500 train.run_dir=runs/short
  vlpfast-train configs/clip.yaml model.preset=paper data.source=shards train.run_dir=runs/cc3m \\
      'data.train=["/data/cc3m-{00000..00331}.tar"]' 'data.heldout=["/data/cc3m-val-*.tar"]'      ViT-B/32 on your own shards
  vlpfast-train configs/clip.yaml --print-config               every setting with its value
  vlpfast-train configs/clip.yaml --dry-run                    parameters, FLOPs, memory, the first batch as a picture: no step
  vlpfast-train configs/clip.yaml train.steps=30 --profile     a trace of ten steps and what to try first, in runs/clip/profile

overrides are key=value with the keys of the file, dotted: train.lr=3e-4, model.vision.layers=6, data.num_scenes=5000.
Values are YAML: lists as [a,b], text with braces in quotes, nothing as `key=`. An unknown key is an error that names the
nearest right one.

exit codes: 0 finished; 2 a mistake in what was asked for; 75 stopped by SIGTERM or SIGUSR1 after saving (start again to go on);
130 stopped by Ctrl-C (start again to go on from the last checkpoint).
"""


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="vlpfast-train", description=HELP, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", metavar="CONFIG", help="a YAML file, such as configs/clip.yaml")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="settings that replace those of the file")
    parser.add_argument("--print-config", action="store_true", help="print every setting with its value and stop")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print parameters, FLOPs and memory, write the first batch as a picture, and stop: no step, no run folder",
    )
    parser.add_argument(
        "--profile",
        nargs="?",
        type=_steps,
        const=10,
        metavar="STEPS",
        help="look at STEPS steps (10) after the first five: a trace and a summary in RUN_DIR/profile",
    )
    arguments = parser.parse_intermixed_args(argv)

    # Here, because torch takes a second to load: --help should not wait for it.
    import torch

    from vlpfast.cli import assemble
    from vlpfast.cli.evaluate import Evaluation, evaluate
    from vlpfast.evaluation.report import write_report
    from vlpfast.training import run_folder
    from vlpfast.training.config import to_yaml
    from vlpfast.training.parallel import joined
    from vlpfast.training.precision import autocast_dtype, is_fast
    from vlpfast.training.profiling import WARM_UP, Profiler
    from vlpfast.training.trainer import EXIT_PREEMPTED, Trainer

    config = assemble.load_config(arguments.config, arguments.overrides)
    if arguments.print_config:
        print(to_yaml(config), end="")
        return 0
    if arguments.dry_run:
        from vlpfast.cli.dry_run import dry_run

        dry_run(config)
        return 0
    if arguments.profile and config.total_steps() < WARM_UP + arguments.profile:
        raise UserError(
            f"--profile {arguments.profile} needs {WARM_UP + arguments.profile} steps with the first {WARM_UP}, "
            f"the run has {config.total_steps()}"
        )
    with joined(config.train) as world, run_folder.opened(config) as run_dir, ExitStack() as stack:
        sources = world.in_turn(lambda: assemble.prepare_data(config))
        tokenizers = world.in_turn(lambda: assemble.build_tokenizers(config, sources.train, run_dir, world.is_first))
        model = assemble.build_model(config)
        assemble.give_classes(config, model, tokenizers, sources)
        last = Evaluation()

        def on_evaluate(step: int) -> dict[str, float]:
            nonlocal last
            last = evaluate(config, model, tokenizers, sources, world.device, rank=world.rank, ranks=world.size)
            assemble.give_classes(config, model, tokenizers, sources)  # evaluation may have others
            return last.metrics

        profiler = None
        if arguments.profile and world.is_first:
            about = {
                "bf16": autocast_dtype(config.train.precision, world.device) == torch.bfloat16,
                "bf16_is_fast": is_fast(torch.bfloat16, world.device),
                "loader": config.data.loader,
            }
            profiler = Profiler(run_dir, arguments.profile, world.device, config.train.batch_size, about)
            stack.callback(profiler.close)
        trainer = Trainer(
            config,
            model,
            partial(assemble.open_loader, config, sources, tokenizers, world),
            world,
            on_evaluate if sources.heldout else None,
            profiler,
        )
        if not trainer.fit():
            return EXIT_PREEMPTED
        if not world.is_first:
            return 0
        result = {"step": trainer.position.step, **last.metrics}
        run_folder.replace(run_dir / "evaluation.json", json.dumps(result, indent=1) + "\n")
        report = write_report(run_dir, evaluation=result, **last.sheets())
        print(f"report: {report}", file=sys.stderr)
    print(json.dumps(result))
    return 0


def _steps(text: str) -> int:
    if not (text.isdecimal() and int(text)):
        raise argparse.ArgumentTypeError(
            f"expected a number of steps, got {text!r} (key=value settings stand before --profile, or write --profile=10)"
        )
    return int(text)


def entry() -> None:
    run(main)


if __name__ == "__main__":
    entry()
