"""How a page of ours shows values and text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from web_page import HOSTILE, Page

from codex_accel import page
from codex_accel.page import At


@pytest.mark.parametrize(
    ("value", "is_share", "text"),
    [
        (0, False, "0"), (999, False, "999"), (1234567, False, "1,234,567"), (None, False, "none"),
        (3.47812, False, "3.478"), (0.8, False, "0.8"), (12345.6, False, "12,346"), (100.0, False, "100"),
        (0.0, True, "0 %"), (1.0, True, "100 %"), (0.123456, True, "12.35 %"), (1.6e-7, True, "0.000016 %"),
        (-0.0312345, False, "-0.03123"), (3e-9, False, "3.000e-09"), (2.5e300, False, "2.500e+300"),
    ],
)  # fmt: skip
def test_amounts_are_written_in_one_way(value, is_share, text):
    assert page.amount_text(value, is_share=is_share) == text


@given(st.floats(-1e300, 1e300))
def test_an_amount_is_right_at_the_fourth_digit(value):
    assert float(page.amount_text(value).replace(",", "")) == pytest.approx(value, rel=0.0005)


@given(st.text(st.characters(), max_size=40) | st.just(HOSTILE))
def test_kept_characters_stay_and_all_others_of_control_become_labels(text):
    shown = page.visible(text, kept="\n\t")
    shown.encode()
    [box] = [e for e in Page(f"<p>{shown}</p>").elements if e.tag == "p"]
    assert box.text.count("\n") == text.count("\n")
    assert box.text.count("\t") == text.count("\t")
    assert not set(box.text) & set("\x00\x07\x1b\u202e\u202c\ufeff\u2028\x85\r")


def test_a_place_is_found_or_is_none():
    at = At({"a": {"b.c": 1}})
    assert at.get("x") is None
    assert at.get("a").get("b.c") == At(1, "a.b\\.c")
    assert "a" in at
    assert "x" not in at
