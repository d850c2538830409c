"""vlpfast-data curate: leave out near-duplicates, or pairs that a trained model finds do not belong together."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlpfast.types import UserError

if TYPE_CHECKING:
    import numpy as np

    from vlpfast.data.curate import Report

_NEAR_HELP = """\
Leaves out each picture that nearly equals a kept one before it: their 64-bit perceptual hashes differ in at most --distance bits.
Plain pictures, of whatever colour, are all alike to such a hash. Damaged pictures are left out as well.
"""

_SCORE_HELP = """\
Scores each pair by the cosine of picture and caption under the newest checkpoint of the run folder RUN_DIR, and keeps those that
score at least --threshold, or the --top share. Damaged pairs are left out as well.
"""

_MADE = """
OUT gets new shards of what is kept (all members, in the same order), decisions.jsonl with a line for each sample, and
report.json. It appears when all is whole; a curation that was interrupted starts anew.
"""

_NEAR_EXAMPLES = """\
examples:
  vlpfast-data curate near-duplicates 'data/cc3m-{000..331}.tar' --out data/cc3m-unique
  vlpfast-data curate near-duplicates data/photos --by dhash --distance 2 --dry-run --out found
"""

_SCORE_EXAMPLES = """\
examples:
  vlpfast-data curate clip-score runs/clip 'data/web-{000..099}.tar' --top 0.3 --out data/web-best
  vlpfast-data curate clip-score runs/clip data/photos --threshold 0.25 --dry-run --out scores
