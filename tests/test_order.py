"""The order of the sequences is a pure function of the step."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from codex_accel import seeds
from codex_accel.order import batch, permute

SEEDS = st.integers(min_value=-(2**63), max_value=2**63)


@settings(max_examples=60)
@given(num_items=st.integers(1, 3000), seed=SEEDS, epoch=st.integers(0, 10**6))
def test_order_of_an_epoch_is_a_permutation(num_items, seed, epoch):
    items = permute(np.arange(num_items), num_items, seed=seed, epoch=epoch)
    assert items.dtype == np.int64
    assert np.array_equal(np.sort(items), np.arange(num_items))


@pytest.mark.parametrize("num_items", [1, 2, 3, 4, 5, 15, 16, 17, 255, 256, 257, 65535, 65536, 65537])
def test_order_is_a_permutation_around_powers_of_two(num_items):
    items = permute(np.arange(num_items), num_items, seed=0, epoch=0)
    assert np.array_equal(np.sort(items), np.arange(num_items))


@settings(max_examples=50)
@given(
    num_sequences=st.integers(1, 300),
    seed=SEEDS,
    one=st.integers(1, 40),
    other=st.integers(1, 40),
    step=st.integers(0, 50),
)
def test_batches_cut_the_same_endless_order_whatever_their_size(num_sequences, seed, one, other, step):
    def row(size: int, start: int, stop: int) -> np.ndarray:
        steps = range(start // size, -(-stop // size))
        parts = [batch(s, num_sequences=num_sequences, global_batch_size=size, seed=seed) for s in steps]
        offset = start - (start // size) * size
        return np.concatenate(parts)[offset : offset + stop - start]

    start, stop = step * one, (step + 1) * one
    indices = batch(step, num_sequences=num_sequences, global_batch_size=one, seed=seed)
    assert indices.shape == (one,)
    assert np.array_equal(indices, row(other, start, stop))


@pytest.mark.parametrize(("num_sequences", "size"), [(10, 4), (7, 7), (3, 10), (1, 5), (12, 5)])
def test_every_epoch_visits_each_sequence_once(num_sequences, size):
    epochs = 6
    steps = -(-num_sequences * epochs // size)
    row = np.concatenate([batch(s, num_sequences=num_sequences, global_batch_size=size, seed=3) for s in range(steps)])
    for epoch in row[: num_sequences * epochs].reshape(epochs, num_sequences):
        assert sorted(epoch) == list(range(num_sequences))


def test_batch_is_the_permutation_of_its_epoch():
    """Sequences 8 to 11 of 10: the last two of epoch 0 and the first two of epoch 1."""
    first = permute(np.arange(10), 10, seed=5, epoch=0)
    second = permute(np.arange(10), 10, seed=5, epoch=1)
    expected = [*first[8:], *second[:2]]
    assert batch(2, num_sequences=10, global_batch_size=4, seed=5).tolist() == expected


def test_a_place_alone_gives_what_the_whole_order_gives():
    whole = permute(np.arange(1000), 1000, seed=9, epoch=4)
    alone = [int(permute(np.array([place]), 1000, seed=9, epoch=4)[0]) for place in range(0, 1000, 37)]
    assert alone == whole[::37].tolist()


def test_order_stays_what_it_was():
    """A changed order would break the resume of every run on disk. Golden: a second implementation in plain
    Python integers, below, and the first numbers that it gave on 2026-11-22."""

    def mix(value: int, key: int) -> int:
        z = (value + key) % 2**64
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        return z ^ (z >> 31)

    num_items, half, mask = 100, 4, 15  # 99 has seven bits: two halves of four
    keys = [seeds.derive(42, "order", 3, index) for index in range(6)]
    expected = []
    for place in range(num_items):
        value = place
        while True:
            left, right = value >> half, value & mask
            for key in keys:
                left, right = right, left ^ (mix(right, key) & mask)
            value = (left << half) | right
            if value < num_items:
                break
        expected.append(value)
    assert permute(np.arange(num_items), num_items, seed=42, epoch=3).tolist() == expected
    assert expected[:8] == [67, 42, 75, 61, 58, 65, 99, 51]


def test_seed_and_epoch_change_the_order():
    orders = [permute(np.arange(50), 50, seed=seed, epoch=epoch) for seed in range(8) for epoch in range(8)]
    assert len({tuple(order) for order in orders}) == 64


@pytest.mark.parametrize("num_items", [2, 3, 17])
def test_every_item_comes_to_every_place_equally_often(num_items):
    """Over 400 epochs each count is binomial; 6 standard deviations are passed by chance once in 10**9 counts."""
    epochs = 400
    counts = np.zeros((num_items, num_items))
    for epoch in range(epochs):
        counts[np.arange(num_items), permute(np.arange(num_items), num_items, seed=0, epoch=epoch)] += 1
    share = 1 / num_items
    assert np.abs(counts - epochs * share).max() < 6 * np.sqrt(epochs * share * (1 - share))


def test_neighbours_do_not_stay_neighbours():
    """In a random order of n, two given items stand side by side once in n/2: some 2 of 10,000 pairs, not hundreds."""
    items = permute(np.arange(10_000), 10_000, seed=0, epoch=0)
    assert (np.abs(np.diff(items)) == 1).sum() < 20


def test_a_late_batch_costs_no_more_than_the_first():
    """Step 10**11 of a billion sequences: a shuffled array would need 8 GB and minutes; here it is milliseconds."""
    started = time.process_time()
    indices = batch(10**11, num_sequences=10**9, global_batch_size=256, seed=0)
    assert time.process_time() - started < 0.5
    assert indices.min() >= 0
    assert indices.max() < 10**9
    assert len(set(indices.tolist())) == 256


def test_no_sequences_is_our_own_error():
    with pytest.raises(ValueError, match="at least 1"):
        permute(np.arange(0), 0, seed=0, epoch=0)
