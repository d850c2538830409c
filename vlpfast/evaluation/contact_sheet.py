"""Contact sheets: what the model finds for a text, what it says about a picture, which classes it mixes up, what it is fed."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from vlpfast.data.inspect import TILE, sheet_png
from vlpfast.data.shards import IMAGE_EXTENSIONS, ShardSet
from vlpfast.evaluation.answers import Answered
from vlpfast.evaluation.charts import percent
from vlpfast.evaluation.features import Features
from vlpfast.evaluation.retrieval import Ranking, Retrieval
from vlpfast.evaluation.zero_shot import ZeroShot
from vlpfast.types import Batch, DataSpec, Tokenizer

_SIDE = 192  # pixels of a thumbnail's longer side
_TICK, _CROSS = "✓", "✗"


@dataclass
class Pairs:
    """Retrieval over the samples of `shards`: row i of text and image is sample features.index[i]."""

    features: Features
    retrieval: Retrieval
    shards: ShardSet


@dataclass
class Classified:
    """Zero-shot classification of the samples of `shards`: row i of the guesses is sample features.index[i]."""

    features: Features
    result: ZeroShot
    shards: ShardSet


class Samples:
    """Pictures and captions of the rows, read back from the shards when they are shown."""

    def __init__(self, rows: Features | Answered, shards: ShardSet) -> None:
        self._index, self._shards = rows.index.tolist(), shards
        self._pictures: dict[int, str] = {}

    def picture(self, row: int) -> str:
        """A thumbnail as a data URL."""
        if row not in self._pictures:
            image = self._stored(row, "") or _side_by_side([one for place in "01" if (one := self._stored(row, f"{place}."))])
            image.thumbnail((_SIDE * image.width // image.height, _SIDE) if image.width > 2 * image.height else (_SIDE, _SIDE))
            out = io.BytesIO()
            image.save(out, "JPEG", quality=88)
            self._pictures[row] = "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode()
        return self._pictures[row]

    def _stored(self, row: int, number: str) -> Image.Image | None:
        """number: "" or, of several pictures of a sample, "0.", "1."."""
        stored = self._shards.read([self._index[row]], tuple(number + extension for extension in IMAGE_EXTENSIONS))[0]
        return None if stored is None else Image.open(io.BytesIO(stored.tobytes())).convert("RGB")

    def caption(self, row: int) -> str:
        text, meta = (self._shards.read([self._index[row]], (extension,))[0] for extension in ("txt", "json"))
        if text is not None:
            return text.tobytes().decode().strip()
        caption = "" if meta is None else json.loads(meta.tobytes()).get("caption", "")
        return str(caption[0] if isinstance(caption, list) and caption else caption).strip()


def text_to_image(pairs: Pairs, seed: int) -> str:
    """Captions with the pictures found for them, some at random and the worst."""
    samples, ranking = Samples(pairs.features, pairs.shards), pairs.retrieval.text_to_image
    legend = (
        f'<p class="legend-line"><span class="right"><span class="mark">{_TICK}</span> green frame: the right picture</span>'
        f'<span><span class="mark">{_CROSS}</span> no frame: another picture</span>'
        '<span class="wanted">dashed frame: the right one, where it was missed</span></p>'
    )
    return legend + _groups(ranking, seed, lambda row: _found_pictures(row, ranking, samples), "captions", (8, 6))


def image_to_text(pairs: Pairs, seed: int) -> str:
    """Pictures with the captions found for them, some at random and the worst."""
    samples, ranking = Samples(pairs.features, pairs.shards), pairs.retrieval.image_to_text
    return _groups(ranking, seed, lambda row: _found_captions(row, ranking, samples), "pictures", (4, 4))


def _groups(ranking: Ranking, seed: int, draw: Callable[[int], str], what: str, counts: tuple[int, int]) -> str:
    random, worst = chosen(ranking.rank, seed, *counts)
    out = f"<h3>Drawn at random</h3>{_grid(draw(row) for row in random)}"
    if worst:
        return f"{out}<h3>The worst of {len(ranking.rank):,} {what}</h3>{_grid(draw(row) for row in worst)}"
    others = (
        f'<p class="soft">For all other {what} the right one is in first place.</p>' if len(ranking.rank) > len(random) else ""
    )
    return out + others


def chosen(rank: Tensor, seed: int, random: int, worst: int) -> tuple[list[int], list[int]]:
    """Rows drawn at random, and of the others those with the highest ranks above 1, worst first. The same for the same seed."""
    order = torch.randperm(len(rank), generator=torch.Generator().manual_seed(seed)).tolist()
    drawn = order[:random]
    last = rank.argsort(descending=True, stable=True).tolist()
    return drawn, [row for row in last if rank[row] > 1 and row not in drawn][:worst]


def _found_pictures(row: int, ranking: Ranking, samples: Samples) -> str:
    shots = []
    for place, (picture, right) in enumerate(zip(ranking.best[row].tolist(), ranking.right[row].tolist(), strict=True), start=1):
        kind, mark, word = ("right", _TICK, "right") if right else ("wrong", _CROSS, "wrong")
        shots.append(_shot(kind, f"{mark} {place}", f"place {place}, {word}", picture, samples))
    if not ranking.right[row].any():
        place = _place(ranking, row)
        shots.append(_shot("wanted", f"place {place}", f"the right picture, place {place}", int(ranking.positive[row]), samples))
    return (
        f'<article class="card query"><blockquote>{escape(samples.caption(row))}</blockquote>'
        f'{_verdict(ranking, row, "picture")}<ul class="shots">{"".join(shots)}</ul></article>'
    )


def _shot(kind: str, label: str, alt: str, picture: int, samples: Samples) -> str:
    caption = escape(samples.caption(picture))
    return (
        f'<li class="shot {kind}"><img src="{samples.picture(picture)}" alt="{escape(alt)}: {caption}" title="{caption}">'
        f"{escape(label)}</li>"
    )


def _found_captions(row: int, ranking: Ranking, samples: Samples) -> str:
    lines = []
    for place, (text, right) in enumerate(zip(ranking.best[row].tolist(), ranking.right[row].tolist(), strict=True), start=1):
        kind, mark = ("right", _TICK) if right else ("wrong", _CROSS)
        lines.append(
            f'<li class="{kind}"><span><span class="mark">{mark}</span> {place}</span> {escape(samples.caption(text))}</li>'
        )
    if not ranking.right[row].any():
        wanted = escape(samples.caption(int(ranking.positive[row])))
        lines.append(f'<li class="wanted"><span>{_place(ranking, row)}</span> {wanted}</li>')
    picture = f'<img class="picture" src="{samples.picture(row)}" alt="query: {escape(samples.caption(row))}">'
    return (
        f'<article class="card query">{_verdict(ranking, row, "caption")}<div class="reverse">{picture}'
        f"<ol>{''.join(lines)}</ol></div></article>"
    )


def _verdict(ranking: Ranking, row: int, what: str) -> str:
    if ranking.right[row].any():
        first = int(ranking.right[row].int().argmax()) + 1
        return f'<p class="verdict hit">{_TICK} right {what} in place {first}</p>'
    return f'<p class="verdict missed">{_CROSS} right {what} only in place {_place(ranking, row)}</p>'


def _place(ranking: Ranking, row: int) -> str:
    rank = float(ranking.rank[row])
    return f"{rank:,.0f}" if rank == round(rank) else f"{rank:,.1f}"  # half places: tied


def _grid(cards: Iterable[str]) -> str:
    return f'<div class="queries">{"".join(cards)}</div>'


def batch_sheet(batch: Batch, spec: DataSpec, tokenizer: Tokenizer | None, count: int = 24) -> bytes:
    """The first samples of a batch as a model gets them, at most `count` tiles -> a PNG file: views and local views, cropped,
    mirrored, augmented, normalised back, with the boxes that are in them; captions from their ids, cut where those are. Without
    pictures the tiles are grey, without captions they have the samples' keys."""
    keys = batch.get("key", [])
    tiles = []
    for i in range(len(keys)):
        text = keys[i]
        if "text" in batch and tokenizer is not None:
            text = tokenizer.decode(batch["text"][i].tolist()) or "(no caption)"
        pictures = _views(batch, i, spec) or [Image.new("RGB", (TILE, TILE), "#cccccc")]
        tiles += [(picture, text, keys[i]) for picture in pictures]
        if len(tiles) >= count:
            break
    return sheet_png(tiles[:count])


