"""Tables that a build reads: rows of CSV, TSV and Parquet files, lines of JSONL, and reports that are looked up in them."""

from __future__ import annotations

import csv
import gzip
import importlib
import io
import math
import os
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple

from vlpfast.data.inputs import LARGEST, Options, extension, opened, parse, shown, text
from vlpfast.data.media_info import require
from vlpfast.data.pictures import DamagedSample
from vlpfast.types import UserError

TABLES = ("csv", "tsv", "parquet")
JSONL = (".jsonl", ".jsonl.gz")
IDENTIFIERS = ("StudyInstanceUID", "SeriesInstanceUID", "AccessionNumber", "PatientID")  # DICOM's, that reports are joined by


def rows(root: str, path: str) -> Iterator[tuple[list[str], Any]]:
    """-> the columns, and a row as a dictionary or the reason why it is none."""
    real = os.path.join(root, shown(path))
    if extension(path) == "parquet":
        pyarrow, parquet = require("pyarrow", "build"), importlib.import_module("pyarrow.parquet")
        try:
            with opened(root, path) as raw, parquet.ParquetFile(raw, pre_buffer=False) as file:
                for batch in file.iter_batches(batch_size=64):
                    for row in batch.to_pylist():
                        yield list(batch.schema.names), row
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"build: {real} cannot be read as Parquet: {error}") from error
        return
    csv.field_size_limit(1 << 30)  # the limit of a caption is ours to say
    with io.TextIOWrapper(opened(root, path), "utf-8-sig", "surrogateescape", newline="") as file:
        lines = csv.reader(file, dialect="excel-tab" if extension(path) == "tsv" else "excel")
        try:
            head = next(lines, None)
            for cells in lines:
                if len(cells) == len(head):
                    yield head, dict(zip(head, cells, strict=True))
                elif cells:
                    yield head, f"the row has {len(cells)} columns, the head has {len(head)}"
        except csv.Error as error:
            raise UserError(f"build: {real} cannot be read, line {lines.line_num}: {error}") from error


def check_columns(path: str, columns: list[str], wanted: list[tuple[str, str]]) -> None:
    """wanted: option, column."""
    if twice := [name for name, count in Counter(columns).items() if count > 1]:
        raise UserError(f"build: {path} has several columns {twice[0]!r}")
    for flag, name in wanted:
        if name not in columns:
            raise UserError(f"build: {path} has no column {name!r} ({flag}); it has {', '.join(columns)}")


def lines(root: str, path: str) -> Iterator[bytes]:
    try:
        with opened(root, path) as plain, gzip.open(plain) if path.endswith(".gz") else plain as file:
            while line := file.readline(LARGEST):
                if line.strip():
                    yield line
    except (OSError, EOFError) as error:
        raise UserError(f"build: {os.path.join(root, shown(path))} cannot be read: {error}") from error


# --- reports ---------------------------------------------------------------------------------------------------------------


class Reports(NamedTuple):
    """Texts by what DICOM files say under `by`, one of IDENTIFIERS. No identifier appears in a message."""

    by: str
    texts: dict[str, str | None]  # None: several that differ
    captions: bool  # what has no report is damaged
    max_caption: int

    def member(self, identifiers: set[str]) -> dict[str, bytes]:
        """Of the files that are one sample -> the member `txt`, or {} if there is no report and none is needed. Raises
        DamagedSample."""
        if len(identifiers) > 1:
            raise DamagedSample(f"its files have {len(identifiers)} different {self.by}")
        (identifier,) = identifiers
        report = self.texts.get(identifier, "")
        if report is None:
            raise DamagedSample(f"the table has several reports for its {self.by}")
        if report.strip():
            return {"txt": text(report, self.max_caption).encode()}
        if not self.captions:
            return {}
        if not identifier:
            raise DamagedSample(f"it has no {self.by}, by which its report would be found")
        raise DamagedSample("its report is empty" if identifier in self.texts else f"no report for its {self.by}")


def reports(options: Options) -> Reports:
    """options.reports; read once in a process, unless it changes. Raises UserError."""
    assert options.max_caption is not None
    if options.by not in IDENTIFIERS:
        raise UserError(f"build: --by: expected one of {', '.join(IDENTIFIERS)}, got {options.by!r}")
    if not options.reports.endswith((*JSONL, *(f".{name}" for name in TABLES))):
        raise UserError(f"build: --reports: expected a CSV, TSV, Parquet or JSONL file, got {options.reports}")
    try:
        stamp = os.stat(options.reports)
    except OSError as error:
        raise UserError(f"build: --reports: {options.reports} cannot be read: {error.strerror}") from error
    texts = _texts(options.reports, options.key or options.by, options.caption, (stamp.st_mtime_ns, stamp.st_size))
    return Reports(options.by, texts, options.captions, options.max_caption)


@lru_cache(1)
def _texts(path: str, key: str, caption: str, stamp: tuple[int, int]) -> dict[str, str | None]:
    texts: dict[str, str | None] = {}
    for number, row in _records(path, key, caption):
        identifier, report = _plain(row[key]), row[caption]
        if report is None or report != report:  # Parquet's NaN
            report = ""
        if not isinstance(report, str):
            raise UserError(f"build: {path}, row {number}: {caption!r} is {type(report).__name__}, expected a text (--caption)")
        if identifier and texts.setdefault(identifier, report) != report:
            texts[identifier] = None
    return texts


def _records(path: str, key: str, caption: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """-> number from 1 on, row with both columns."""
    folder, name = os.path.split(os.path.realpath(path))
    wanted = [("--key" if key not in IDENTIFIERS else "--key, --by", key), ("--caption", caption)]
    if name.endswith(JSONL):
        for number, line in enumerate(lines(folder, name), 1):
            try:
                record = parse(line)
            except DamagedSample as error:
                raise UserError(f"build: {path}, row {number}: {error}") from error
            check_columns(f"{path}, row {number},", list(record), wanted)
            yield number, record
        return
    for number, (columns, row) in enumerate(rows(folder, name), 1):
        if number == 1:
            check_columns(path, columns, wanted)
        if isinstance(row, str):
            raise UserError(f"build: {path}, row {number}: {row}")
        yield number, row


def _plain(identifier: Any) -> str:
    """As DICOM has it: tables also hold it as a number."""
    if isinstance(identifier, float):
        identifier = int(identifier) if math.isfinite(identifier) and identifier.is_integer() else ""
    return "" if identifier is None else str(identifier).strip()
