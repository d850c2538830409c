from __future__ import annotations

import math
import xml.etree.ElementTree as ElementTree

import pytest

from vlpfast.evaluation.charts import HEIGHT, WIDTH, Series, line_chart, number, percent, spans_decades, stacked_chart


def drawn(*series: Series, **options) -> ElementTree.Element:
    return ElementTree.fromstring(line_chart("a chart", series, **options))


def marks(figure: ElementTree.Element, name: str) -> list[ElementTree.Element]:
    return [element for element in figure.iter() if name in element.get("class", "").split()]


def places(element: ElementTree.Element) -> list[tuple[float, float]]:
    return [tuple(map(float, pair.split(","))) for pair in element.get("points").split()]


def labels(figure: ElementTree.Element, anchor: str) -> list[str]:
    return [tick.text for tick in marks(figure, "tick") if tick.get("text-anchor") == anchor]


def test_line_lies_where_the_axes_say() -> None:
    figure = drawn(Series("loss", [0, 50, 100], [0.0, 3.0, 4.0]))
    (line,) = [mark for mark in marks(figure, "line")]
    (x0, y0), (x1, y1), (x2, y2) = places(line)
    assert x0 < x1 < x2 and x1 - x0 == pytest.approx(x2 - x1, abs=0.2)
    assert (y0 - y1) / (y0 - y2) == pytest.approx(3 / 4, abs=0.01)
    rules = {rule.get("y1") for rule in marks(figure, "grid")}
    assert {str(y0), str(y2)} <= rules  # 0 and 4 are ticks
    assert labels(figure, "end")[:5] == ["0", "1", "2", "3", "4"]
    assert labels(figure, "middle") == ["0", "20", "40", "60", "80", "100"]


@pytest.mark.parametrize(
    "low,high",
    [(0, 1), (1e-5, 1e-3), (-3, 7), (5, 5), (0, 0), (1e6, 1.0001e6), (14.12, 14.29), (0.4, 0.4001), (-1e-9, 1e-9), (2.3, 2.4)],
)
def test_ticks_enclose_the_data_and_are_few(low: float, high: float) -> None:
    figure = drawn(Series("y", [1, 2], [low, high]))
    ticks = labels(figure, "end")[:-1]  # the last is the name of the x axis
    assert 2 <= len(ticks) <= 9 and len(set(ticks)) == len(ticks)
    for mark in marks(figure, "line"):
        assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in places(mark))


def test_thousands_of_steps_are_thinned_and_no_spike_is_lost() -> None:
    values = [math.sin(step / 500) for step in range(20_000)]
    values[13_579] = 9.0
    figure = drawn(Series("y", range(20_000), values))
    (line,), (band,) = marks(figure, "line"), marks(figure, "band")
    assert len(places(line)) == 240
    heights = [y for _, y in places(band)]
    top_tick = min(float(rule.get("y1")) for rule in marks(figure, "grid"))  # 10
    assert min(heights) - top_tick < 0.15 * HEIGHT
    assert max(y for _, y in places(line)) - min(y for _, y in places(line)) < 0.5 * HEIGHT  # the mean hardly moves
    assert len(marks(figure, "stop")) == 60


def test_short_series_has_no_band_and_tells_every_value() -> None:
    figure = drawn(Series("R@1", [100, 200], [0.25, 0.5]), Series("R@5", [100, 200], [0.75, None]), show=percent)
    assert not marks(figure, "band")
    tips = [stop.find("title").text for stop in marks(figure, "stop")]
    assert tips == ["step 100\nR@1 25\u00a0%\nR@5 75\u00a0%", "step 200\nR@1 50\u00a0%\nR@5 75\u00a0%"]
    assert [key.text for key in marks(figure, "key")] == ["R@1", "R@5"]
    strips = [stop.find("rect") for stop in marks(figure, "stop")]
    assert float(strips[0].get("x")) + float(strips[0].get("width")) == pytest.approx(float(strips[1].get("x")), abs=0.2)


def test_one_point_is_a_dot() -> None:
    figure = drawn(Series("y", [7], [3.0]))
    assert not marks(figure, "line") and len(marks(figure, "dot")) == 2  # the point and the one under the pointer


def test_logarithmic_axis_is_even_in_powers_of_ten() -> None:
    figure = drawn(Series("y", [1, 2, 3], [1.0, 100.0, 10000.0]), log=True)
    (_, y0), (_, y1), (_, y2) = places(marks(figure, "line")[0])
    assert y0 - y1 == pytest.approx(y1 - y2, abs=0.2)
    assert labels(figure, "end")[:-1] == ["1", "10", "100", "1,000", "10,000"]
    with pytest.raises(ValueError, match=r"logarithmic axis needs values above 0, got -1"):
        drawn(Series("y", [1, 2], [1.0, -1.0]), log=True)


def test_where_a_logarithmic_axis_helps() -> None:
    assert spans_decades([Series("y", [1, 2], [0.01, 10])])
    assert not spans_decades([Series("y", [1, 2], [1, 10])])
    assert not spans_decades([Series("y", [1, 2], [0, 10])])
    assert not spans_decades([Series("y", [1], [None])])


