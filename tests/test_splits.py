"""A record's split depends on its content; sizes are kept to the record; overlap is counted."""

import hashlib
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from codex_accel import seeds, splits

RATIOS = {"train": 0.8, "validation": 0.15, "test": 0.05}
SHARES = st.lists(st.integers(1, 50), min_size=1, max_size=4).map(
    lambda parts: {f"s{n}": part / sum(parts) for n, part in enumerate(parts)}
)


def id_of(number: int) -> bytes:
    return hashlib.sha256(str(number).encode()).digest()[:16]


def by_hash(keys, ratios, *, seed) -> list[str]:
    number_of, names = splits.by_hash(ratios, seed=seed), list(ratios)
    return [names[number_of(key)] for key in keys]


def test_hash_split_does_not_change_between_versions():
    """Frozen from the first release: a change here moves records of every user between train and test."""
    names = by_hash([f"record {n}" for n in range(40)], RATIOS, seed=0)
    assert "".join(name[0] for name in names) == "ttttttttvtttvtttttttttttttttttvtvtvttttt"


def test_hash_split_is_the_place_of_a_derived_seed():
    edges = np.cumsum(list(RATIOS.values()))
    for key in ("", "a", "é", "record 7"):
        number = int(np.searchsorted(edges, seeds.derive(5, "split", key) / 2**63, side="right"))
        assert splits.by_hash(RATIOS, seed=5)(key) == number


def test_hash_split_shares_come_near_the_ratios():
    """10,000 ids: the standard deviation of a share is at most 0.5 %; four of them are allowed."""
    counts = Counter(by_hash([id_of(n).hex() for n in range(10_000)], RATIOS, seed=3))
    for name, share in RATIOS.items():
        assert counts[name] / 10_000 == pytest.approx(share, abs=4 * (share * (1 - share) / 10_000) ** 0.5)


def test_hash_split_depends_on_the_seed():
    keys = [str(n) for n in range(64)]
    assert by_hash(keys, {"a": 0.5, "b": 0.5}, seed=0) != by_hash(keys, {"a": 0.5, "b": 0.5}, seed=1)


@given(keys=st.lists(st.text()), ratios=SHARES)
def test_hash_split_is_one_of_the_names(keys, ratios):
    """Also where floating-point shares add up to less than 1."""
    assert all(name in ratios for name in by_hash(keys, ratios, seed=0))


@given(num=st.integers(0, 10_000), ratios=SHARES)
def test_sizes_add_up_and_are_within_one_of_the_shares(num, ratios):
    sizes = splits.sizes(num, ratios)
    assert sum(sizes.values()) == num
    assert list(sizes) == list(ratios)
    for name, share in ratios.items():
        assert sizes[name] >= 0
        assert abs(sizes[name] - share * num) <= 1 + 1e-6


def test_edges_are_where_the_next_split_begins():
    assert splits.edges(10, {"a": 0.5, "b": 0.3, "c": 0.2}) == [5, 8]


def exact(units: list[list[bytes]], ratios: dict[str, float], *, seed: int) -> list[list[int]]:
    """Numbers of the splits of the records of each unit."""
    ranks = [
        splits.ranks(np.array([int.from_bytes(id_[:8], "big") for id_ in ids], dtype=np.uint64), seed=seed)
        for ids in units
    ]
    places = [np.arange(len(ids)) for ids in units]
    cuts = splits.exact_cuts(lambda: zip(range(len(units)), ranks, places, strict=True), ratios)
    return [splits.by_cuts(ranks[unit], cuts, unit=unit, indices=places[unit]) for unit in range(len(units))]


@given(units=st.lists(st.lists(st.integers(0, 5)), max_size=4), ratios=SHARES, seed=st.integers())
def test_exact_keeps_sizes_to_the_record_with_duplicates(units, ratios, seed):
    dealt = exact([[id_of(n) for n in numbers] for numbers in units], ratios, seed=seed)
    counts = Counter(number for numbers in dealt for number in numbers)
    sizes = splits.sizes(sum(map(len, units)), ratios)
    assert [counts[number] for number in range(len(ratios))] == list(sizes.values())


@given(cut=st.integers(0, 300), seed=st.integers(0, 3))
def test_exact_split_of_a_content_does_not_depend_on_order_or_units(cut, seed):
    ids = [id_of(n) for n in range(300)]
    (whole,) = exact([ids], RATIOS, seed=seed)
    parted = exact([ids[cut:], ids[:cut]], RATIOS, seed=seed)
    assert parted == [whole[cut:], whole[:cut]]


def test_exact_split_depends_on_the_seed():
    ids = [id_of(n) for n in range(100)]
    assert exact([ids], RATIOS, seed=0) != exact([ids], RATIOS, seed=1)


def test_exact_keeps_duplicates_together_but_where_a_cut_falls():
    """90 records of 30 contents, cut in the middle: at most one content is on both sides."""
    (dealt,) = exact([[id_of(n % 30) for n in range(90)]], {"a": 0.5, "b": 0.5}, seed=0)
    sides = [{dealt[n], dealt[n + 30], dealt[n + 60]} for n in range(30)]
    assert sum(len(side) == 2 for side in sides) <= 1
    assert len(set(dealt)) == 2


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
