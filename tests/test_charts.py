"""What charts draw is where its numbers say."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from web_page import Page, numbers_in

from codex_accel import charts
from codex_accel.page import At


def drawn(lines: dict[int, dict], **more) -> Page:
    points = [(number, line["step"], line["loss"]) for number, line in lines.items()]
    options = {"name": "Loss by step", "field": "loss", "mark": None, **more}
    return Page(charts.curves(At(lines, "run"), [("train", points)], **options))


def places(page: Page, kind: str = "curve") -> list[tuple[float, float]]:
    return [
        tuple(map(float, point.split(",")))
        for line in page.of_class(kind)
        for point in line.attributes["points"].split()
    ]


def test_a_curve_goes_through_its_points():
    """Heights above the axis are in the proportion of the values above the lowest; steps are spread the same way."""
    lines = {1: {"step": 10, "loss": 5.0}, 4: {"step": 20, "loss": 2.0}, 5: {"step": 40, "loss": 3.0}}
    (x1, y1), (x2, y2), (x3, y3) = places(drawn(lines))
    assert (x2 - x1) / (x3 - x1) == pytest.approx(1 / 3, abs=0.001)
    assert (y2 - y3) / (y2 - y1) == pytest.approx(1 / 3, abs=0.001)


def test_the_ends_of_a_curve_are_labelled_with_their_lines():
    lines = {3: {"step": 10, "loss": 5.25}, 4: {"step": 20, "loss": 2.0}, 9: {"step": 40, "loss": 3.0}}
    labels = {e.attributes["data-key"]: e.text for e in drawn(lines).keyed}
    assert labels == {"run.3.loss": "5.25", "run.4.loss": "2", "run.3.step": "10", "run.9.step": "40"}


def test_one_point_and_a_flat_curve_can_be_drawn():
    assert places(drawn({1: {"step": 7, "loss": 1.5}}))
    flat = places(drawn({1: {"step": 1, "loss": 1.5}, 2: {"step": 2, "loss": 1.5}}))
    assert flat[0][1] == flat[1][1]
    assert charts.curves(At({}, "run"), [], name="Loss", field="loss", mark=None) == "<p>none</p>"


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=90), st.integers(10, 20))
def test_no_spike_is_lost_by_thinning(values, times):
    values = values * times
    points = [(number, step, value) for number, (step, value) in enumerate(enumerate(values), 1)]
    kept = charts.thinned(points)
    assert len(kept) <= 2 * charts.MAX_BUCKETS
    assert set(kept) <= set(points)
    assert max(p[2] for p in kept) == max(values)
    assert min(p[2] for p in kept) == min(values)
    assert [p[1] for p in kept] == sorted(p[1] for p in kept)


def test_a_checkpoint_is_marked_at_its_step():
    lines = {1: {"step": 0, "loss": 5.0}, 2: {"step": 10, "loss": 2.0}}
    page = drawn(lines, mark=5)
    [mark], (left, right) = page.of_class("mark-line"), places(page)
    assert float(mark.attributes["x1"]) == pytest.approx((left[0] + right[0]) / 2, abs=0.01)
    assert not drawn(lines, mark=11).of_class("mark-line")


@pytest.mark.parametrize(
    ("values", "scale"),
    [([0.2, 0.9], (0, 1)), ([4.4, 7.1], (0, 10)), ([81.5, 97.5], (0, 100)), ([9.5], (0, 10)), ([-3.0, 2.0], (-5, 2)),
     ([0.0], (0, 0)), ([20.0], (0, 20)), ([0.5], (0, 0.5))],
)  # fmt: skip
def test_scales_begin_at_0_and_end_at_round_numbers(values, scale):
    assert charts.scale_of(values) == pytest.approx(scale)


@given(st.lists(st.floats(-1e9, 1e9, allow_subnormal=False), min_size=1, max_size=3))
def test_a_scale_holds_its_values(values):
    low, high = charts.scale_of(values)
    assert low <= 0 <= high
    assert low * (1 + 1e-9) <= min(values)
    assert max(values) <= high * (1 + 1e-9)


def test_an_interval_is_drawn_to_scale():
    report = At({"value": 2.5, "bounds": {"low": 2.0, "high": 4.0}})
    page = Page(charts.interval(report["value"], report["bounds"], scale=(0, 5)))
    [dot], [span] = [e for e in page.elements if e.tag == "circle"], page.of_class("span")
    left, width = float(span.attributes["x"]), float(span.attributes["width"])
    assert float(dot.attributes["cx"]) == 100
    assert (left, left + width) == pytest.approx((4 + 192 * 0.4, 4 + 192 * 0.8), abs=0.02)
    assert [e.text for e in page.of_class("scale")] == ["0", "5"]


def test_bars_are_titled_and_as_high_as_their_field():
    bins = At(
        {
            "bins": [
                {"low": 0, "high": 1, "loss": 2.0},
                {"low": 2, "high": 3, "loss": 4.0},
                {"low": 4, "high": 5, "loss": None},
            ]
        }
    )
    page = Page(charts.bars(bins["bins"], "Loss", lambda one: f"{one['low']} to {one['high']}", "loss"))
    heights = [float(e.attributes["height"]) for e in page.of_class("bar")]
    assert heights == [pytest.approx(heights[1] / 2), max(heights), 0]
    assert [numbers_in(e.text)[0][0] for e in page.elements if e.tag == "title"] == [0, 2, 4]
    assert re.fullmatch(r"\d+", page.keyed[-1].text) is None or page.keyed[-1].text == "4"
