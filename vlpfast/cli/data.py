"""vlpfast-data: make, index, check, curate and look at shards."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from typing import NoReturn

from vlpfast.cli._run import run
from vlpfast.cli.curate import add_curate
from vlpfast.types import UserError

_EXAMPLES = """\
examples:
  vlpfast-data build pictures photos/ data/photos             shards from a folder of pictures with .txt or .json beside
  vlpfast-data emojiworld data/emoji --num-scenes 20000      make the embedded data
  vlpfast-data preview 'data/emoji/train-*.tar' -o sheet.png  look at it
  vlpfast-data stats data/emoji                               count what is there
  vlpfast-data verify 'data/cc3m-{000..331}.tar'              find damaged samples
  vlpfast-data index 'data/cc3m-{000..331}.tar'               make the index files beforehand
  vlpfast-data curate near-duplicates data/photos --out data/unique

PATTERN is a tar file, a glob, a folder of tar files, or any of them with braces as in {000..331}. Quote patterns, so that the
shell leaves them alone.
"""


def entry() -> NoReturn:
    run(main)


def main(argv: list[str]) -> int:
    arguments = _parser().parse_args(argv)
    return arguments.command(arguments)


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "vlpfast-data",
        description="Make, index, check, curate and look at WebDataset shards.",
        epilog=_EXAMPLES,
        formatter_class=raw,
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    _add_build(commands)
    add = commands.add_parser(
        "emojiworld",
        help="make the embedded data: scenes of emoji with captions and exact ground truth",
        description="Makes the shards train-*.tar, heldout-*.tar (two objects each) and heldout_single-*.tar (one object each)\n"
        "in OUT. An OUT that holds this very world is left as it is. Needs: pip install 'vlpfast[demo]'",
        epilog="example:\n  vlpfast-data emojiworld data/emoji --num-scenes 50000 --objects 2 3 --language ja",
        formatter_class=raw,
    )
    add.add_argument("out", metavar="OUT", help="the folder to make")
    add.add_argument("--num-scenes", type=int, default=20_000, metavar="N", help="scenes to train on (20000)")
    add.add_argument("--heldout", type=int, default=1_000, metavar="N", help="scenes in each held-out split (1000)")
    add.add_argument(
        "--vocabulary", type=_vocabulary, default=100, metavar="N|all", help="objects: the first so many of 100, or all (100)"
    )
    add.add_argument("--objects", type=int, nargs=2, default=(1, 4), metavar=("LOW", "HIGH"), help="objects of a scene (1 4)")
    add.add_argument("--domain", default="twemoji", help="artwork: twemoji or openmoji (twemoji)")
    add.add_argument("--language", default="en", help="of names and captions: en, de, ja, ... (en)")
    add.add_argument("--size", type=int, default=96, metavar="PIXELS", help="width and height of the pictures (96)")
    add.add_argument("--format", default="jpg", help="jpg or png (jpg)")
    add.add_argument("--quality", type=int, default=92, help="of the JPEG, up to 100 (92)")
    add.add_argument("--pictures", type=int, choices=(1, 2), default=1, help="of a sample; 2: with statements about both (1)")
    add.add_argument("--translations", action="store_true", help="put each object's names in all languages into the JSON")
    add.add_argument("--seed", type=int, default=0, help="another number, another world (0)")
    add.add_argument("--samples-per-shard", type=_positive, default=1000, metavar="N", help="samples in each tar file (1000)")
    add.add_argument("--workers", type=_positive, default=os.cpu_count() or 1, metavar="N", help="processes (as many as cores)")
    add.set_defaults(command=_emojiworld)

    add = _add(commands, _index, "index", "make the index file of each shard, unless a right one is there")
    add = _add(commands, _verify, "verify", "read everything and name what is damaged; exit code 1 if anything is")
    add.add_argument("--no-decode", action="store_true", help="read the pictures' headers alone: much faster")
    add.add_argument("--no-captions", action="store_true", help="samples need no caption")
    add.add_argument(
        "--repair",
        action="store_true",
        help="write each damaged shard anew with its whole samples, and keep the old one as NAME.tar.bad",
    )
    add = _add(commands, _stats, "stats", "samples, bytes, sizes, durations, bounds, caption lengths, vocabulary, speed")
    add.add_argument("--limit", type=_positive, default=10_000, metavar="N", help="samples to look at, spread evenly (10000)")
    add = _add(
        commands,
        _preview,
        "preview",
        "a contact sheet of pictures with boxes, frames, spectrograms, slices, point clouds, with captions",
    )
    add.add_argument("-o", "--output", default="preview.png", metavar="FILE", help=".png, or .html for any script (preview.png)")
    add.add_argument("--count", type=_positive, default=24, metavar="N", help="samples, spread evenly (24)")
    add_curate(commands, _positive, _progress, _PATTERNS)
    return parser


_PATTERNS = "tar files, globs, folders, braces: 'data/x-{000..009}.tar'"


def _add(commands, command: Callable[[argparse.Namespace], int], name: str, text: str) -> argparse.ArgumentParser:
    add = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    add.add_argument("patterns", nargs="+", metavar="PATTERN", help=_PATTERNS)
    add.set_defaults(command=command)
    return add


_KINDS = ("pictures", "classes", "table", "text", "documents", "videos", "audio", "dicom", "nifti", "meshes")

_BUILD_HELP = """\
Makes shards OUT/PREFIX-000000.tar ... from SRC, with an index each. KIND says what SRC is:

  pictures   a folder of pictures (jpg, jpeg, png, webp, bmp), each with a .txt, or a .json that has "caption", beside it
  classes    a folder that has a folder of pictures for each class (ImageFolder); OUT/classes.txt lists the classes
  table      a CSV, TSV or Parquet file, or a folder of them: a column of pictures (paths from the table's folder on, or bytes)
             and a column of captions; all other columns go into the JSON
  text       .txt files, a document each, and .jsonl(.gz) files, a document each line; or one such file
  documents  .json files, a document each, and .jsonl(.gz) files, a document each line, in which text and pictures follow each
             other: MMC4's ("text_list", "image_info"), OBELICS' ("texts", "images"), or
             {"parts": [{"text": "..."}, {"image": "PATH"}, ...]}
  videos     mp4, webm, mkv, avi, mov with .txt or .json beside
  audio      wav, flac, ogg, mp3 with .txt or .json beside
  dicom      a folder of DICOM series; their reports can come from a table (--reports): they are taken as they are, so nothing
             in them should name the patient; the identifier that they are found by is not stored
  nifti      .nii and .nii.gz with .txt or .json beside, and with label maps of the same shape and place (--labels)
  meshes     obj, ply, stl, off, glb, gltf with .txt or .json beside

Inputs that cannot be used are skipped, counted, and listed with the reason in OUT/skipped.jsonl. Paths that lead out of SRC, by
.. or by links, count as such. The same command for an OUT that was not finished goes on behind its last whole shard. Any number
of workers makes the same bytes.
"""

_BUILD_EXAMPLES = """\
examples:
  vlpfast-data build pictures photos/ data/photos
  vlpfast-data build classes birds/ data/birds --template 'a photo of a {}, a kind of bird'
  vlpfast-data build table cc3m.parquet data/cc3m --picture image --caption caption --drop url
  vlpfast-data build table pairs.tsv data/pairs --picture path --caption title --pictures photos/
  vlpfast-data build text wiki.jsonl.gz data/wiki --caption text --samples-per-shard 10000
  vlpfast-data build dicom scans/ data/scans --reports reports.csv --by AccessionNumber --caption findings
  vlpfast-data build nifti Dataset003_Liver/ data/liver --no-captions --labels 'imagesTr/{}_0000.nii.gz' 'labelsTr/{}.nii.gz'
"""


def _add_build(commands) -> None:
    add = commands.add_parser(
        "build",
        help="make shards from folders of pictures, tables, text, documents, videos, audio, volumes, meshes",
        description=_BUILD_HELP,
        epilog=_BUILD_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add.add_argument("kind", metavar="KIND", choices=_KINDS, help="see above")
    add.add_argument("src", metavar="SRC", help="the folder or file to read")
    add.add_argument("out", metavar="OUT", help="the folder to make")
    add.add_argument("--prefix", default="train", help="name of the shards (train)")
    add.add_argument("--samples-per-shard", type=_positive, default=1000, metavar="N", help="samples in each tar file (1000)")
    add.add_argument("--workers", type=_positive, default=os.cpu_count() or 1, metavar="N", help="processes (as many as cores)")
    # What is not given stays out of the namespace: the defaults, and which kind knows which option, are the library's to say.
    option = partial(add.add_argument, default=argparse.SUPPRESS)
    option(
        "--max-caption",
        type=_positive,
        metavar="N",
        help="longer captions are skipped, in characters (10000; documents 1 million, text 10)",
    )
    option("--no-captions", dest="captions", action="store_false", help="inputs without a caption are taken too")
    option("--no-decode", dest="decode", action="store_false", help="look at the pictures' headers alone: much faster")
    option("--template", metavar="TEXT", help="classes: the caption, {} stands for the class ('a photo of a {}')")
    option("--picture", metavar="COLUMN", help="table: the column of pictures (image)")
    option(
        "--caption",
        metavar="COLUMN",
        help="table, text, dicom: the column or field of captions or reports (caption; of text: text)",
    )
    option("--key", metavar="COLUMN", help="table: the column of keys (file and row); dicom: that of identifiers (as --by)")
    option("--drop", metavar="COLUMN", action="append", help="table: a column to leave out of the JSON; may be repeated")
    option("--pictures", metavar="FOLDER", help="table, documents: where paths start (the folder of the table or document)")
    option("--min-similarity", type=float, metavar="X", help="documents: leave out MMC4's pictures with a lower matched_sim")
    option("--points", type=_positive, metavar="N", help="meshes: points drawn from the surface (8192)")
    option("--reports", metavar="FILE", help="dicom: a CSV, TSV, Parquet or JSONL table; its reports become the captions")
    option(
        "--by",
        metavar="TAG",
        help="dicom: what reports are found by: StudyInstanceUID, SeriesInstanceUID, AccessionNumber, PatientID (the first)",
    )
    option(
        "--labels",
        nargs=2,
        metavar=("VOLUME", "LABELS"),
        help="nifti: each volume has a label map; names of both, with {} for what they share, and the folder if it differs",
    )
    add.set_defaults(command=_build)


def _build(arguments: argparse.Namespace) -> int:
    from vlpfast.data.build import build
    from vlpfast.data.inputs import Options

    names = {field.name for field in dataclasses.fields(Options)}
    given = {
        name: tuple(value) if name in ("drop", "labels") else value for name, value in vars(arguments).items() if name in names
    }
    report = build(
        arguments.kind,
        arguments.src,
        arguments.out,
        Options(**given),
        prefix=arguments.prefix,
        workers=arguments.workers,
        samples_per_shard=arguments.samples_per_shard,
        progress=_progress("inputs"),
    )
    print(f"source      {_most(report.files, 8)}")
    if report.resumed:
        print(f"resumed     {arguments.out} held a part of this build, or all of it")
    print(f"built       {report.samples} samples in {report.shards} shards: {arguments.out}/{arguments.prefix}-*.tar")
    if report.skipped:
        print(f"skipped     {report.skipped}, listed in {arguments.out}/skipped.jsonl, such as")
        for reason in report.reasons:
            print(f"            {reason}")
    return 0


def _vocabulary(text: str) -> int | str:
    return text if text == "all" else _positive(text)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def _emojiworld(arguments: argparse.Namespace) -> int:
    from vlpfast.data import emojiworld

    world = emojiworld.World(
        seed=arguments.seed,
        vocabulary=arguments.vocabulary,
        size=arguments.size,
        objects=tuple(arguments.objects),
        domain=arguments.domain,
        language=arguments.language,
        format=arguments.format,
        quality=arguments.quality,
        pictures=arguments.pictures,
        translations=arguments.translations,
    )
    splits = emojiworld.default_splits(arguments.num_scenes, arguments.heldout)
    patterns = emojiworld.build(
        arguments.out,
        world,
        splits,
        workers=arguments.workers,
        samples_per_shard=arguments.samples_per_shard,
        progress=_progress("scenes"),
    )
    _table(["split", "scenes", "shards"], [[name, str(splits[name].num_scenes), pattern] for name, pattern in patterns.items()])
    return 0


def _index(arguments: argparse.Namespace) -> int:
    from vlpfast.data.shards import ShardSet, expand, index_path

    before = {path: _stamp(index_path(path)) for path in expand(arguments.patterns)}
    shards = ShardSet(arguments.patterns)
    made = sum(_stamp(index_path(path)) != stamp for path, stamp in before.items())
    print(f"{len(shards.shards)} shards with {len(shards)} samples; {made} index files made, {len(before) - made} were right")
    if missing := [path for path in before if _stamp(index_path(path)) is None]:
        raise UserError(
            f"{len(missing)} shards have no index file, such as {missing[0]}: "
            "their folder cannot be written, or names in them have white space"
        )
    return 0


def _stamp(path: str) -> int | None:
    return os.stat(path).st_mtime_ns if os.path.exists(path) else None


def _verify(arguments: argparse.Namespace) -> int:
    from vlpfast.data.repair import Repair, repair
    from vlpfast.data.shards import verify

    settings = {"decode": not arguments.no_decode, "captions": not arguments.no_captions, "progress": _progress("shards")}
    done = repair(arguments.patterns, **settings) if arguments.repair else Repair(verify(arguments.patterns, **settings))
    report = done.report
    rows = []
    for shard in report.shards:
        damaged = len({key for key, _ in shard.damaged})
        rows.append([shard.path, str(shard.samples), str(damaged), shard.problem or ("damaged samples" if damaged else "sound")])
    _table(["shard", "samples", "damaged", "state"], rows)
    for shard in report.shards:
        for key, problem in shard.damaged:
            print(f"{os.path.basename(shard.path)}:{key}: {problem}")
    broken = sum(bool(shard.problem) for shard in report.shards)
    print(f"{len(report.shards)} shards, {report.samples} samples: {report.damaged} samples and {broken} shards damaged")
    for path, kept in done.kept.items():
        print(f"repaired {path}: {kept} samples; the old one is {path}.bad")
    for path in done.left:
        print(f"left {path} as it is: nothing in it is whole")
    return 0 if report.ok or (arguments.repair and not done.left) else 1


def _stats(arguments: argparse.Namespace) -> int:
    from vlpfast.data.inspect import stats

    found = stats(arguments.patterns, limit=arguments.limit, progress=_progress("samples"))
    share = "" if found.examined == found.samples else f" ({found.examined} of them looked at)"
    print(f"shards      {found.shards}, {_bytes(found.tar_bytes)}")
    print(f"samples     {found.samples}{share}, {_bytes(found.tar_bytes / found.samples)} each")
    print(f"members     {_most(found.extensions, 8)}")
    if found.sizes:
        print(f"pictures    {_most(Counter({f'{w} x {h}': n for (w, h), n in found.sizes.items()}), 6)}")
    if found.rates:
        print(f"rates       {_most(Counter({f'{rate} Hz': n for rate, n in found.rates.items()}), 6)}")
    if found.durations:
        lengths = sorted(found.durations)
        middle = lengths[len(lengths) // 2]
        print(f"seconds     {lengths[0]:.1f} to {lengths[-1]:.1f}, median {middle:.1f}, together {sum(lengths) / 3600:.2f} hours")
    if found.volumes:
        print(f"voxels      {_most(Counter({' x '.join(map(str, shape)): n for shape, n in found.volumes.items()}), 6)}")
    if found.points:
        counts = sorted(found.points)
        coloured = f", {found.coloured} with colours {found.colours[0]:.4g} to {found.colours[1]:.4g}" if found.coloured else ""
        print(f"points      {counts[0]} to {counts[-1]}, median {counts[len(counts) // 2]}, in {len(counts)} clouds{coloured}")
        edges = zip("xyz", found.low, found.high, strict=True)
        print(f"bounds      {', '.join(f'{axis} {low:.4g} to {high:.4g}' for axis, low, high in edges)}")
    if found.documents:
        print(f"documents   {found.documents}, with {found.document_pictures / found.documents:.1f} pictures each")
    print(f"captions    {len(found.words)}, {len(found.vocabulary)} different words")
    print(f"words       {_most(found.vocabulary, 12)}")
    if found.without_picture or found.without_caption:
        print(f"damaged     {found.without_picture} without a readable picture, {found.without_caption} without a caption")
    if found.damaged_media:
        print(f"damaged     {found.damaged_media} videos, sounds, volumes or point clouds that cannot be read")
    seconds = max(found.read_seconds, 1e-9)
    print(
        f"reading     {found.examined / seconds:,.0f} samples/s, {_bytes(found.read_bytes / seconds)}/s (bytes alone, 4 threads)"
    )
    if found.words:
        print("caption length in words")
        _histogram(found.words)
    return 0


def _preview(arguments: argparse.Namespace) -> int:
    from vlpfast.data.inspect import preview

    count = preview(arguments.patterns, arguments.output, count=arguments.count)
    print(f"{count} samples on {arguments.output}")
    return 0


# --- output -----------------------------------------------------------------------------------------------------------


def _progress(what: str) -> Callable[[int, int | None], None] | None:
    """A line on stderr that counts, where stderr is a terminal."""
    if not sys.stderr.isatty():
        return None
    shown = 0.0

    def show(done: int, total: int | None) -> None:
        nonlocal shown
        if done == total or time.monotonic() - shown > 0.1:
            shown = time.monotonic()
            of = "" if total is None else f" of {total:,}"
            print(f"\r{done:,}{of} {what}", end="\n" if done == total else "", file=sys.stderr, flush=True)

    return show


def _table(head: list[str], rows: Iterable[list[str]]) -> None:
    rows = [head, *rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _histogram(values: list[int]) -> None:
    low, high = min(values), max(values)
    width = (high - low) // 12 + 1
    bins = Counter((value - low) // width for value in values)
    for i in range((high - low) // width + 1):
        start, end = low + i * width, low + (i + 1) * width - 1
        name = f"{start}" if width == 1 else f"{start}-{end}"
        print(f"  {name:>9}  {bins[i]:>9,}  {'#' * round(40 * bins[i] / max(bins.values()))}".rstrip())


def _most(counter: Counter[str], n: int) -> str:
    rest = len(counter) - n
    return ", ".join(f"{name}: {count:,}" for name, count in counter.most_common(n)) + (f", {rest} more" if rest > 0 else "")


def _bytes(number: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if number < 1000:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1000
    return f"{number:.1f} TB"
