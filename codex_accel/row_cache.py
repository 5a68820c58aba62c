"""Keys and values of a batch whose rows leave and join.

Rule: the columns of all rows end together, at the newest token; a row that has seen fewer tokens has padding on its
left, which the caller's mask hides. What stays of a row is never computed again.

transformers' own layers copy all that they hold for every new token. These write into a buffer with room to grow, drop
a row by moving the last one into its place, and drop padding on the left by looking at less of the buffer.

Shapes: B rows, H heads, T columns, D numbers a head.
"""

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch.nn.functional import pad
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

ROOM = 64  # columns that a new buffer has over what is needed, or a quarter of it if that is more


class RowCache(DynamicCache):
    """The cache of a decoder, which transformers' models fill; `num_columns` T, and operations on rows and columns."""

    def __init__(self, config: PreTrainedConfig):
        """Raises: ValueError, saying why, for a model whose cache is not keys and values of each token."""
        super().__init__(config=config)
        if any(type(layer) not in OURS for layer in self.layers) or not self.layers:
            kinds = sorted({type(layer).__name__ for layer in self.layers if type(layer) not in OURS})
            raise ValueError(f"its cache has layers of type {', '.join(kinds) or 'none'}")
        self.layers: list[Any] = [
            _SlidingLayer(layer.sliding_window) if isinstance(layer, DynamicSlidingWindowLayer) else _FullLayer()
            for layer in self.layers
        ]

    @property
    def num_columns(self) -> int:
        """T, padding included."""
        return self.get_seq_length()

    def keep(self, rows: Sequence[int]) -> list[int]:
        """Drop all rows but these; returns the new order of them, which has as few rows moved as can be."""
        num, staying = len(rows), set(rows)
        moved = iter([row for row in rows if row >= num])
        order = [row if row in staying else next(moved) for row in range(num)]
        for layer in self.layers:
            layer.reorder(order)
        return order

    def trim(self, num_columns: int) -> None:
        """Drop so many columns on the left, padding in all rows."""
        for layer in self.layers:
            layer.trim(num_columns)

    def join(self, other: Self) -> None:
        """Put the rows of another cache below these; the one with fewer columns is padded on the left with zeros."""
        num_columns = max(self.num_columns, other.num_columns)
        for layer, others in zip(self.layers, other.layers, strict=True):
            layer.join(others, num_columns)


class _FullLayer(DynamicLayer):
    """`keys` and `values` (B, H, T, D) are views of buffers with more rows and columns."""

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True
        self._show([states[:, :, :0] for states in (key_states, value_states)], 0, 0, key_states.shape[0])

    def _show(self, buffers: list[torch.Tensor], start: int, stop: int, num_rows: int) -> None:
        self._buffers, self._start, self._stop, self._num_rows = buffers, start, stop, num_rows
        of_rows = buffers if buffers[0].shape[0] == num_rows else [buffer.narrow(0, 0, num_rows) for buffer in buffers]
        # `narrow` takes a third of the time of an index with slices
        self._held = [buffer.narrow(2, start, stop - start) for buffer in of_rows]
        self.keys, self.values = self._held

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self._stop + key_states.shape[-2] > self._buffers[0].shape[-2]:
            self._replace(self._num_rows, self._stop - self._start, key_states.shape[-2])
        num_new = key_states.shape[-2]
        self._show(self._buffers, self._start, self._stop + num_new, self._num_rows)
        for held, states in zip(self._held, (key_states, value_states), strict=True):
            held.narrow(2, held.shape[2] - num_new, num_new).copy_(states)
        return self._held[0], self._held[1]

    def _replace(self, num_rows: int, num_columns: int, num_new: int) -> None:
        """Move what is there to the right end of the first `num_columns` of new buffers, zeros on its left."""
        size = num_columns + num_new + max(ROOM, (num_columns + num_new) // 4)
        made = [old.new_zeros(num_rows, old.shape[1], size, old.shape[-1]) for old in self._held]
        for buffer, old in zip(made, self._held, strict=True):
            buffer[: self._num_rows, :, num_columns - old.shape[-2] : num_columns] = old
        self._show(made, 0, num_columns, num_rows)

    def reorder(self, order: Sequence[int]) -> None:
        for place, row in enumerate(order):
            if place != row:
                for buffer in self._buffers:
                    buffer[place] = buffer[row]
        self._show(self._buffers, self._start, self._stop, len(order))

    def trim(self, num_columns: int) -> None:
        self._show(self._buffers, self._start + num_columns, self._stop, self._num_rows)

    def join(self, other: "_FullLayer", num_columns: int) -> None:
        num_rows = self._num_rows
        self._replace(num_rows + other._num_rows, num_columns, 0)
        for buffer, states in zip(self._buffers, other._held, strict=True):
            buffer[num_rows:, :, num_columns - states.shape[-2] : num_columns] = states


class _SlidingLayer(DynamicSlidingWindowLayer):
    """transformers' layer, which holds the last `sliding_window - 1` columns of the T that it has seen."""

    @property
    def _held(self) -> list[torch.Tensor]:
        assert self.keys is not None
        assert self.values is not None
        return [self.keys, self.values]

    def reorder(self, order: Sequence[int]) -> None:
        index = torch.tensor(order, device=self.device)
        self.keys, self.values = (states.index_select(0, index) for states in self._held)

    def trim(self, num_columns: int) -> None:
        self.cumulative_length -= num_columns
        first = max(0, self._held[0].shape[-2] - self.cumulative_length)
        self.keys, self.values = (states[:, :, first:] for states in self._held)

    def join(self, other: "_SlidingLayer", num_columns: int) -> None:
        size = min(num_columns, self.sliding_window - 1)
        both = zip(self._held, other._held, strict=True)
        padded = ([pad(states, (0, 0, size - states.shape[-2], 0)) for states in pair] for pair in both)
        self.keys, self.values = (torch.cat(pair) for pair in padded)
        self.cumulative_length = num_columns


OURS = (DynamicLayer, DynamicSlidingWindowLayer)
