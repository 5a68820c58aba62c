"""Cross-entropy as sums, so that the one division happens where all the counts are known.

Shapes: B sequences, T positions, V vocabulary.
"""

import torch
import torch.nn.functional as F

from codex_accel.packing import IGNORE


def sum_of_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Sum of the negative log-likelihoods in nats over the positions with a label; float32 whatever the logits are.

    `logits` (B, T, V), `labels` (B, T) already shifted, -100 where there is no target. Zero if there is no target.
    """
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORE, reduction="sum")


def token_scores(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Negative log-likelihoods in nats (B, T) float32, zero without a target; whether the arg-max is right (B, T)."""
    nll = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORE, reduction="none")
    return nll.view(labels.shape), (logits.argmax(-1) == labels) & (labels != IGNORE)