"""


def add_curate(commands, positive: Callable[[str], int], progress: Callable[[str], Any], patterns: str) -> None:
    raw = argparse.RawDescriptionHelpFormatter
    text = "leave samples out: near-duplicates, or pairs with a low score"
    curate = commands.add_parser("curate", help=text, description=text[0].upper() + text[1:] + ".")
    methods = curate.add_subparsers(title="methods", metavar="METHOD", required=True)

    near = methods.add_parser(
        "near-duplicates",
        help="pictures that nearly equal one before them",
        description=_NEAR_HELP + _MADE,
        epilog=_NEAR_EXAMPLES,
        formatter_class=raw,
    )
    near.add_argument("patterns", nargs="+", metavar="PATTERN", help=patterns)
    near.add_argument(
        "--by", default="phash", choices=("phash", "dhash", "bytes"), help="phash, dhash, bytes: equal ones (phash)"
    )
    near.add_argument("--distance", type=int, default=4, metavar="BITS", help="of 64; 0: equal hashes; up to 11 (4)")
    near.set_defaults(command=lambda arguments: _near_duplicates(arguments, progress("samples")))

    score = methods.add_parser(
        "clip-score",
        help="pairs whose picture and caption a trained model finds unlike",
        description=_SCORE_HELP + _MADE,
        epilog=_SCORE_EXAMPLES,
        formatter_class=raw,
    )
    score.add_argument("run_dir", metavar="RUN_DIR", type=Path, help="the folder of a run, as vlpfast-train leaves it")
    score.add_argument("patterns", nargs="+", metavar="PATTERN", help=patterns)
    keep = score.add_mutually_exclusive_group(required=True)
    keep.add_argument("--threshold", type=float, metavar="X", help="the lowest cosine that is kept, -1 to 1")
    keep.add_argument("--top", type=float, metavar="SHARE", help="the share that is kept, such as 0.3")
    score.add_argument("--checkpoint", metavar="STEP", default="latest", help="a step, or latest (latest)")
    score.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 (auto: the GPU where there is one)")
    score.add_argument("--batch-size", type=positive, default=256, metavar="N", help="pairs encoded at a time (256)")
    score.set_defaults(command=lambda arguments: _clip_score(arguments, progress("pairs"), progress("samples")))

    for one in (near, score):
        one.add_argument("--out", required=True, help="the folder to make")
        one.add_argument("--dry-run", action="store_true", help="decisions and report alone, no shards")
        one.add_argument("--prefix", default="train", help="name of the new shards (train)")
        one.add_argument("--samples-per-shard", type=positive, default=1000, metavar="N", help="samples in each (1000)")
        one.add_argument("--threads", type=positive, default=4, metavar="N", help="threads that read and decode (4)")


def _written(arguments: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(arguments, name) for name in ("dry_run", "prefix", "samples_per_shard", "threads")}


def _near_duplicates(arguments: argparse.Namespace, progress) -> int:
    from vlpfast.data.curate import near_duplicates

    settings = {"by": arguments.by, "distance": arguments.distance, **_written(arguments)}
    report = near_duplicates(arguments.patterns, arguments.out, **settings, progress=progress)
    _print(report, arguments)
    if report.numbers["groups"]:
        print(f"duplicates  of {report.numbers['groups']} pictures; the largest group has {report.numbers['largest_group']}")
    return 0


def _clip_score(arguments: argparse.Namespace, scoring, writing) -> int:
    from vlpfast.data.curate import by_scores, check_out

    check_out(arguments.out)  # before the work, not after it
    scores, damaged, step = _scores(arguments, scoring)
    method = {"name": "clip-score", "run_dir": str(arguments.run_dir), "step": step}
    method |= {"threshold": arguments.threshold} if arguments.top is None else {"top": arguments.top}
    keep = {"threshold": arguments.threshold, "top": arguments.top, "damaged": damaged, "method": method}
    report = by_scores(arguments.patterns, scores, arguments.out, **keep, **_written(arguments), progress=writing)
    _print(report, arguments)
    numbers = report.numbers
    print(f"scores      {', '.join(f'{name} {value:.3f}' for name, value in numbers['scores'].items())}")
    print(f"kept from   {numbers['threshold']:.6f} on")
    return 0


def _scores(arguments: argparse.Namespace, progress) -> tuple[np.ndarray, dict[int, str], int]:
    """-> cosines [N] float32 (NaN: damaged), why a sample is damaged, the checkpoint's step. Memory: 4 bytes a pair."""
    import numpy as np
    import torch

    from vlpfast.cli import assemble
    from vlpfast.cli.eval import find_checkpoint
    from vlpfast.data import ShardSet, make_loader
    from vlpfast.evaluation.features import evaluating, require
    from vlpfast.training import checkpoint
    from vlpfast.training.precision import choose_device

    if not (arguments.run_dir / "config.yaml").exists():
        raise UserError(f"{arguments.run_dir} is no run folder: it has no config.yaml")
    config = assemble.load_config(arguments.run_dir / "config.yaml")
    device = choose_device(arguments.device)
    step, chosen = find_checkpoint(arguments.run_dir / "checkpoints", arguments.checkpoint)
    spec = assemble.data_spec(config)
    model = assemble.build_model(config)
    if spec.image is None or spec.text is None:
        raise UserError(f"clip-score: the model {config.model.name} of {arguments.run_dir} does not take pictures and captions")
    try:
        for side in ("image", "text"):
            require(model, side)
    except TypeError as error:
        raise UserError(f"clip-score: {error}") from error
    checkpoint.load_weights(chosen, model)
    model.to(device)
    shards = ShardSet(arguments.patterns, threads=arguments.threads)
    loader = make_loader(
        arguments.patterns,
        replace(spec, texts={}, targets={}),
        assemble.load_tokenizers(config, arguments.run_dir),
        arguments.batch_size,
        train=False,
        backend=config.data.loader,
        device=device,
        threads=arguments.threads,
    )
    scores = np.full(len(shards), np.nan, np.float32)
    done = 0
    try:
        with evaluating(model):
            for batch in loader:
                mask = batch.get("text_mask")
                image = model.encode_image(batch["image"].to(device)).float()  # [B, D]
                text = model.encode_text(batch["text"].to(device), None if mask is None else mask.to(device)).float()
                found = torch.nn.functional.cosine_similarity(image, text).cpu()  # [B]
                if not found.isfinite().all():
                    key = batch["key"][int((~found.isfinite()).nonzero()[0])]
                    raise UserError(f"clip-score: the score of {key} is not finite; did the training diverge?")
                scores[batch["index"].numpy()] = found.numpy()
                done += len(found)
                if progress is not None:
                    progress(done, len(shards))
    finally:
        loader.close()
    missing = np.flatnonzero(np.isnan(scores)).tolist()
    return scores, {i: loader.skipped.get(shards.name(i), "no score") for i in missing}, step


def _print(report: Report, arguments: argparse.Namespace) -> None:
    print(f"samples     {report.samples}")
    print(f"kept        {report.kept} ({report.kept / report.samples:.1%})")
    print(f"left out    {report.left_out}" + (f", {report.damaged} of them damaged" if report.damaged else ""))
    if arguments.dry_run:
        print(f"written     {arguments.out}/decisions.jsonl, no shards")
    else:
        print(f"written     {report.shards} shards: {arguments.out}/{arguments.prefix}-*.tar, and decisions.jsonl")
