"""The next token of each row, out of its logits.

Rule: a row draws from its own seed alone, so what it draws depends on no other row; and a choice that rounding could
turn into another is counted.

Shapes: B rows, V vocabulary.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from transformers import TopKLogitsWarper, TopPLogitsWarper

from codex_accel.errors import UserError

NEAR = 1e-4  # at least; padding and company move float32 logits by less (measured: docs/generate.md)
NEAR_STEPS = {torch.bfloat16: 4, torch.float16: 16}  # steps of the type at the size of the largest logit; others: 64
NOT_FINITE = (
    "the model gives logits that are not finite, so there is no next token. Look at its training, or its dtype."
)


class Settings(NamedTuple):
    """How a row's token is chosen: the likeliest at temperature 0, else drawn from softmax(logits / temperature)."""

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None


def draws(seed: int, number: int) -> list[float]:
    """Uniform numbers in [0, 1), one for each token of a row."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(number, generator=generator, dtype=torch.float64).tolist()


def choose(logits: torch.Tensor, settings: Sequence[Settings], draw: Sequence[float]) -> tuple[list[int], list[bool]]:
    """The token of each row of `logits` (B, V), and whether rounding could have made it another.

    It could if the two largest logits are near each other (`NEAR`, or `NEAR_STEPS` if that is more); for a drawn token,
    if its number `draw` is as near the edge between two tokens. top_k, then top_p, cut candidates as in transformers.

    Raises: UserError if a row has no largest logit, because some are not numbers.
    """
    steps = NEAR_STEPS.get(logits.dtype, 64) * torch.finfo(logits.dtype).eps
    logits = logits.detach().float()
    if logits.device.type == "cpu" and all(own.temperature == 0 for own in settings):
        return _likeliest_on_cpu(logits, steps)
    largest = logits.amax(-1)  # (B,)
    if not bool(torch.isfinite(largest).all()):
        raise UserError(NOT_FINITE)
    near = (steps * largest.abs()).clamp(min=NEAR)
    tokens = torch.empty(len(settings), dtype=torch.int64, device=logits.device)
    unsure = torch.empty(len(settings), dtype=torch.bool, device=logits.device)
    for group in dict.fromkeys(settings):
        rows = [row for row, own in enumerate(settings) if own == group]
        index = slice(None) if len(rows) == len(settings) else torch.tensor(rows, device=logits.device)
        if group.temperature == 0:
            tokens[index], unsure[index] = _likeliest(logits[index], near[index])
        else:
            numbers = torch.tensor([draw[row] for row in rows], dtype=torch.float64, device=logits.device)
            # a gap that moves by `near` moves an edge by near / (4 T) at most: p (1 - p) <= 1/4
            reach = near[index] / min(1.0, 4 * group.temperature)
            tokens[index], unsure[index] = _drawn(candidates(logits[index], group), numbers, reach)
    return tokens.tolist(), unsure.tolist()


def candidates(logits: torch.Tensor, group: Settings) -> torch.Tensor:
    """Logits (B, V) over the temperature, and minus infinity for tokens that top_k and top_p leave out."""
    logits = logits / group.temperature
    unused: torch.Tensor = None  # type: ignore[assignment]  # the ids so far, which these two do not look at
    if group.top_k is not None:
        logits = TopKLogitsWarper(group.top_k)(unused, logits)
    if group.top_p is not None and group.top_p < 1:
        logits = TopPLogitsWarper(group.top_p)(unused, logits)
    return logits


def _likeliest(logits: torch.Tensor, near: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = logits.argmax(-1)  # the first of equal ones, as in transformers
    largest = logits.gather(1, tokens[:, None])
    second = logits.scatter(1, tokens[:, None], -torch.inf).amax(-1)
    return tokens, largest[:, 0] - second <= near


def _likeliest_on_cpu(logits: torch.Tensor, steps: float) -> tuple[list[int], list[bool]]:
    """The same in a quarter of the time, measured for one row of 512 to 150,000 and for 64 of 8,192 each."""
    rows = logits.numpy()
    tokens = rows.argmax(-1)  # of a row with some that are not numbers, one of these
    places = (np.arange(len(tokens)), tokens)
    largest = rows[places]
    if not np.isfinite(largest).all():
        raise UserError(NOT_FINITE)
    others = rows.copy()
    others[places] = -np.inf
    near = np.maximum(np.float32(steps) * np.abs(largest), np.float32(NEAR))
    return tokens.tolist(), (largest - others.max(-1) <= near).tolist()


def _drawn(logits: torch.Tensor, draw: torch.Tensor, near: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The token in whose stretch of the distribution function, tokens in order of their ids, the number falls."""
    edges = logits.double().softmax(-1).cumsum(-1)  # (B, V)
    total = edges[:, -1:].contiguous()
    point = draw[:, None] * total
    last = torch.searchsorted(edges, total)  # the first that reaches the total: no token after it has a share
    tokens = torch.minimum(torch.searchsorted(edges, point, right=True), last)
    above = edges.gather(1, tokens)
    below = torch.where(tokens > 0, edges.gather(1, (tokens - 1).clamp(min=0)), 0.0)
    inner = (point - below <= near[:, None]) & (below > 0)
    unsure = inner | ((above - point <= near[:, None]) & (tokens < last))
    return tokens[:, 0], unsure[:, 0]
