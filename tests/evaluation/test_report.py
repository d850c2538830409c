from __future__ import annotations

import base64
import html
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import browser
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from vlpfast.data.shards import ShardSet, ShardWriter
from vlpfast.evaluation.answers import Answered, written_metrics
from vlpfast.evaluation.contact_sheet import Classified, Pairs, chosen
from vlpfast.evaluation.features import Features
from vlpfast.evaluation.report import read_jsonl, write_report
from vlpfast.evaluation.retrieval import retrieval
from vlpfast.evaluation.zero_shot import zero_shot
from vlpfast.types import UserError

COUNT = 30
HOSTILE = '<img src="http://example.com/x.png"><script>console.log("run")</script>'
NAMES = ["red", "green", "blue & <b>cyan</b>"]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    folder = tmp_path_factory.mktemp("shards")
    with ShardWriter(folder, "heldout") as writer:
        for i in range(COUNT):
            out = io.BytesIO()
            Image.new("RGB", (300, 200), (8 * i, 255 - 8 * i, 128)).save(out, "PNG" if i % 2 else "JPEG")
            caption = HOSTILE if i == 7 else f"caption number {i}"
            words = {"json": json.dumps({"caption": caption}).encode()} if i % 3 == 0 else {"txt": caption.encode()}
            writer.write(f"s{i:03d}", {"png" if i % 2 else "jpg": out.getvalue(), **words})
    return ShardSet(str(folder / "*.tar"))


