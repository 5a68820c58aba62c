"""Which sequences form the batch of a step: a pure function of (seed, number of sequences, batch size, step).

Rule: the order is an endless concatenation of seeded permutations of the sequences, one an epoch, cut into batches. It
has no state, costs the same at any step, and does not know how many processes share a batch.

Each permutation is a Feistel network over the smallest even number of bits that holds the index, walked in cycles
until the value is in range (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002): the value at a place is
computed alone, where a shuffled array would cost memory and time in proportion to the data.
"""

import numpy as np

from codex_accel import seeds

ROUNDS = 6


def _mix(values: np.ndarray, key: np.uint64) -> np.ndarray:
    """splitmix64's finaliser (Steele, Lea and Flood 2014) of `values` + `key`; uint64 arithmetic wraps."""
    z = values + key
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def permute(places: np.ndarray, num_items: int, *, seed: int, epoch: int) -> np.ndarray:
    """The items (int64, same shape) at `places` of the permutation of range(num_items) that belongs to `epoch`."""
    if num_items < 1:
        raise ValueError("num_items must be at least 1")
    half = np.uint64(max(1, (max(num_items - 1, 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    keys = [np.uint64(seeds.derive(seed, "order", epoch, index)) for index in range(ROUNDS)]
    values = places.astype(np.uint64)
    outside = np.ones(values.shape, dtype=bool)
    while outside.any():
        moving = values[outside]
        left, right = moving >> half, moving & mask
        for key in keys:
            left, right = right, left ^ (_mix(right, key) & mask)
        values[outside] = (left << half) | right
        outside = values >= np.uint64(num_items)
    return values.astype(np.int64)


def batch(step: int, *, num_sequences: int, global_batch_size: int, seed: int) -> np.ndarray:
    """Indices of the sequences of optimizer step `step` (counted from 0), int64, shape (global_batch_size,)."""
    places = np.arange(step * global_batch_size, (step + 1) * global_batch_size, dtype=np.int64)
    epochs, within = np.divmod(places, num_sequences)
    indices = np.empty_like(places)
    for epoch in np.unique(epochs):
        chosen = epochs == epoch
        indices[chosen] = permute(within[chosen], num_sequences, seed=seed, epoch=int(epoch))
    return indices
