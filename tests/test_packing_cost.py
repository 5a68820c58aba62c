"""What a packing would cost is what it does cost."""

import time

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_tokens import document, written

from codex_accel import packing_cost
from codex_accel.packing import Blocks
from codex_accel.tokens import TokenStore

SIZES = st.integers(1, 12)
LENGTHS = st.lists(st.integers(0, 40), max_size=40)


def histogram_of(lengths) -> tuple[np.ndarray, np.ndarray]:
    distinct, counts = np.unique(np.asarray(lengths, dtype=np.int64), return_counts=True)
    return distinct, counts


def in_chunks(lengths, size: int) -> list[np.ndarray]:
    return [np.asarray(lengths[start : start + size], dtype=np.int64) for start in range(0, len(lengths), size)]


def cut(lengths, block_size: int) -> list[int]:
    """Lengths of the pieces of all documents, from the longest on."""
    pieces = [min(block_size, length - start) for length in lengths for start in range(0, length, block_size)]
    return sorted(pieces, reverse=True)


@settings(max_examples=60)
@given(
    lengths=st.lists(st.integers(0, 30), min_size=1, max_size=12).filter(any),
    block_size=st.integers(1, 9),
    chunk=st.integers(1, 5),
)
def test_concat_costs_what_the_blocks_of_a_real_store_count(tmp_path_factory, lengths, block_size, chunk):
    folder = written(tmp_path_factory.mktemp("store"), [document(range(length)) for length in lengths])
    facts = Blocks(TokenStore(folder, "train"), block_size=block_size, isolate_documents=True).facts()
    found = packing_cost.concat(in_chunks(lengths, chunk), block_size=block_size)
    assert found == {key: facts[key] for key in ("num_blocks", "padding_tokens", "documents_cut")}


def test_concat_holds_one_chunk_at_a_time():
    """Each chunk is spoilt once the next is asked for, so a reader that kept it would count other lengths."""

    def chunks():
        buffer = np.empty(3, dtype=np.int64)
        for start in range(0, 30, 3):
            buffer[:] = range(start, start + 3)
            yield buffer
            buffer[:] = 999

    assert packing_cost.concat(chunks(), block_size=7) == packing_cost.concat([np.arange(30)], block_size=7)


def best_fit_by_hand(lengths, block_size: int) -> list[int]:
    """Room left in each block: one piece after the other, each into the fullest block that has room for it."""
    rooms: list[int] = []
    for piece in cut(lengths, block_size):
        fitting = [index for index, room in enumerate(rooms) if room >= piece]
        if fitting:
            rooms[min(fitting, key=rooms.__getitem__)] -= piece
        else:
            rooms.append(block_size - piece)
    return rooms


FEW_LENGTHS = st.dictionaries(st.integers(1, 40), st.integers(1, 9), max_size=6).map(
    lambda counts: [length for length, count in counts.items() for _ in range(count)]
)


@settings(max_examples=300)
@given(lengths=LENGTHS | FEW_LENGTHS, block_size=st.integers(1, 40))
@example(lengths=[8, 8, 3, 3, 2, 2, 2, 2], block_size=15)  # the 3s go into one block of room 7, so a 2 needs a third
def test_best_fit_costs_what_placing_each_document_does(lengths, block_size):
    rooms, num_over_long = best_fit_by_hand(lengths, block_size), sum(length > block_size for length in lengths)
    assert packing_cost.best_fit(*histogram_of(lengths), block_size=block_size) == {
        "num_blocks": len(rooms),
        "padding_tokens": sum(rooms),
        "num_over_long": num_over_long,
        "documents_cut": num_over_long,
    }


@pytest.mark.parametrize("seed", range(3))
def test_best_fit_of_many_lengths_costs_what_placing_each_document_does(seed):
    """Log-normal lengths, as text has them, in blocks large enough that most rooms differ."""
    lengths = np.random.default_rng(seed).lognormal(4, 1, 1500).astype(np.int64)
    found = packing_cost.best_fit(*histogram_of(lengths), block_size=512)
    rooms = best_fit_by_hand(lengths.tolist(), 512)
    assert (found["num_blocks"], found["padding_tokens"]) == (len(rooms), sum(rooms))


def test_best_fit_of_ten_million_documents_is_quick():
    """Measured here: 0.01 s; placing documents one by one takes minutes."""
    lengths = np.arange(1, 20_001)
    counts = np.full(len(lengths), 500)
    start = time.process_time()
    found = packing_cost.best_fit(lengths, counts, block_size=4096)
    assert time.process_time() - start < 1
    assert found["padding_tokens"] == found["num_blocks"] * 4096 - 500 * 20_000 * 20_001 // 2


