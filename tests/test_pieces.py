"""Sentencepiece models: what is drawn to estimate them, and the tokenizer that repeats them."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from codex_accel import pieces, vocabulary
from codex_accel.errors import UserError
from codex_accel.schema import Source, SpecialTokens, TokenizerConfig

# --- what it is estimated from ------------------------------------------------------------------------------------


def test_lines_are_sentences_without_what_sentencepiece_keeps_for_itself():
    """Without the guard it would take a tab for the end of a sentence, and 8,192 characters as the most."""
    texts = ["a b\tc\r\n\x00d\u2585", "", "x" * 8193]
    assert list(pieces.sentences_of(texts)) == ["a b", "c", "d", "x" * 8192, "x"]


@given(sentences=st.lists(st.text(min_size=1, max_size=9)), limit=st.integers(1, 60), seed=st.integers(0, 3))
def test_drawn_sentences_stay_in_order_and_within_the_bound(sentences, limit, seed):
    drawn, facts = pieces.draw(iter(sentences), max_bytes=limit, seed=seed)
    rest = iter(sentences)
    assert all(sentence in rest for sentence in drawn)  # a subsequence
    size = sum(len(sentence.encode()) for sentence in drawn)
    assert size <= limit
    assert facts["bytes_left_out"] == sum(len(sentence.encode()) for sentence in sentences) - size
    assert (facts["num_lines"], facts["num_lines_left_out"]) == (len(sentences), len(sentences) - len(drawn))
    assert pieces.draw(iter(sentences), max_bytes=limit, seed=seed)[0] == drawn


def test_the_draw_depends_on_the_seed_and_not_on_the_place():
    """A third of a thousand sentences: each third of the input gives about a third of them."""
    sentences = [f"{number:04d}" for number in range(999)]
    drawn = {seed: pieces.draw(sentences, max_bytes=4 * 333, seed=seed)[0] for seed in (0, 1)}
    assert drawn[0] != drawn[1]
    shares = Counter(int(sentence) // 333 for sentence in drawn[0])
    assert len(drawn[0]) == 333
    assert min(shares.values()) > 80


# --- the model ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["e", "<0x41>"])
def test_special_token_that_sentencepiece_has_already_is_refused(name):
    special = SpecialTokens(additional=[name])
    settings = TokenizerConfig(output_dir="o", sources=[Source(path="x")], type="sentencepiece", special_tokens=special)
    with pytest.raises(UserError, match=f"special_tokens: '{name}' is a character of the data or a byte already"):
        vocabulary.train(settings, ["hello"] * 9)
