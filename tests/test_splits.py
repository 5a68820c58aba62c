"""A record's split depends on its content; sizes are kept to the record; overlap is counted."""

import hashlib
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from codex_accel import splits

RATIOS = {"train": 0.8, "validation": 0.15, "test": 0.05}
SHARES = st.lists(st.integers(1, 50), min_size=1, max_size=4).map(
    lambda parts: {f"s{n}": part / sum(parts) for n, part in enumerate(parts)}
)


def id_of(number: int) -> bytes:
    return hashlib.sha256(str(number).encode()).digest()[:16]


def test_hash_split_does_not_change_between_versions():
    """Frozen from the first release: a change here moves records of every user between train and test."""
    names = [splits.by_hash(f"record {n}", RATIOS, seed=0) for n in range(40)]
    assert "".join(name[0] for name in names) == "ttttttttvtttvtttttttttttttttttvtvtvttttt"


def test_hash_split_shares_come_near_the_ratios():
    """10,000 ids: the standard deviation of a share is at most 0.5 %; four of them are allowed."""
    counts = Counter(splits.by_hash(id_of(n).hex(), RATIOS, seed=3) for n in range(10_000))
    for name, share in RATIOS.items():
        assert counts[name] / 10_000 == pytest.approx(share, abs=4 * (share * (1 - share) / 10_000) ** 0.5)


def test_hash_split_depends_on_the_seed():
    names = [[splits.by_hash(str(n), {"a": 0.5, "b": 0.5}, seed=seed) for n in range(64)] for seed in (0, 1)]
    assert names[0] != names[1]


@given(keys=st.lists(st.text()), ratios=SHARES)
def test_hash_split_is_one_of_the_names(keys, ratios):
    """Also where floating-point shares add up to less than 1."""
    assert all(splits.by_hash(key, ratios, seed=0) in ratios for key in keys)


@given(num=st.integers(0, 10_000), ratios=SHARES)
def test_sizes_add_up_and_are_within_one_of_the_shares(num, ratios):
    sizes = splits.sizes(num, ratios)
    assert sum(sizes.values()) == num
    assert list(sizes) == list(ratios)
    for name, share in ratios.items():
        assert sizes[name] >= 0
        assert abs(sizes[name] - share * num) <= 1 + 1e-6


def test_position_keeps_the_order():
    assert splits.by_position(10, {"a": 0.5, "b": 0.3, "c": 0.2}) == ["a"] * 5 + ["b"] * 3 + ["c"] * 2


@given(numbers=st.lists(st.integers(0, 5)), ratios=SHARES, seed=st.integers())
def test_exact_keeps_sizes_to_the_record_with_duplicates(numbers, ratios, seed):
    names = splits.exact([id_of(n) for n in numbers], ratios, seed=seed)
    counts = Counter(names)
    assert {name: counts[name] for name in ratios} == splits.sizes(len(numbers), ratios)


def test_exact_split_of_a_content_does_not_depend_on_the_order():
    ids = [id_of(n) for n in range(100)]
    forward, backward = splits.exact(ids, RATIOS, seed=0), splits.exact(ids[::-1], RATIOS, seed=0)
    assert forward == backward[::-1]
    assert forward != splits.exact(ids, RATIOS, seed=1)


def test_exact_split_spreads_duplicates():
    """50 records of one content and 50 of another: each half gets some of both."""
    names = splits.exact([id_of(n % 2) for n in range(100)], {"a": 0.5, "b": 0.5}, seed=0)
    assert 10 < names[::2].count("a") < 40


@given(text=st.text(max_size=200), ratios=SHARES)
def test_cut_text_joins_back(text, ratios):
    pieces = splits.cut_text(text, ratios)
    assert "".join(pieces.values()) == text
    assert {name: len(piece) for name, piece in pieces.items()} == splits.sizes(len(text), ratios)


def test_cut_text_of_shakespeare_is_the_published_cut(shared):
    """nanoGPT data/shakespeare_char/readme.md: 1,003,854 and 111,540 characters; it cuts off where this rounds (.6)."""
    text = (shared / "text" / "tinyshakespeare.txt").read_text()
    pieces = splits.cut_text(text, {"train": 0.9, "validation": 0.1})
    assert {name: len(piece) for name, piece in pieces.items()} == {"train": 1_003_855, "validation": 111_539}


@given(numbers=st.dictionaries(st.sampled_from("abcd"), st.lists(st.integers(0, 9), max_size=12), min_size=1))
def test_membership_counts_are_those_of_brute_force(numbers):
    ids = {name: [id_of(n) for n in values] for name, values in numbers.items()}
    facts = splits.membership({name: b"".join(values) for name, values in ids.items()})
    for name, values in ids.items():
        others = {id_ for other, found in ids.items() if other != name for id_ in found}
        assert facts[name] == {
            "num_records": len(values),
            "num_duplicates": len(values) - len(set(values)),
            "num_shared": sum(id_ in others for id_ in values),
            "members_sha256": hashlib.sha256(b"".join(sorted(values))).hexdigest(),
        }
