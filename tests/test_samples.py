"""What the lines of samples.ndjson tell together."""

import tracemalloc
from collections.abc import Iterator
from itertools import pairwise

import evaluations
import pytest
from evaluations import choice_line, loss_line, text_line
from hypothesis import given
from hypothesis import strategies as st

from codex_accel import report_page, samples
from codex_accel.samples import MOST_SHOWN, Overview

NUMBERS = st.floats(allow_nan=False, allow_infinity=False)


def overview(lines) -> Overview:
    found = Overview()
    for number, line in enumerate(lines, 1):
        found.add(number, line)
    return found


def with_scores(*scores: dict) -> list[dict]:
    return [text_line(number, "x", ["y"], scores=each) for number, each in enumerate(scores, 1)]


# ----------------------------------------------------------------------------------------------------------------- bins


@given(st.lists(NUMBERS, max_size=60))
def test_every_value_is_counted_in_one_bin(values):
    bins = samples.bins(values)
    assert sum(one["count"] for one in bins) == len(values)
    if values:
        assert bins[0]["low"] <= min(values)
        assert max(values) <= bins[-1]["high"]
    for one, following in pairwise(bins):
        assert one["low"] <= one["high"] <= following["low"]


@given(st.lists(st.floats(0, 1), min_size=9, max_size=60, unique=True))
def test_a_bin_holds_its_lower_end_and_the_last_its_upper_end_too(values):
    bins = samples.bins(values)
    assert [(one["low"], one["high"]) for one in bins] == [
        (round(n / 20, 2), round((n + 1) / 20, 2)) for n in range(20)
    ]
    for number, one in enumerate(bins):
        last = number == len(bins) - 1
        assert one["count"] == sum(one["low"] <= v < one["high"] or (last and v == one["high"]) for v in values)


def test_ranges_have_round_ends():
    bins = samples.bins([2.1, 2.2, 2.3, 3.3, 4.4, 5.5, 6.6, 7.7, 8.8])
    assert [one["low"] for one in bins] == [2 + number / 2 for number in range(14)]
    assert bins[0]["count"] == 3


def test_few_values_have_a_bin_each():
    assert samples.bins([1, 0, 1]) == [{"low": 0.0, "high": 0.0, "count": 1}, {"low": 1.0, "high": 1.0, "count": 2}]
    assert samples.bins([]) == []


# ----------------------------------------------------------------------------------------------------------------- ends


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=60))
def test_the_ends_are_those_of_all_lines_sorted(scores):
    """By the first score, then the next, then the line; no line is at both ends."""
    ends = overview(with_scores(*({"a": a, "b": b} for a, b in scores))).of()["ends"]
    order = sorted(range(1, len(scores) + 1), key=lambda line: (scores[line - 1], line))
    half = len(scores) // 2
    assert ends["lowest"] == order[: min(MOST_SHOWN, len(scores) - half)]
    assert [scores[line - 1] for line in ends["highest"]] == sorted(scores, reverse=True)[: min(MOST_SHOWN, half)]
    assert not set(ends["lowest"]) & set(ends["highest"])


def test_of_many_lines_only_those_at_the_ends_are_kept():
    values = [(number * 7919) % 10_007 for number in range(10_000)]
    found = overview(with_scores(*({"f1": value} for value in values)))
    ends = found.of()["ends"]
    assert [values[line - 1] for line in ends["lowest"]] == sorted(values)[:MOST_SHOWN]
    assert [values[line - 1] for line in ends["highest"]] == sorted(values, reverse=True)[:MOST_SHOWN]
    assert set(found.shown()) == {*ends["lowest"], *ends["highest"]}


def test_a_sample_without_a_score_is_counted_and_at_no_end():
    found = overview(with_scores({"f1": 0.5}, {"f1": None}, {"f1": 0.25}, {"f1": 1.0})).of()
    assert found["distributions"]["f1"] == {"num_samples": 3, "num_without": 1, "bins": samples.bins([0.5, 0.25, 1])}
    assert found["ends"] == {"ordered_by": ["f1"], "lowest": [3, 1], "highest": [4]}


