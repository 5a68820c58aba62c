"""The optimizer and its parameter groups."""

from typing import Any

import torch

from codex_accel.schema import Optimizer


def decay_groups(model: torch.nn.Module, *, weight_decay: float, decay_embeddings: bool) -> list[dict[str, Any]]:
    """Two parameter groups: matrices, which decay, and the rest, which does not.

    Biases and norm weights (any parameter with fewer than two dimensions) never decay. Embedding matrices decay only if
    `decay_embeddings`; an output head that shares the input embedding counts as the embedding. Each parameter that
    needs a gradient is in exactly one group, once.
    """
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    groups: dict[bool, list[torch.nn.Parameter]] = {True: [], False: []}
    for parameter in model.parameters():  # shared parameters come once
        if parameter.requires_grad:
            decays = parameter.ndim >= 2 and (decay_embeddings or id(parameter) not in embeddings)
            groups[decays].append(parameter)
    return [
        {"params": groups[True], "weight_decay": weight_decay},
        {"params": groups[False], "weight_decay": 0.0},
    ]


def build(settings: Optimizer, model: torch.nn.Module) -> torch.optim.Optimizer:
    """AdamW with `decay_groups`; the fused kernel, which torch 2.13 has for CPU and CUDA."""
    groups = decay_groups(model, weight_decay=settings.weight_decay, decay_embeddings=settings.decay_embeddings)
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=settings.learning_rate,
        betas=(settings.betas[0], settings.betas[1]),
        eps=settings.eps,
        fused=True,
    )
