"""Every random draw is named after the seed and its purpose."""

import hashlib

from hypothesis import given
from hypothesis import strategies as st

from codex_accel.seeds import derive

NAMES = st.lists(st.one_of(st.text(st.characters(exclude_categories=["Cs"])), st.integers()), max_size=4)


def test_derive_is_the_head_of_a_sha256():
    """Golden: `printf '\\0\\0\\0\\0010' | sha256sum` (GNU coreutils): its first 16 digits, halved, are the seed."""
    assert derive(0) == 0xAB544D1A0652D5AD >> 1


def test_derive_writes_the_length_before_each_part():
    """By hand: (7, "dropout", 12) is 1 byte "7", 7 bytes "dropout", 2 bytes "12", each after its length in 4 bytes."""
    text = b"\0\0\0\x017" + b"\0\0\0\x07dropout" + b"\0\0\0\x0212"
    assert derive(7, "dropout", 12) == int(hashlib.sha256(text).hexdigest()[:16], 16) // 2


@given(seed=st.integers(), names=NAMES)
def test_seed_fits_63_bits_and_repeats(seed, names):
    assert 0 <= derive(seed, *names) < 2**63
    assert derive(seed, *names) == derive(seed, *names)


@given(first=NAMES, second=NAMES)
def test_different_names_give_different_seeds(first, second):
    same = [str(part) for part in first] == [str(part) for part in second]
    assert (derive(0, *first) == derive(0, *second)) is same


def test_where_one_name_ends_matters():
    assert len({derive(0, "ab", "c"), derive(0, "a", "bc"), derive(0, "abc"), derive(0, "abc", "")}) == 4
    assert derive(0, 1, 11) != derive(0, 11, 1)


def test_each_seed_has_its_own_draws():
    assert len({derive(seed, "dropout", step) for seed in range(50) for step in range(50)}) == 2500
