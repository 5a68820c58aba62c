"""What is hidden in a text, and how it is shown."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from codex_accel.visible import escaped, is_hidden


@pytest.mark.security
@given(st.characters(categories=("Cc", "Cf", "Cs", "Zl", "Zp"), exclude_characters="\u200c\u200d"))
def test_what_commands_a_display_is_hidden_and_its_escape_is_not(character):
    """The escape is what Python reads as the same character."""
    assert is_hidden(character)
    shown = escaped(character)
    assert not any(map(is_hidden, shown))
    assert eval(f'"{shown}"') == character


@given(st.text(st.characters(exclude_categories=("Cc", "Cf", "Cs", "Zl", "Zp")) | st.sampled_from("\u200c\u200d")))
def test_all_else_stays_as_it_is(text):
    """Letters, spaces of any width, combining marks, private use, and the joiners."""
    assert escaped(text) == text


@pytest.mark.parametrize(
    "text", ["एक\u200dदो", "می\u200cخواهم", "👩\u200d💻", "全\u3000角", "a\u00a0b", "e\u0301", "\ue000"]
)
def test_text_of_the_world_is_shown_as_it_is(text):
    assert escaped(text) == text


@pytest.mark.security
@pytest.mark.parametrize("character", "\x1b\x07\r\x7f\x9b\u202e\u2066\u200f\u2028\u2029\u00ad\ufeff\U000e0041\ud800")
def test_a_character_of_an_attack_is_hidden(character):
    assert is_hidden(character), unicodedata.category(character)


def test_kept_characters_stay():
    assert escaped("a\tb\n\x1b[2J\r", kept="\n\t") == "a\tb\n\\x1b[2J\\r"
    assert escaped("a\tb\n") == "a\\tb\\n"