@settings(max_examples=300)
@given(lengths=LENGTHS, block_size=SIZES, batch_size=st.integers(1, 9))
def test_group_by_length_costs_what_padding_each_batch_does(lengths, block_size, batch_size):
    pieces = cut(lengths, block_size)
    batches = [pieces[start : start + batch_size] for start in range(0, len(pieces), batch_size)]
    num_over_long = sum(length > block_size for length in lengths)
    found = packing_cost.group_by_length(*histogram_of(lengths), block_size=block_size, batch_size=batch_size)
    assert found == {
        "num_batches": len(batches),
        "padding_tokens": sum(len(batch) * max(batch) - sum(batch) for batch in batches),
        "num_over_long": num_over_long,
        "documents_cut": num_over_long,
    }


@given(lengths=LENGTHS.filter(any), chunk=st.integers(1, 50))
def test_costs_are_those_of_each_packing_and_block_size(lengths, chunk):
    found = packing_cost.costs(*histogram_of(lengths), iter(in_chunks(lengths, chunk)), block_sizes=(4, 16))
    assert list(found) == ["4", "16"]
    for size, packings in found.items():
        expected = {
            "concat": packing_cost.concat([np.array(lengths)], block_size=int(size)),
            "best_fit": packing_cost.best_fit(*histogram_of(lengths), block_size=int(size)),
            "group_by_length": packing_cost.group_by_length(*histogram_of(lengths), block_size=int(size)),
        }
        fractions = {name: cost.pop("padding_fraction") for name, cost in packings.items()}
        assert packings == expected
        for name, cost in expected.items():
            num_fed = sum(lengths) - (name == "concat")  # there the last token of the row is a label only
            assert fractions[name] == cost["padding_tokens"] / (num_fed + cost["padding_tokens"])


def test_share_of_padding_by_hand():
    """Lengths 5, 3, 3 in blocks of 8: best fit fills 5 + 3 and 3 of 8; a batch of three is padded to 5 each."""
    found = packing_cost.costs(*histogram_of([5, 3, 3]), [np.array([5, 3, 3])], block_sizes=[8])["8"]
    assert found["concat"] == {"num_blocks": 2, "padding_tokens": 6, "documents_cut": 0, "padding_fraction": 6 / 16}
    assert (found["best_fit"]["num_blocks"], found["best_fit"]["padding_fraction"]) == (2, 5 / 16)
    assert (found["group_by_length"]["num_batches"], found["group_by_length"]["padding_fraction"]) == (1, 4 / 15)


def test_nothing_to_feed_has_no_share_of_padding():
    found = packing_cost.costs(*histogram_of([0, 0]), [np.zeros(2, dtype=np.int64)])
    assert found["512"]["best_fit"]["padding_fraction"] is None
    assert found["512"]["group_by_length"]["padding_fraction"] is None


@given(lengths=st.lists(st.integers(0, 99), min_size=1, max_size=300))
def test_percentile_is_the_shortest_length_that_so_many_do_not_exceed(lengths):
    found = packing_cost.percentiles(*histogram_of(lengths))
    assert (found["min"], found["max"]) == (min(lengths), max(lengths))
    for percent in (1, 10, 50, 90, 99):
        reached = [x for x in sorted(lengths) if sum(y <= x for y in lengths) * 100 >= percent * len(lengths)]
        assert found[f"p{percent}"] == reached[0]


def test_percentiles_are_numpys_inverted_cdf():
    lengths = np.random.default_rng(0).lognormal(5, 1, 12_345).astype(np.int64)
    expected = np.percentile(lengths, [0, 1, 10, 50, 90, 99, 100], method="inverted_cdf")
    assert list(packing_cost.percentiles(*histogram_of(lengths)).values()) == expected.tolist()


def test_no_documents_have_no_percentiles_and_no_bins():
    nothing = np.zeros(0, dtype=np.int64)
    assert set(packing_cost.percentiles(nothing, nothing).values()) == {None}
    assert packing_cost.histogram(nothing, nothing) == []


@given(lengths=st.lists(st.integers(0, 10**6) | st.integers(0, 300), min_size=1, max_size=50))
def test_bins_hold_every_document_once(lengths):
    bins = packing_cost.histogram(*histogram_of(lengths))
    assert len(bins) <= packing_cost.MAX_BINS
    assert bins[0]["low"] <= min(lengths) <= bins[0]["high"]
    assert bins[-1]["low"] <= max(lengths) <= bins[-1]["high"]
    for one in bins:
        assert one["count"] == sum(one["low"] <= length <= one["high"] for length in lengths)
    assert [one["high"] + 1 for one in bins[:-1]] == [one["low"] for one in bins[1:]]


@pytest.mark.parametrize(("shortest", "longest"), [(1, 512), (20, 900), (30, 20_000), (1, 500_000)])
def test_there_are_enough_bins_to_see_a_shape(shortest, longest):
    assert 12 <= len(packing_cost.histogram(np.array([shortest, longest]), np.array([1, 1]))) <= 24