def test_values_that_are_missing_or_not_finite_are_left_out() -> None:
    figure = drawn(Series("y", [1, 2, 3, 4, 5], [1.0, None, math.nan, math.inf, 2.0]))
    assert len(places(marks(figure, "line")[0])) == 2
    with pytest.raises(ValueError, match="no series has a finite value"):
        drawn(Series("y", [1, 2], [None, math.nan]))
    with pytest.raises(ValueError, match="at most 7, got 8"):
        drawn(*[Series("y", [1], [1.0])] * 8)


def test_reference_lines_and_summary_for_those_who_do_not_see_it() -> None:
    figure = drawn(Series("R@1", [0, 10], [0.1, 0.9]), show=percent, y_range=(0, 1), references=[("chance", 0.5)])
    (rule,) = marks(figure, "reference")
    ticks = [float(mark.get("y1")) for mark in marks(figure, "grid")]
    assert float(rule.get("y1")) == pytest.approx((min(ticks) + max(ticks)) / 2, abs=0.2)
    assert figure.find("svg").get("aria-label") == "a chart: R@1 from 10\u00a0% at step 0 to 90\u00a0% at step 10"


def test_names_are_escaped() -> None:
    hostile = '<script>alert("1")</script>'
    text = line_chart(
        hostile, [Series(hostile, [1, 2], [1, 2]), Series("b", [1], [1])], references=[(hostile, 1.5)], x_name=hostile
    )
    assert "<script" not in text
    ElementTree.fromstring(text)


@pytest.mark.parametrize(
    "value,text",
    [
        (0, "0"),
        (12345.6, "12,346"),
        (999.7, "1,000"),
        (12.34, "12.3"),
        (0.00123, "0.00123"),
        (4.6e-05, "4.6e-5"),
        (-2, "-2"),
        (100, "100"),
        (2e7, "2e7"),
    ],
)
def test_numbers_are_short(value: float, text: str) -> None:
    assert number(value) == text


def test_stages_are_marked_where_they_begin() -> None:
    figure = drawn(Series("loss", [1, 11], [0.0, 1.0]), marks=[(1, "first"), (6, "<second>"), (99, "outside")])
    lines = marks(figure, "mark")
    assert [line.get("x1") == line.get("x2") for line in lines] == [True, True]
    (x0, _), (x1, _) = places(marks(figure, "line")[0])
    assert float(lines[0].get("x1")) == pytest.approx(x0, abs=0.2)
    assert float(lines[1].get("x1")) == pytest.approx((x0 + x1) / 2, abs=0.2)
    assert [name.text for name in marks(figure, "mark-name")] == ["first", "<second>"]


def stacked(*series: Series, **options) -> ElementTree.Element:
    return ElementTree.fromstring(stacked_chart("a chart", series, **options))


def test_layers_lie_on_one_another() -> None:
    figure = stacked(Series("a", [1, 2, 3], [1.0, 2.0, 1.0]), Series("b", [1, 2, 3], [1.0, 2.0, None]))
    first, second = marks(figure, "layer")
    a, b = places(first), places(second)
    assert a[:3] == b[:2:-1] and len(a) == len(b) == 6  # the lower layer's upper edge is the upper one's lower edge
    (_, floor), (_, low), (_, high) = a[3], a[0], b[0]
    assert floor - low == pytest.approx(low - high, abs=0.2)  # 1 and 1
    assert floor - b[1][1] == pytest.approx(4 * (floor - low), abs=0.4)  # 2 and 2
    assert b[2] == a[2]  # nothing there
    assert labels(figure, "end")[:-1] == ["0", "1", "2", "3", "4"]
    assert [stop.find("title").text for stop in marks(figure, "stop")][1] == "step 2\na 2\nb 2"
    dots = [float(dot.get("cy")) for dot in marks(marks(figure, "stop")[1], "dot")]
    assert dots == [a[1][1], b[1][1]]
    assert [key.text for key in marks(figure, "key")] == ["a", "b"]


def test_one_step_is_a_bar_and_many_are_thinned() -> None:
    (bar,) = marks(stacked(Series("a", [7], [3.0])), "layer")
    assert len({x for x, _ in places(bar)}) == 2 and len(places(bar)) == 4
    steps = range(5000)
    figure = stacked(Series("a", steps, [1.0] * 5000), Series("b", steps, [0.5] * 5000))
    assert [len(places(layer)) for layer in marks(figure, "layer")] == [480, 480]


def test_what_cannot_be_stacked_is_named() -> None:
    with pytest.raises(ValueError, match="no series has a value above 0"):
        stacked(Series("a", [1, 2], [0.0, math.nan]))
    with pytest.raises(ValueError, match="expected series with the same x"):
        stacked(Series("a", [1, 2], [1.0, 1.0]), Series("b", [1, 3], [1.0, 1.0]))
    with pytest.raises(ValueError, match="at most 7, got 8"):
        stacked(*[Series("y", [1], [1.0])] * 8)
