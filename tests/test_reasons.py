"""A reason names what can be named and no more."""

import pytest

from codex_accel import reasons


@pytest.mark.security
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("text", "'text'"),
        ("input_text-2 b", "'input_text-2 b'"),
        ("größe", "'größe'"),
        ("question_2", "'question_2'"),
        ("x" * 16, repr("x" * 16)),
        ("x" * 17, "a name of 17 characters"),
        (" ".join(["abc"] * 8), repr(" ".join(["abc"] * 8))),
        (" ".join(["abc"] * 9), "a name of 35 characters"),
        ("AKIAIOSFODNN7EXAMPLE", "a name of 20 characters"),  # a key of AWS, from its documentation
        ("a1 b1 c1 d1", "a name of 11 characters"),
        ("ab1234", "a name of 6 characters"),
        ("a@b.c", "a name of 5 characters"),
        ("a\nb", "a name of 3 characters"),
        ("\ud800", "a name of 1 characters"),
        ("", "a name of 0 characters"),
    ],
)
def test_only_plain_short_names_are_repeated(name, expected):
    assert reasons.shown(name) == expected
