"""A look at some steps of a run: torch.profiler's trace, and one page that says where the time goes and what to try first.

The page's shares come from the trace: of the profiled time, how much the device did nothing (no kernel on a GPU, no operator on
a CPU), how much was communication, and how much of that went on beside nothing else. Profiling itself slows the steps on the
host; its figures are shares to act on, not records.
"""

from __future__ import annotations

import gzip
import os
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType

from vlpfast.training.run_folder import replace

WARM_UP = 5  # steps before the first that counts: libraries choose their kernels, the loader fills up
HEAVIEST = 15  # operators listed

Span = tuple[float, float]  # start, end in microseconds


@dataclass
class Summary:
    """What the page is made of. Seconds are means over the profiled steps."""

    steps: int
    device: str
    step_seconds: float
    split: dict[str, float]  # seconds of a step by part
    idle: float  # share of the profiled time in which the device did nothing
    communication: float  # share in which something was on its way between ranks
    exposed: float  # share in which that was all that went on
    samples_per_s: float
    mfu: float | None
    memory_bytes: int | None
    memory_total: int | None  # of the device; None on a CPU
    bf16: bool
    bf16_is_fast: bool
    loader: str
    operators: list[tuple[str, float, float]] = field(default_factory=list)  # name, calls a step, share of all operators' time


class Profiler:
    """Told of every step by the trainer. Looks at `steps` of them after WARM_UP and, when their numbers have arrived, writes
    run_dir/profile: trace.json.gz (for Perfetto or chrome://tracing), summary.md and summary.html.

    samples: of a step, all ranks together. about: what of the Summary is known beforehand (bf16, bf16_is_fast, loader).
    """

    def __init__(self, run_dir: Path, steps: int, device: torch.device, samples: int, about: dict[str, Any]) -> None:
        self.folder = run_dir / "profile"
        self.summary: Summary | None = None  # once the files are written
        self._steps, self._device, self._samples, self._about = steps, device, samples, about
        self._records: list[dict[str, Any]] = []
        self._taken = self._written = 0
        activities = [torch.profiler.ProfilerActivity.CPU]
        if device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self._torch = torch.profiler.profile(activities=activities)

    def step(self) -> None:
        """A step has been taken."""
        self._taken += 1
        if self._taken == WARM_UP:
            self._torch.start()
        elif self._taken == WARM_UP + self._steps:
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            self._torch.stop()
            self._finish()

    def write(self, record: dict[str, Any]) -> None:
        """The numbers of a step have arrived: of the oldest for which they had not. On a GPU that may be after step()."""
        self._written += 1
        if WARM_UP < self._written <= WARM_UP + self._steps:
            self._records.append(record)
            self._finish()

    def close(self) -> None:
        """After the run, however it ended."""
        if WARM_UP <= self._taken < WARM_UP + self._steps:
            self._torch.stop()
        if self.summary is None:
            wanted = f"{WARM_UP} steps and {self._steps} after them"
            print(f"no profile: it takes {wanted}, this start of the run took {self._taken}", file=sys.stderr)

    def _finish(self) -> None:
        if len(self._records) < self._steps or self._taken < WARM_UP + self._steps:
            return
        summary = self._summarise()
        self.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.folder) as aside:
            plain = Path(aside) / "trace.json"
            self._torch.export_chrome_trace(str(plain))
            packed = plain.with_suffix(".json.gz")
            with open(plain, "rb") as source, gzip.open(packed, "wb", 6) as target:
                shutil.copyfileobj(source, target)
            os.replace(packed, self.folder / packed.name)
        parts = page(summary)
        replace(self.folder / "summary.md", as_markdown(parts))
        replace(self.folder / "summary.html", as_html(parts))
        self.summary = summary
        print(f"profile: {self.folder / 'summary.html'}", file=sys.stderr)

    def _summarise(self) -> Summary:
        records, count = self._records, len(self._records)
        on_gpu = self._device.type == "cuda"
        kind = DeviceType.CUDA if on_gpu else DeviceType.CPU
        events = [e for e in self._torch.events() if e.device_type == kind and not e.is_user_annotation]
        sending = union(span(e) for e in events if is_communication(e.name))
        work = [e for e in events if not is_communication(e.name)]
        if not on_gpu:  # the training's own thread: the loader's are at work beside it
            threads = Counter({e.thread: 0 for e in work})
            for e in work:
                threads[e.thread] += e.self_cpu_time_total
            work = [e for e in work if e.thread == threads.most_common(1)[0][0]]
        computing = union(map(span, work))
        busy = union([*computing, *sending])
        whole = busy[-1][1] - busy[0][0]
        split: dict[str, float] = {}
        for record in records:
            for part, seconds in record["seconds"].items():
                split[part] = split.get(part, 0.0) + seconds / count
        seconds = sum(self._samples / record["samples_per_s"] for record in records)
        used = [record["mfu"] for record in records if "mfu" in record]
        own = {
            a.key: (a.count, a.self_device_time_total if on_gpu else a.self_cpu_time_total)
            for a in self._torch.key_averages()
            if a.device_type == DeviceType.CPU and not a.is_user_annotation
        }
        total = sum(time for _, time in own.values())
        heaviest = sorted(own.items(), key=lambda item: -item[1][1])[:HEAVIEST]
        return Summary(
            steps=count,
            device=torch.cuda.get_device_name(self._device) if on_gpu else f"CPU, {torch.get_num_threads()} threads",
            step_seconds=seconds / count,
            split=split,
            idle=1 - length(busy) / whole,
            communication=length(sending) / whole,
            exposed=(length(busy) - length(computing)) / whole,
            samples_per_s=self._samples * count / seconds,
            mfu=sum(used) / len(used) if used else None,
            memory_bytes=max((record["memory_bytes"] for record in records if record["memory_bytes"]), default=None),
            memory_total=torch.cuda.get_device_properties(self._device).total_memory if on_gpu else None,
            operators=[(name, calls / count, time / total) for name, (calls, time) in heaviest if time],
            **self._about,
        )


