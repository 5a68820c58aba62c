"""Rows leave and join a cache, columns of padding go, and what is kept stays what it was."""

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, MambaConfig, MistralConfig

from codex_accel.row_cache import ROOM, RowCache

SHAPE = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "hidden_size": 8}
FULL, SLIDING = LlamaConfig(**SHAPE), MistralConfig(**SHAPE, sliding_window=6)


def states(rows: int, columns: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    keys, values = torch.randn(2, rows, 2, columns, 4, generator=torch.Generator().manual_seed(seed))
    return keys, values


def fill(cache: DynamicCache, rows: int, columns: list[int], seed: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Put so many columns in, call by call; returns what each call of the second layer gave back."""
    given = [states(rows, number, seed + call) for call, number in enumerate(columns)]
    for pair in given:
        cache.update(*pair, 0)
    return [tuple(x.clone() for x in cache.update(*pair, 1)) for pair in given]


def held(cache: DynamicCache) -> list[torch.Tensor]:
    return [x for layer in cache.layers for x in (layer.keys, layer.values)]


@pytest.mark.parametrize("config", [FULL, SLIDING], ids=["full", "sliding"])
def test_it_gives_what_the_cache_of_transformers_gives(config):
    columns = [5, *[1] * (2 * ROOM), 3, 1]
    ours, theirs = RowCache(config), DynamicCache(config=config)
    for a, b in zip(fill(ours, 3, columns), fill(theirs, 3, columns), strict=True):
        assert torch.equal(a[0], b[0])
        assert torch.equal(a[1], b[1])
    assert ours.num_columns == theirs.get_seq_length() == sum(columns)
    assert ours.get_mask_sizes(1, 1) == theirs.get_mask_sizes(1, 1)


@pytest.mark.parametrize("config", [FULL, SLIDING], ids=["full", "sliding"])
@pytest.mark.parametrize("rows", [[0, 1, 2, 3, 4], [1, 3], [4], [0, 4], [2, 3, 4]])
def test_rows_that_are_kept_stay_as_they_were(config, rows):
    cache = RowCache(config)
    fill(cache, 5, [4, 1, 1, 1])
    before = [x.clone() for x in held(cache)]
    order = cache.keep(rows)
    assert sorted(order) == rows
    assert all(torch.equal(x, old[order]) for x, old in zip(held(cache), before, strict=True))
    [*_, (keys, _)] = fill(cache, len(rows), [1], seed=9)
    assert torch.equal(keys[:, :, -1], states(len(rows), 1, 9)[0][:, :, 0])


@pytest.mark.parametrize("config", [FULL, SLIDING], ids=["full", "sliding"])
@pytest.mark.parametrize(("columns", "trimmed"), [([4], 2), ([9, 1], 3), ([9, 1], 7), ([5], 0)])
def test_a_trimmed_cache_is_the_one_that_never_had_those_columns(config, columns, trimmed):
    cache, bare = RowCache(config), RowCache(config)
    fill(cache, 2, columns)
    cache.trim(trimmed)
    for layer in (0, 1):
        whole = [
            torch.cat(parts, 2) for parts in zip(*(states(2, n, call) for call, n in enumerate(columns)), strict=True)
        ]
        bare.update(*(x[:, :, trimmed:] for x in whole), layer)
    assert cache.num_columns == bare.num_columns == sum(columns) - trimmed
    assert all(torch.equal(a, b) for a, b in zip(held(cache), held(bare), strict=True))
    assert cache.get_mask_sizes(1, 0) == bare.get_mask_sizes(1, 0)


@pytest.mark.parametrize("config", [FULL, SLIDING], ids=["full", "sliding"])
@pytest.mark.parametrize(("first", "second"), [(4, 2), (2, 4), (9, 2), (3, 9), (5, 5)])
def test_rows_that_join_end_at_the_same_column(config, first, second):
    cache, other, whole = RowCache(config), RowCache(config), RowCache(config)
    fill(cache, 2, [first])
    fill(other, 1, [second], seed=5)
    longest = max(first, second)
    padded = [
        torch.nn.functional.pad(x, (0, 0, longest - x.shape[2], 0))
        for x in (*states(2, first, 0), *states(1, second, 5))
    ]
    for layer in (0, 1):
        whole.update(torch.cat([padded[0], padded[2]]), torch.cat([padded[1], padded[3]]), layer)
    cache.join(other)
    assert cache.num_columns == longest
    assert all(torch.equal(a, b) for a, b in zip(held(cache), held(whole), strict=True))
    after, expected = fill(cache, 3, [1], seed=7), fill(whole, 3, [1], seed=7)
    assert torch.equal(after[0][0], expected[0][0])


def test_a_new_token_copies_nothing_while_there_is_room():
    cache = RowCache(FULL)
    fill(cache, 2, [8])
    place = cache.layers[0].keys.untyped_storage().data_ptr()
    fill(cache, 2, [1] * 8)
    cache.keep([1])
    cache.trim(3)
    fill(cache, 1, [1] * 8)
    assert cache.layers[0].keys.untyped_storage().data_ptr() == place


def test_a_state_that_holds_no_tokens_is_refused():
    with pytest.raises(ValueError, match="its cache has layers of type LinearAttentionLayer"):
        RowCache(MambaConfig(num_hidden_layers=2))