def test_of_equal_choices_the_surest_wrong_one_is_the_lowest():
    wrong_by = [1.0, 5.0, 0.5]
    lines = [choice_line(n, [-10.0 - by, -10.0], 0, scores={"acc": 0.0}) for n, by in enumerate(wrong_by, 1)]
    ends = overview([*lines, choice_line(4, [-1.0, -9.0], 0, scores={"acc": 1.0})]).of()["ends"]
    assert ends == {"ordered_by": ["acc", "margin"], "lowest": [2, 1], "highest": [4, 3]}


def test_tasks_are_apart():
    lines = [text_line(n, "x", ["y"], task="ab"[n % 2], scores={"f1": n / 4}) for n in range(4)]
    found = overview(lines)
    assert found.of("a")["ends"]["lowest"] == [1]
    assert found.of("b")["ends"]["highest"] == [4]
    assert found.of("c")["num_samples"] == 0


def test_of_long_texts_no_more_is_held_than_a_page_shows():
    """300 lines of 180 kB, of which a page can show up to 8 kB each."""

    def lines() -> Iterator[dict]:
        for n in range(300):
            yield text_line(n, "o" * 60_000, ["r" * 60_000], prompt="p" * 60_000, scores={"f1": n})

    tracemalloc.start()
    try:
        overview(lines())
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 5_000_000


def test_a_page_of_what_is_held_is_that_of_the_whole_lines():
    long = ["x" * length for length in (1999, 2000, 2001, 2002, 5000)]
    lines = [text_line(n, text, [text] * (19 + n), prompt=text) for n, text in enumerate(long)]
    choices = [choice_line(n, [-1.0, -2.0], 0, choices=[text, "y"], prompt=text) for n, text in enumerate(long)]
    many = [choice_line(9, [-float(n) for n in range(30, 0, -1)], 28)]
    document, lines = evaluations.of_tasks(
        {
            "text": ("generate", lines, {"exact_match": {}}),
            "choice": ("choice", choices + many, {"acc": {}}),
        }
    )
    found = overview(lines)
    document["overview"] = {task: found.of(task) for task in ("text", "choice")}
    shown = report_page.render(document, lines=found.shown())
    assert shown == report_page.render(document, lines={n: lines[n - 1] for n in found.shown()})
    assert shown.count("and more, left out here") > 10
    assert len(found.shown()) == len(lines)


# ------------------------------------------------------------------------------------------------------ losses, skipped


def test_loss_by_length_weighs_every_target_once():
    lines = [
        loss_line(1, 5, 2.0),
        loss_line(2, 7, 4.0),
        loss_line(3, 8, 1.0),
        loss_line(4, 1, 0.0),
        loss_line(5, 0, 0.0),
    ]
    found = overview(lines).of()
    assert found["loss_by_length"] == [
        {"low": 0, "high": 0, "num_documents": 1, "num_target_tokens": 0, "loss": None},
        {"low": 1, "high": 1, "num_documents": 1, "num_target_tokens": 0, "loss": None},
        {"low": 4, "high": 7, "num_documents": 2, "num_target_tokens": 10, "loss": pytest.approx((4 * 2 + 6 * 4) / 10)},
        {"low": 8, "high": 15, "num_documents": 1, "num_target_tokens": 7, "loss": 1.0},
    ]
    assert found["ends"] == {"ordered_by": ["loss"], "lowest": [3, 1], "highest": [2]}


def test_skipped_lines_are_counted_and_the_first_are_named():
    lines = [{"task": None, "line": n, "skipped": "no prediction"} for n in range(1, 31)]
    found = overview([*with_scores({"f1": 1.0}), *lines])
    assert found.of()["skipped"] == {"num_samples": 30, "first": list(range(2, 2 + MOST_SHOWN))}
    assert found.of()["num_samples"] == 1
    assert found.shown()[2] == lines[0]


def test_a_question_with_one_choice_can_be_ordered():
    found = overview([choice_line(n, [-3.0], 0, scores={"acc": 1.0}) for n in (1, 2)])
    assert found.of()["ends"] == {"ordered_by": ["acc", "margin"], "lowest": [1], "highest": [2]}