# --- spans of time ----------------------------------------------------------------------------------------------------


def span(event: Any) -> Span:
    return event.time_range.start, event.time_range.end


def union(spans: Iterable[Span]) -> list[Span]:
    """The same time without overlaps, in order."""
    out: list[Span] = []
    for start, end in sorted(spans):
        if out and start <= out[-1][1]:
            out[-1] = out[-1][0], max(end, out[-1][1])
        else:
            out.append((start, end))
    return out


def length(spans: Iterable[Span]) -> float:
    return sum(end - start for start, end in spans)


def is_communication(name: str) -> bool:
    """Kernels of NCCL; on a CPU what gloo's threads do."""
    return name.startswith(("nccl", "gloo:", "c10d::"))


# --- what to try first ------------------------------------------------------------------------------------------------


def advice(summary: Summary) -> list[str]:
    """In the order of what it may bring: each with the number that it rests on and the rule."""
    found: list[tuple[float, str]] = []
    on_gpu = summary.memory_total is not None

    def rule(share: float, limit: float, what: str, cure: str) -> None:
        if share > limit:
            found.append((share, f"{what}: {_percent(share)} (more than {_percent(limit)}). {cure}"))

    part = {name: seconds / summary.step_seconds for name, seconds in summary.split.items()}
    waits = part.get("data", 0.0)
    faster = "data.loader=dali (pip install 'vlpfast[dali]') decodes faster; " if summary.loader != "dali" else ""
    rule(waits, 0.10, "The step waits for data", f"More data.threads; {faster}smaller or pre-scaled pictures in the shards.")
    rule(
        part.get("transfer", 0.0), 0.05, "Batches go to the device within the step",
        "The loader should place them, in its own stream, before the step begins.",
    )  # fmt: skip
    rule(
        summary.exposed, 0.10, "Ranks wait for what travels between them",
        "A larger batch on each rank (with a feature cache, if memory is short), a faster network, replicated parameters "
        "where they fit; docs/scaling.md has the volumes. A rank that is late shows here too: compare the ranks' data.",
    )  # fmt: skip
    if on_gpu:
        quiet = summary.idle - waits
        rule(
            quiet, 0.15, "The GPU has nothing to do though the data is there",
            "The host is too slow with its many small launches: a larger train.batch_size, or train.compile.",
        )  # fmt: skip
        rule(
            1 - (summary.memory_bytes or 0) / summary.memory_total, 0.5, "Of the GPU's memory much is free",
            "A larger train.batch_size makes larger products.",
        )  # fmt: skip
    rule(
        part.get("optimizer", 0.0), 0.20, "The optimiser takes long",
        "A larger batch for each step of it; freeze what need not be trained (stages.NAME.trainable).",
    )  # fmt: skip
    copies = sum(share for name, _, share in summary.operators if name in _COPIES)
    rule(copies, 0.15, "Copies and casts", "train.compile joins them with what comes before and after.")
    out = [text for _, text in sorted(found, reverse=True)]
    if summary.bf16_is_fast and not summary.bf16:
        out.insert(0, "Products are made in fp32 where bf16 has instructions of its own: train.precision=bf16.")
    if not out:
        heaviest = f" The heaviest operator is {summary.operators[0][0]}." if summary.operators else ""
        out.append(f"None of the rules applies: the time goes into computing.{heaviest}")
    return out


