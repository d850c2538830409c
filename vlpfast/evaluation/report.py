"""report.html: one self-contained page about a run. It has no script, asks for nothing over the network and opens from file://."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime, timezone
from html import escape
from pathlib import Path
from typing import Any

import yaml

from vlpfast.evaluation.answers import Answered
from vlpfast.evaluation.charts import COLOURS, POINTS, Series, line_chart, number, percent, spans_decades, stacked_chart
from vlpfast.evaluation.contact_sheet import Classified, Pairs, answered_sheet, confusions, image_to_text, text_to_image
from vlpfast.evaluation.style import CSS
from vlpfast.types import UserError

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"  # the browser itself refuses anything from elsewhere
_DIRECTIONS = {"text_to_image": "Text to image", "image_to_text": "Image to text"}
_KS = (1, 5, 10)
_TASKS = {  # beside retrieval: title, the shares that are shown, what each is called, the chance of the first
    "zero_shot": ("Zero-shot classification", {"top1": "top-1", "top5": "top-5"}, {"top1": "chance_top1", "top5": "chance_top5"}),
    "classification": ("Classification", {"top1": "top-1", "top5": "top-5"}, {"top1": "chance_top1"}),
    "answers": ("Answers chosen from a list", {"accuracy": "right"}, {"accuracy": "chance_accuracy"}),
    "written": (
        "Answers written",
        {"accuracy": "right", "BLEU-4": "BLEU-4", "ROUGE-L": "ROUGE-L"},
        {"accuracy": "chance_accuracy"},
    ),
}
_LISTED = 30  # damaged samples shown by name


def write_report(
    run_dir: str | os.PathLike[str],
    *,
    evaluation: Mapping[str, Any] | None = None,
    pairs: Pairs | None = None,
    zero_shot: Classified | None = None,
    answered: Mapping[str, Answered] | None = None,
    seed: int = 0,
) -> Path:
    """Writes run_dir/report.html, aside and renamed, and returns its path.

    Curves come from metrics.jsonl and evaluation.jsonl, what the MFU refers to from speed.json, configuration and environment
    from config.yaml and environment.json, a profile from profile/summary.md; what is not there is left out of the page.
    `evaluation`: step and metrics of the headline numbers; None: the last line of evaluation.jsonl. `pairs` gives the contact
    sheets, `zero_shot` the confusions, `answered` sheets of questions for each of the tasks that have them (_TASKS); `seed`
    draws what is shown. UserError: a file of the folder is damaged, or the page cannot be written."""
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise UserError(f"run folder {run_dir} does not exist")
    steps, evaluations = read_jsonl(run_dir / "metrics.jsonl"), read_jsonl(run_dir / "evaluation.jsonl")
    config_text, environment_text = (_read(run_dir / name) for name in ("config.yaml", "environment.json"))
    evaluation = evaluation if evaluation is not None else (evaluations[-1] if evaluations else {})
    body = [
        _header(run_dir, config_text, environment_text, steps, evaluation),
        _headline(evaluation, pairs, zero_shot),
        _training(steps, _read(run_dir / "speed.json")),
        _evaluations(evaluations),
        _sheets(pairs, zero_shot, answered or {}, seed),
        _damaged(steps, pairs, zero_shot, answered or {}),
        _about(config_text, environment_text, _read(run_dir / "profile" / "summary.md")),
    ]
    title = escape(f"{run_dir.resolve().name}: vlpfast report")
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<title>{title}</title><style>{CSS}</style></head>\n<body><main>\n"
        + "\n".join(filter(None, body))
        + "\n</main></body></html>\n"
    )
    path = run_dir / "report.html"
    aside = path.with_suffix(".html.tmp")
    try:
        aside.write_text(page, encoding="utf-8", errors="replace")
        os.replace(aside, path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise UserError(f"{path} could not be written: {error.strerror or error}") from error
    return path


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file, [] when there is none. A last line that is cut off is left out: a run may be writing it
    at this moment. UserError: any other line is not a JSON object."""
    if not path.exists():
        return []
    records = []
    with open(path, "rb") as file:
        for count, line in enumerate(file, start=1):
            try:
                record = json.loads(line)
                if not isinstance(record, dict):
                    raise ValueError("not an object")
            except ValueError as error:
                if not line.endswith(b"\n"):
                    break
                raise UserError(f"{path}, line {count}: expected a JSON object: {error}") from error
            records.append(record)
    return records


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def _header(
    run_dir: Path, config_text: str, environment_text: str, steps: Sequence[Mapping], evaluation: Mapping[str, Any]
) -> str:
    try:
        config = yaml.safe_load(config_text) or {}
        model = str(config.get("model", {}).get("name", ""))
        batch = config.get("train", {}).get("batch_size")
        for text in (environment_text, _read(run_dir / "speed.json")):
            json.loads(text or "{}")
    except (yaml.YAMLError, ValueError, AttributeError) as error:
        raise UserError(
            f"{run_dir}: config.yaml, environment.json or speed.json is damaged: {' '.join(str(error).split())}"
        ) from error
    facts = []
    if model:
        facts.append(("model", model))
    if steps:
        facts.append(("trained", f"{steps[-1]['step']:,} steps"))
        if batch:
            facts.append(("samples seen", f"{steps[-1]['step'] * batch:,}"))
            seconds = sum(batch / rate for rate in _column(steps, "samples_per_s") if rate)
            facts.append(("training time", _duration(seconds)))
    if "step" in evaluation:
        facts.append(("evaluated at step", f"{evaluation['step']:,}"))
    if "shards" in evaluation:
        facts.append(("evaluated on", ", ".join(evaluation["shards"])))
    facts.append(("written", datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")))
    items = "".join(f"<li>{escape(name)} <b>{escape(value)}</b></li>" for name, value in facts)
    return f'<header><h1>{escape(run_dir.resolve().name)}</h1><ul class="facts">{items}</ul></header>'


def _duration(seconds: float) -> str:
    hours, minutes = int(seconds // 3600), int(seconds // 60 % 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {int(seconds % 60):02d} s"


def _headline(evaluation: Mapping[str, Any], pairs: Pairs | None, zero_shot: Classified | None) -> str:
    cards = []
    reranked = {f"reranked_{name}": f"{title}, reordered" for name, title in _DIRECTIONS.items()}
    for name, title in (_DIRECTIONS | reranked).items():
        rows = [(f"R@{k}", evaluation.get(f"{name}_R@{k}"), evaluation.get(f"{name}_chance_R@{k}")) for k in _KS]
        rank = evaluation.get(f"{name}_median_rank")
        foot = f"median rank {number(rank)}" if rank is not None else ""
        if pairs is not None:
            foot += f" among {len(pairs.retrieval.text_to_image.rank):,}" if foot else ""
        cards.append(_card(title, rows, foot))
    for name, (title, shares, chances) in _TASKS.items():
        rows = [
            (label, evaluation.get(f"{name}_{share}"), evaluation.get(f"{name}_{chances.get(share)}"))
            for share, label in shares.items()
        ]
        foot = []
        if name == "zero_shot" and zero_shot is not None:
            foot.append(f"{len(zero_shot.result.names):,} classes, {len(zero_shot.result.labels):,} pictures")
        foot += [f"{evaluation[f'{name}_samples']:,} samples"] if f"{name}_samples" in evaluation else []
        foot += [f"CIDEr {number(evaluation[f'{name}_CIDEr'])}"] if f"{name}_CIDEr" in evaluation else []
        cards.append(_card(title, rows, ", ".join(foot)))
    shown = "".join(filter(None, cards))
    if not shown:
        return '<p class="soft">No evaluation yet.</p>'
    note = (
        "R@k: share of the queries whose right answer is among the first k. Top-k: share of the pictures whose class is among "
        "the first k guesses. Chance: what a random order scores; of classes and answers, what always giving the commonest one "
        "does."
    )
    return f'<section class="headline" id="headline">{shown}</section><p class="foot">{note}</p>'


def _card(title: str, rows: Sequence[tuple[str, float | None, float | None]], foot: str) -> str:
    rows = [row for row in rows if row[1] is not None]
    if not rows:
        return ""
    label, value, _ = rows[0]
    bars = "".join(
        f'<span>{name}</span><div class="bar"><i style="width:{100 * share:.1f}%"></i></div><span>{percent(share)}</span>'
        f"<small>{'' if chance is None else f'chance {percent(chance)}'}</small>"
        for name, share, chance in rows
    )
    foot = f'<p class="foot">{escape(foot)}</p>' if foot else ""
    return (
        f'<section class="card"><h2>{title}</h2><div class="big">{percent(value)} <small>{label}</small></div>'
        f'<div class="bars">{bars}</div>{foot}</section>'
    )


def _training(steps: Sequence[Mapping[str, Any]], speed_text: str) -> str:
    at = _column(steps, "step")
    losses = {"loss": _column(steps, "loss")}
    parts = sorted({name for record in steps for name in record.get("losses", {})})
    if len(parts) > 1:
        losses |= {name: [record.get("losses", {}).get(name) for record in steps] for name in parts[: COLOURS - 1]}
    timed = [record for record in steps if record.get("samples_per_s") and record.get("data_wait") is not None]
    when = _column(timed, "step")
    gibibytes = [None if size is None else size / 2**30 for size in _column(steps, "memory_bytes")]
    marks = _stage_marks(steps)

    def chart(title: str, *series: Series, **options: Any) -> str:
        return _chart(title, series, marks=marks, **options)

    charts = [
        chart("Loss", *(Series(name, at, values) for name, values in losses.items())),
        chart("Learning rate", Series("learning rate", at, _column(steps, "lr")), from_zero=True),
        chart("Gradient norm", Series("gradient norm", at, _column(steps, "grad_norm"))),
        chart("Samples per second", Series("samples/s", when, _column(timed, "samples_per_s")), from_zero=True),
        chart("Time spent waiting for data", Series("waiting", when, _column(timed, "data_wait")), from_zero=True, show=percent),
        chart("Model FLOPs utilisation", Series("MFU", when, _column(timed, "mfu")), from_zero=True, show=percent),
        chart("Peak memory, GiB", Series("memory", at, gibibytes), from_zero=True),
        chart("Logit scale", Series("logit scale", at, _column(steps, "logit_scale"))),
        _step_split(timed, marks),
        _time_split(timed),
    ]
    return _section("Training and throughput", "training", _throughput(timed) + _nonfinite(steps) + _speed(speed_text), charts)


def _stage_marks(steps: Sequence[Mapping[str, Any]]) -> list[tuple[float, str]]:
    """Where each stage begins; nothing for a run of one stage."""
    marks: list[tuple[float, str]] = []
    for record in steps:
        name = record.get("stage")
        if name is not None and (not marks or marks[-1][1] != name):
            marks.append((record["step"], str(name)))
    return marks if len(marks) > 1 else []


def _speed(text: str) -> str:
    """What the MFU refers to, stage by stage."""
    lines = [
        f"<li>{escape(name)}: {number(facts['flops_per_sample'] / 1e9)} GFLOP a sample, forward and backward, counted "
        f"{escape(facts['counted'])}; peak {number(facts['peak_flops_per_s'] / 1e12)} TFLOP/s ({escape(facts['peak'])})</li>"
        for name, facts in json.loads(text or "{}").items()
    ]
    return f'<p class="soft">MFU is of one rank, and refers to</p><ul class="soft">{"".join(lines)}</ul>' if lines else ""


def _throughput(timed: Sequence[Mapping[str, Any]]) -> str:
    if not timed:
        return ""
    slowness = [1 / record["samples_per_s"] for record in timed]  # proportional to each step's duration
    waited = sum(record["data_wait"] * slow for record, slow in zip(timed, slowness, strict=True)) / sum(slowness)
    bands = " Lines are means over neighbouring steps, bands their extremes." if len(timed) > POINTS else ""
    return (
        f"<p>Overall <b>{number(len(timed) / sum(slowness))} samples/s</b>; <b>{percent(waited)}</b> of the time was spent "
        f"waiting for data.{bands}</p>"
    )


def _nonfinite(steps: Sequence[Mapping[str, Any]]) -> str:
    bad = sum(_bad(record.get("loss")) for record in steps)
    return f"<p>{bad:,} of {len(steps):,} steps had a loss that is not finite; they are left out.</p>" if bad else ""


def _bad(value: float | None) -> bool:
    return value is None or not math.isfinite(value)


def _evaluations(evaluations: Sequence[Mapping[str, Any]]) -> str:
    if len(evaluations) < 2:
        return ""
    at = _column(evaluations, "step")
    charts = []
    for name, title in _DIRECTIONS.items():
        curves = [Series(f"R@{k}", at, _column(evaluations, f"{name}_R@{k}")) for k in _KS]
        charts.append(_share_chart(title, curves, evaluations[-1].get(f"{name}_chance_R@1"), "chance R@1"))
        if f"reranked_{name}_R@1" in evaluations[-1]:
            curves = [Series(f"R@{k}", at, _column(evaluations, f"reranked_{name}_R@{k}")) for k in _KS]
            charts.append(_share_chart(f"{title}, reordered", curves, None, ""))
    for name, (title, shares, chances) in _TASKS.items():
        curves = [Series(label, at, _column(evaluations, f"{name}_{share}")) for share, label in shares.items()]
        first = next(iter(shares))
        chance = evaluations[-1].get(f"{name}_{chances[first]}")
        charts.append(_share_chart(title, curves, chance, f"chance {shares[first]}"))
    return _section("Over the evaluations", "evaluations", "", charts)


def _share_chart(title: str, curves: Sequence[Series], chance: float | None, chance_name: str) -> str:
    curves = [curve for curve in curves if any(value is not None for value in curve.y)]
    references = [(chance_name, chance)] if chance is not None else []
    return line_chart(title, curves, show=percent, y_range=(0, 1), references=references) if curves else ""


def _step_split(steps: Sequence[Mapping[str, Any]], marks: Sequence[tuple[float, str]]) -> str:
    names = list(dict.fromkeys(name for record in steps for name in record.get("seconds", {})))
    if not names or len(names) > COLOURS:
        return ""
    at = _column(steps, "step")
    series = [Series(name, at, [1e3 * (record.get("seconds", {}).get(name) or 0.0) for record in steps]) for name in names]
    if not any(value for one in series for value in one.y):
        return ""
    return stacked_chart("Where the time of a step goes, ms", series, marks=marks)


def _time_split(steps: Sequence[Mapping[str, Any]]) -> str:
    totals: dict[str, float] = {}
    for record in steps:
        for name, seconds in record.get("seconds", {}).items():
            totals[name] = totals.get(name, 0.0) + (seconds or 0.0)
    whole = sum(totals.values())
    if not whole or len(totals) > COLOURS:
        return ""
    shares = {name: seconds / whole for name, seconds in totals.items()}
    bar = "".join(f'<i class="s{i}" style="flex-grow:{share:.5f}"></i>' for i, share in enumerate(shares.values()))
    keys = "".join(
        f'<span class="key s{i}">{escape(name)} {percent(share)}</span>' for i, (name, share) in enumerate(shares.items())
    )
    return (
        f'<div class="card wide"><b>Where the time of all steps went</b><div class="split">{bar}</div>'
        f'<span class="legend">{keys}</span></div>'
    )


def _sheets(pairs: Pairs | None, zero_shot: Classified | None, answered: Mapping[str, Answered], seed: int) -> str:
    out = []
    if pairs is not None:
        out.append(
            '<section id="text-to-image"><h2>Text to image: what the model finds</h2><p class="soft">Each caption asks for its '
            f"picture among all held-out pictures; the five that the model puts first.</p>{text_to_image(pairs, seed)}</section>"
        )
        out.append(
            '<section id="image-to-text"><h2>Image to text: what the model says</h2><p class="soft">The other direction: the '
            f"five captions that the model puts first for a picture.</p>{image_to_text(pairs, seed)}</section>"
        )
    if zero_shot is not None:
        out.append(f'<section id="zero-shot"><h2>Zero-shot classification</h2>{confusions(zero_shot)}</section>')
    for name, one in answered.items():
        out.append(f'<section id="{name}"><h2>{_TASKS[name][0]}</h2>{answered_sheet(one, seed)}</section>')
    return "".join(out)


def _damaged(
    steps: Sequence[Mapping[str, Any]], pairs: Pairs | None, zero_shot: Classified | None, answered: Mapping[str, Answered]
) -> str:
    in_training = max((record.get("skipped_samples", 0) for record in steps), default=0)
    sources = [("held-out pairs", pairs), ("zero-shot pictures", zero_shot)]
    lists = [(name, one.features.skipped) for name, one in sources if one is not None and one.features.skipped]
    lists += [(f"samples of {_TASKS[name][0].lower()}", one.skipped) for name, one in answered.items() if one.skipped]
    if not in_training and not lists:
        return ""
    out = ['<section id="damaged"><h2>Damaged samples, left out</h2>']
    if in_training:
        out.append(f"<p>{in_training:,} in training; the log names them.</p>")
    for name, skipped in lists:
        items = "".join(f"<li><code>{escape(key)}</code> {escape(why)}</li>" for key, why in list(skipped.items())[:_LISTED])
        more = f'<p class="soft">and {len(skipped) - _LISTED:,} more</p>' if len(skipped) > _LISTED else ""
        out.append(f"<h3>{len(skipped):,} of the {name}</h3><ul>{items}</ul>{more}")
    return "".join(out) + "</section>"


def _about(config_text: str, environment_text: str, profile_text: str) -> str:
    texts = [("Profile of some steps", profile_text), ("Configuration", config_text)]
    if environment_text:
        texts.append(
            ("Environment", yaml.safe_dump(json.loads(environment_text), sort_keys=False, allow_unicode=True, width=100))
        )
    folds = "".join(f"<details><summary>{name}</summary><pre>{escape(text)}</pre></details>" for name, text in texts if text)
    return f'<section id="about"><h2>About the run</h2>{folds}</section>' if folds else ""


def _column(records: Iterable[Mapping[str, Any]], key: str) -> list[Any]:
    return [record.get(key) for record in records]


def _chart(
    title: str,
    series: Sequence[Series],
    *,
    from_zero: bool = False,
    show: Callable[..., str] = number,
    marks: Sequence[tuple[float, str]] = (),
) -> str:
    """A chart, "" when there is nothing to draw. from_zero: the axis begins at 0; otherwise it is logarithmic where it helps."""
    values = [value for one in series for value in one.y if not _bad(value)]
    if not values:
        return ""
    if from_zero:
        return line_chart(title, series, show=show, y_range=(0, max(values)), marks=marks)
    log = spans_decades(series)
    return line_chart(f"{title} (log scale)" if log else title, series, show=show, log=log, marks=marks)


def _section(title: str, name: str, before: str, charts: Iterable[str]) -> str:
    drawn = "".join(filter(None, charts))
    return f'<section id="{name}"><h2>{title}</h2>{before}<div class="charts">{drawn}</div></section>' if drawn else ""