@pytest.fixture
def evaluated(shards: ShardSet) -> dict:
    """Pictures 7 and 9 are lost: each is the last for its caption. Picture 5 comes second, all others first."""
    text = torch.eye(COUNT)
    image = torch.eye(COUNT) + 0.01 * torch.rand(COUNT, COUNT, generator=torch.Generator().manual_seed(0))
    image[7, 7] = image[9, 9] = -1
    image = F.normalize(image, dim=1)
    image[4, 5] = 2  # picture 4 comes before picture 5
    rows = torch.arange(COUNT)
    features = Features(image, text, rows, [shards.key(i) for i in range(COUNT)], [], {f"s900{HOSTILE}": f"broken {HOSTILE}"})
    found = retrieval(image, text)
    labels = rows % 3
    guesses = F.one_hot(labels, 3).float()
    guesses[6] = torch.tensor([0.0, 0.2, 0.9])  # a red one, taken for blue
    result = zero_shot(guesses, labels, torch.eye(3), NAMES)
    return {
        "pairs": Pairs(features, found, shards),
        "zero_shot": Classified(Features(guesses, None, rows, features.keys, [], {}), result, shards),
        "evaluation": {"step": 400, **found.metrics, **result.metrics},
    }


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "my <run>"
    folder.mkdir()
    steps = [
        {
            "step": step,
            "loss": 5.0 / step,
            "losses": {"contrastive": 5.0 / step},
            "lr": 1e-3,
            "grad_norm": 2.0,
            "logit_scale": 14.3,
            "samples_per_s": 100.0 if step % 2 else 300.0,
            "data_wait": 0.5 if step % 2 else 0.0,
            "seconds": {"data": 0.1, "forward": 0.3, "backward": 0.6},
            "stage": "first" if step <= 150 else "<second>",
            "mfu": 0.25,
            "memory_bytes": 3 * 2**30,
            "skipped_samples": 2,
        }
        for step in range(1, 401)
    ]
    steps[9]["loss"] = None
    (folder / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps) + '{"step": 401, "lo')
    lines = [
        {"step": step, "text_to_image_R@1": step / 1000, "image_to_text_R@1": 0.2, "zero_shot_top1": 0.9, "zero_shot_top5": 1}
        for step in (200, 400)
    ]
    (folder / "evaluation.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    facts = {"flops_per_sample": 44.4e9, "counted": "by shapes", "peak_flops_per_s": 989e12, "peak": f"H100 {HOSTILE}"}
    (folder / "speed.json").write_text(json.dumps({"first": facts, "<second>": facts}))
    (folder / "profile").mkdir()
    (folder / "profile" / "summary.md").write_text(f"# Profile\n\n- idle {HOSTILE}\n")
    (folder / "config.yaml").write_text(f"model:\n  name: clip\ntrain:\n  batch_size: 10\n  note: '{HOSTILE}'\n")
    (folder / "environment.json").write_text(json.dumps({"torch": "2.13.0", "command": [HOSTILE]}))
    return folder


class Page(HTMLParser):
    """Tags with their attributes, and the text of every element of a class."""

    VOID = ("meta", "link", "img", "line", "circle", "rect", "polyline", "polygon", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.open: list[str] = []
        self.feed(text)
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attributes) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def query(text: str, caption: str) -> str:
    """The card of the text-to-image sheet that asks with this caption."""
    (card,) = [part for part in text.split("<article")[1:] if f"<blockquote>{caption}</blockquote>" in part]
    return card.split("</article>")[0]


def test_page_is_whole_escaped_and_asks_for_nothing(run_dir: Path, evaluated: dict) -> None:
    path = write_report(run_dir, **evaluated)
    assert path == run_dir / "report.html"
    assert [entry.name for entry in run_dir.glob("report*")] == ["report.html"]
    text = path.read_text()
    page = Page(text)
    tags = [tag for tag, _ in page.tags]
    assert "script" not in tags and "b" in tags
    assert all(attributes["src"].startswith("data:image/jpeg;base64,") for tag, attributes in page.tags if tag == "img")
    assert all(attributes["href"] == "data:," for tag, attributes in page.tags if tag == "link")
    assert not re.search(r"url\(|@import", text)
    for what in ("http-equiv", "&lt;run&gt;", "&lt;script&gt;", "blue &amp; &lt;b&gt;cyan"):
        assert what in text
    sections = {attributes.get("id") for tag, attributes in page.tags if tag == "section"}
    assert {"headline", "training", "evaluations", "text-to-image", "image-to-text", "zero-shot", "damaged", "about"} <= sections


def test_questions_and_answers(run_dir: Path, shards: ShardSet) -> None:
    rows = torch.arange(COUNT)
    questions = [f"question {i}" if i else HOSTILE for i in range(COUNT)]
    answers = ["A red dog." if i % 3 else "blue <cat>" for i in range(COUNT)]
    answered = Answered(rows, questions, answers, [["red dog", "dog"]] * COUNT, {"k": "broken"}, shards)
    metrics = {"step": 9, **written_metrics(answers, answered.references, "written"), "reranked_text_to_image_R@1": 0.5}
    text = write_report(run_dir, evaluation=metrics, answered={"written": answered}).read_text().replace("\u00a0", " ")
    assert sum(answered.right) == 20
    assert "66.7 % <small>right</small>" in text and "chance 100 %" in text and "30 samples, CIDEr" in text
    assert "Text to image, reordered" in text
    page = text[text.index('<section id="written">') :]
    assert page.count('<article class="card query">') == 8 + 10 - sum(not right for right in drawn_right(answered))
    assert "blue &lt;cat&gt;" in page and '<p class="wanted">red dog / dog</p>' in page and "1 of the samples of answers" in text
    assert HOSTILE not in text


def drawn_right(answered: Answered) -> list[bool]:
    """Of the eight that are drawn at random."""
    order = torch.randperm(COUNT, generator=torch.Generator().manual_seed(0)).tolist()
    return [answered.right[row] for row in order[:8]]


def test_pictures_of_two_stand_side_by_side(run_dir: Path, tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "two", "pairs") as writer:
        members = {}
        for place, colour in enumerate(("red", "blue")):
            out = io.BytesIO()
            Image.new("RGB", (60, 60), colour).save(out, "PNG")
            members[f"{place}.png"] = out.getvalue()
        writer.write("p", {**members, "txt": b"two"})
    answered = Answered(torch.tensor([0]), [""], ["x"], [["x"]], {}, ShardSet(str(tmp_path / "two" / "*.tar")))
    text = write_report(run_dir, evaluation={}, answered={"classification": answered}).read_text()
    data = re.search(r'<img class="picture" src="data:image/jpeg;base64,([^"]+)"', text)
    picture = Image.open(io.BytesIO(base64.b64decode(data[1])))
    assert picture.size[0] > 2 * picture.size[1]
    (left, right) = (picture.getpixel((picture.width * n // 4, picture.height // 2)) for n in (1, 3))
    assert left[0] > 200 > 50 > left[2] and right[2] > 200 > 50 > right[0]


def test_numbers_on_the_page_are_those_of_the_evaluation(run_dir: Path, evaluated: dict) -> None:
    text = write_report(run_dir, **evaluated).read_text().replace("\u00a0", " ")
    metrics = evaluated["evaluation"]
    assert f"{100 * metrics['text_to_image_R@1']:.1f}".removesuffix(".0") + " % <small>R@1</small>" in text
    assert "<small>chance 3.3 %</small>" in text and "<small>chance 16.7 %</small>" in text  # 1 / 30, 5 / 30
    assert "3 classes, 30 pictures" in text and "median rank 1 among 30" in text
    # Half of the steps run at 100 samples/s and wait half of their time, half at 300: 150 in all, 3/8 of the time.
    assert "<b>150 samples/s</b>" in text and "<b>37.5 %</b>" in text
    assert "samples seen <b>4,000</b>" in text and "evaluated at step <b>400</b>" in text
    assert "1 of 400 steps had a loss that is not finite" in text
    assert "2 in training" in text and "<code>s900&lt;img" in text and "&lt;/script&gt;</code> broken &lt;img" in text
    titles = ("Loss", "Learning rate", "Gradient norm", "Samples per second", "Time spent waiting for data", "Logit scale")
    more = (
        "Model FLOPs utilisation",
        "Peak memory, GiB",
        "Where the time of a step goes, ms",
        "Where the time of all steps went",
    )
    for title in (*titles, *more):
        assert re.search(rf"<b>{title}( \(log scale\))?</b>", text), title
    assert "<li>first: 44.4 GFLOP a sample, forward and backward, counted by shapes; peak 989 TFLOP/s (H100 &lt;img" in text
    assert "<summary>Profile of some steps</summary><pre># Profile" in text
    figures = {part.split("</b>")[0]: part for part in text.split("<figcaption><b>")[1:]}
    for title in (*titles[1:], *more[:3]):  # the steps at which stages begin are marked in each
        assert re.findall(r'mark-name"[^>]*>([^<]+)<', figures[title]) == ["first", "&lt;second&gt;"], title
    assert re.findall(r'layer s(\d)"', figures[more[2]]) == ["0", "1", "2"]
    assert "data 100\nforward 300\nbackward 600" in figures[more[2]]


def test_right_and_wrong_pictures_are_marked(run_dir: Path, evaluated: dict) -> None:
    ranking = evaluated["pairs"].retrieval.text_to_image
    assert ranking.rank[9] == 30 and ranking.rank[5] == 2
    text = write_report(run_dir, **evaluated).read_text()
    lost = query(text, "caption number 9")
    assert "right picture only in place 30" in lost
    assert re.findall(r'class="shot (\w+)"', lost) == ["wrong"] * 5 + ["wanted"]
    assert 'alt="the right picture, place 30: caption number 9"' in lost and "✓" not in lost
    assert "http://example.com" in query(text, html.escape(HOSTILE))
    second = query(text, "caption number 5")
    assert "✓ right picture in place 2" in second
    assert re.findall(r'class="shot (\w+)"', second) == ["wrong", "right", "wrong", "wrong", "wrong"]
    assert re.findall(r"[✓✗] \d", second.split("</p>")[1]) == ["✗ 1", "✓ 2", "✗ 3", "✗ 4", "✗ 5"]
    assert 'alt="place 1, wrong: caption number 4"' in second
    # The pictures shown are those of the samples: picture 4 has this colour all over.
    shown = re.search(r'src="data:image/jpeg;base64,([^"]+)" alt="place 1, wrong', second)[1]
    image = Image.open(io.BytesIO(base64.b64decode(shown)))
    assert image.size == (192, 128)
    assert image.getpixel((50, 50)) == pytest.approx((32, 223, 128), abs=6)
    assert "<td>red</td><td>blue &amp; &lt;b&gt;cyan&lt;/b&gt;</td><td>1</td>" in text


def test_queries_are_some_at_random_and_the_worst() -> None:
    rank = torch.ones(100, dtype=torch.float64)
    rank[[10, 20, 30]] = torch.tensor([5.0, 90.0, 7.5], dtype=torch.float64)
    random, worst = chosen(rank, 0, 8, 6)
    assert len(set(random)) == 8 and chosen(rank, 0, 8, 6) == (random, worst) and chosen(rank, 1, 8, 6)[0] != random
    assert worst == [row for row in (20, 30, 10) if row not in random]
    assert chosen(torch.ones(5), 0, 8, 6) == (chosen(torch.ones(5), 0, 5, 0)[0], [])


def test_report_without_arguments_takes_everything_from_the_files(run_dir: Path) -> None:
    text = write_report(run_dir).read_text().replace("\u00a0", " ")
    assert "40 % <small>R@1</small>" in text and 'id="text-to-image"' not in text
    Page(text)


@pytest.mark.parametrize("name", ["metrics.jsonl", "evaluation.jsonl", "config.yaml", "environment.json", "speed.json"])
def test_each_file_may_be_missing(run_dir: Path, evaluated: dict, name: str) -> None:
    (run_dir / name).unlink()
    Page(write_report(run_dir, **evaluated).read_text())


def test_a_run_of_one_stage_has_no_marks(run_dir: Path) -> None:
    lines = (run_dir / "metrics.jsonl").read_text().replace("<second>", "first")
    (run_dir / "metrics.jsonl").write_text(lines)
    assert "mark-name" not in write_report(run_dir).read_text().split("</style>")[1]


def test_steps_without_the_newer_fields(run_dir: Path) -> None:
    """Of a run that an older version made."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()[:-1]]
    for line in lines:
        for key in ("stage", "mfu", "memory_bytes", "seconds"):
            del line[key]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run_dir / "speed.json").unlink()
    text = write_report(run_dir).read_text()
    Page(text)
    assert "Samples per second" in text and "Model FLOPs utilisation" not in text and "Where the time" not in text


def test_empty_run_folder(tmp_path: Path) -> None:
    assert "No evaluation yet." in write_report(tmp_path).read_text()


@pytest.mark.parametrize("name", ["config.yaml", "environment.json", "speed.json"])
def test_damaged_file_is_named(run_dir: Path, name: str) -> None:
    (run_dir / name).write_text("{ [")
    (run_dir / "report.html").write_text("the old one")
    with pytest.raises(UserError, match=r"config\.yaml, environment\.json or speed\.json is damaged"):
        write_report(run_dir)
    assert (run_dir / "report.html").read_text() == "the old one"


def test_missing_run_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere does not exist"):
        write_report(tmp_path / "nowhere")


def test_report_that_cannot_be_written(run_dir: Path) -> None:
    (run_dir / "report.html").mkdir()
    with pytest.raises(UserError, match=r"report.html could not be written: Is a directory"):
        write_report(run_dir)
    assert not (run_dir / "report.html.tmp").exists()


def test_cut_last_line_is_left_out_and_other_damage_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert read_jsonl(path) == []
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n{"step": 3, "caption": "\xc3')
    assert read_jsonl(path) == [{"step": 1}, {"step": 2}]
    path.write_text('{"step": 1}\n{"step"\n{"step": 3}\n')
    with pytest.raises(UserError, match=r"metrics.jsonl, line 2: expected a JSON object"):
        read_jsonl(path)


@pytest.mark.skipif(browser.EXECUTABLE is None, reason="waits for a browser: the package chromium")
def test_page_in_a_browser(run_dir: Path, evaluated: dict, tmp_path: Path) -> None:
    path = write_report(run_dir, **evaluated)
    probe = tmp_path / "probe.html"  # shows that requests and complaints are seen
    probe.write_text('<img src="http://127.0.0.1:9/a.png"><script>console.error("seen")</script>')
    with browser.Browser() as chromium:
        chromium.open(probe)
        assert chromium.requests()[1:] == ["http://127.0.0.1:9/a.png"]
        assert any("seen" in complaint for complaint in chromium.complaints())
        backgrounds = set()
        for width, dark in ((1280, False), (1280, True), (360, False), (360, True)):
            chromium.open(path, width, dark=dark)
            assert chromium.requests() == [path.resolve().as_uri()]
            assert chromium.complaints() == []
            assert chromium.evaluate("document.documentElement.scrollWidth") <= width, "the page is wider than the window"
            assert chromium.evaluate("document.querySelectorAll('figure.chart svg').length") == 12
            assert chromium.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
            assert chromium.evaluate("document.querySelectorAll('.shot.right').length") > 0
            frame = chromium.evaluate("getComputedStyle(document.querySelector('.shot.right img')).borderColor")
            red, green, blue = map(int, re.findall(r"\d+", frame)[:3])
            assert green > red and green > blue
            backgrounds.add(chromium.evaluate("getComputedStyle(document.body).backgroundColor"))
        assert len(backgrounds) == 2
        tip = "document.querySelector('.stop title').textContent"
        assert chromium.evaluate(tip).startswith("step ")
        text = "document.querySelector('#about summary').parentElement"
        assert not chromium.evaluate(f"{text}.open")
        chromium.evaluate("document.querySelector('#about summary').click()")
        assert chromium.evaluate(f"{text}.open")