_COPIES = ("aten::copy_", "aten::cat", "aten::clone", "aten::contiguous", "aten::to", "aten::_to_copy")


# --- the page ---------------------------------------------------------------------------------------------------------


@dataclass
class Part:
    """A heading with what is under it: lines, or a table whose first row is its head."""

    title: str
    lines: list[str] = field(default_factory=list)
    table: list[Sequence[str]] = field(default_factory=list)


def page(summary: Summary) -> list[Part]:
    known = sum(summary.split.values())
    split = [
        (name, f"{1e3 * seconds:.1f} ms", _percent(seconds / summary.step_seconds))
        for name, seconds in [*summary.split.items(), ("the rest", max(0.0, summary.step_seconds - known))]
    ]
    speed = f"{1e3 * summary.step_seconds:.1f} ms a step, {summary.samples_per_s:,.0f} samples/s"
    facts = [
        f"{summary.steps} steps on {summary.device}: {speed}",
        f"the device does nothing in {_percent(summary.idle)} of the time",
        f"the step waits for data in {_percent(summary.split.get('data', 0.0) / summary.step_seconds)} of the time",
    ]
    if summary.mfu is not None:
        facts.append(f"MFU {_percent(summary.mfu)} (speed.json has the FLOPs and the peak)")
    if summary.communication:
        shares = f"{_percent(summary.communication)} of the time, {_percent(summary.exposed)} with nothing else beside it"
        facts.append(f"something travels between ranks in {shares}")
    if summary.memory_bytes:
        whole = f" of {summary.memory_total / 2**30:.1f} GiB" if summary.memory_total else ""
        facts.append(f"peak memory {summary.memory_bytes / 2**30:.2f} GiB{whole}")
    operators = [(name, f"{calls:g}", _percent(share)) for name, calls, share in summary.operators]
    return [
        Part("Profile", facts),
        Part("What to try first", advice(summary)),
        Part("Where a step's time goes", table=[("part", "mean", "share"), *split]),
        Part("The heaviest operators", table=[("operator", "calls a step", "share of their time"), *operators]),
    ]


def as_markdown(parts: Sequence[Part]) -> str:
    out = []
    for level, part in enumerate(parts):
        out.append(f"{'#' if level == 0 else '##'} {part.title}\n")
        out += [f"- {line}" for line in part.lines]
        for number, row in enumerate(part.table):
            out.append("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |")
            if number == 0:
                out.append("|---" * len(row) + "|")
        out.append("")
    return "\n".join(out)


def as_html(parts: Sequence[Part]) -> str:
    body = []
    for level, part in enumerate(parts):
        body.append(f"<h{1 + bool(level)}>{escape(part.title)}</h{1 + bool(level)}>")
        if part.lines:
            body.append("<ul>" + "".join(f"<li>{escape(line)}</li>" for line in part.lines) + "</ul>")
        for number, row in enumerate(part.table):
            kind = "td" if number else "th"
            cells = "".join(f"<{kind}>{escape(cell)}</{kind}>" for cell in row)
            body.append(f"{'' if number else '<table>'}<tr>{cells}</tr>")
        body.append("</table>" if part.table else "")
    text = "\n".join(filter(None, body))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{escape(parts[0].title)}</title><style>{_CSS}</style></head>\n<body>\n{text}\n</body></html>\n"
    )


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


_CSS = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; } th, td { text-align: left; padding: 0.2rem 1.5rem 0.2rem 0; border-bottom: 1px solid #8884; }
td:not(:first-child), th:not(:first-child) { text-align: right; font-variant-numeric: tabular-nums; }
td:first-child { overflow-wrap: anywhere; }
"""