def _views(batch: Batch, i: int, spec: DataSpec) -> list[Image.Image]:
    views = []
    for name in ("image", "image_local"):
        if name not in batch:
            continue
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (spec.image.mean, spec.image.std))
        pixels = batch[name][i].detach().cpu().float()  # [(V,) 3, S, S]
        for number, view in enumerate(pixels.view(-1, *pixels.shape[-3:])):
            levels = (view * std + mean).mul(255).round().clamp(0, 255).byte()
            picture = Image.fromarray(levels.permute(1, 2, 0).contiguous().numpy())
            scale = TILE / max(picture.size)
            size = tuple(max(1, round(side * scale)) for side in picture.size)
            picture = picture.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BICUBIC)
            if name == "image" and "boxes" in batch:
                boxes, shown = batch["boxes"][i], batch["box_mask"][i]  # [(V,) N, 4], [(V,) N]
                boxes, shown = (boxes[number], shown[number]) if boxes.ndim == 3 else (boxes, shown)
                edges = (boxes[shown].cpu() * torch.tensor([*size, *size])).tolist()
                for box in edges:
                    ImageDraw.Draw(picture).rectangle(box, outline="red", width=2)
            views.append(picture)
    return views


def _side_by_side(images: Sequence[Image.Image]) -> Image.Image:
    gap = 8
    out = Image.new("RGB", (sum(image.width + gap for image in images) - gap, max(image.height for image in images)), "white")
    left = 0
    for image in images:
        out.paste(image, (left, 0))
        left += image.width + gap
    return out


def answered_sheet(answered: Answered, seed: int, count: int = 8) -> str:
    """Questions with their pictures and what the model answered, some at random, then some of those that it got wrong."""
    samples, right = Samples(answered, answered.shards), answered.right
    order = torch.randperm(len(right), generator=torch.Generator().manual_seed(seed)).tolist()
    drawn = order[:count]
    wrong = [row for row in order[count:] if not right[row]][:count]

    def card(row: int) -> str:
        kind, mark = ("right", _TICK) if right[row] else ("wrong", _CROSS)
        question = answered.questions[row]
        wanted = "" if right[row] else f'<p class="wanted">{escape(" / ".join(answered.references[row]))}</p>'
        asked = f"<blockquote>{escape(question)}</blockquote>" if question else ""
        return (
            f'<article class="card query"><img class="picture" src="{samples.picture(row)}" alt="{escape(samples.caption(row))}">'
            f'{asked}<p class="{kind}"><span class="mark">{mark}</span> {escape(answered.answers[row])}</p>{wanted}</article>'
        )

    legend = (
        f'<p class="legend-line"><span class="right"><span class="mark">{_TICK}</span> right</span>'
        f'<span><span class="mark">{_CROSS}</span> wrong, with the right answer below</span></p>'
    )
    more = f"<h3>Wrong ones</h3>{_grid(map(card, wrong))}" if wrong else ""
    return f"{legend}<h3>Drawn at random</h3>{_grid(map(card, drawn))}{more}"


def confusions(classified: Classified, count: int = 10) -> str:
    """The classes with the lowest accuracy, and the pairs most often mixed up with an example of each."""
    result, samples = classified.result, Samples(classified.features, classified.shards)
    accuracy = sorted(result.per_class().items(), key=lambda item: (item[1][0], -item[1][1], item[0]))
    rows = [
        f'<tr><td>{escape(name)}</td><td><div class="bar"><i style="width:{100 * share:.1f}%"></i></div></td>'
        f"<td>{percent(share)} of {pictures:,}</td></tr>"
        for name, (share, pictures) in accuracy[:count]
    ]
    out = _table("Classes with the lowest accuracy", ("class", "", "right"), rows)
    if pairs := result.confusions()[:count]:
        labels, guesses = result.labels, result.ranking.best[:, 0]
        place = {name: i for i, name in enumerate(result.names)}
        rows = []
        for name, taken, times in pairs:
            example = int(((labels == place[name]) & (guesses == place[taken])).nonzero()[0])
            picture = f'<img class="picture" src="{samples.picture(example)}" alt="{escape(name)}, taken for {escape(taken)}">'
            rows.append(f"<tr><td>{picture}</td><td>{escape(name)}</td><td>{escape(taken)}</td><td>{times:,}</td></tr>")
        out += _table("Most often mixed up", ("", "class", "taken for", "times"), rows)
    return f'<div class="tables">{out}</div>'


def _table(title: str, heads: Sequence[str], rows: Sequence[str]) -> str:
    head = "".join(f"<th>{name}</th>" for name in heads)
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    return f'<section class="card"><h3>{title}</h3>{table}</section>'
