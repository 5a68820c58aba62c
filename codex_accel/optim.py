"""The optimizer and its parameter groups.

Rule: every parameter that trains is in one group, once; a setting that would do nothing is an error. `OPTIMIZERS` is
extended by the entry points `codex_accel.optimizers`.
"""

import difflib
import fnmatch
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from codex_accel import plugins
from codex_accel.errors import UserError
from codex_accel.train_schema import Optimizer, TrainConfig

if TYPE_CHECKING:
    import torch

Groups = list[dict[str, Any]]
FUSED_DEVICES = (
    "cpu",
    "cuda",
    "mps",
    "xpu",
)  # with fused kernels in torch 2.13, which raises at the first step elsewhere
OWN_KEYS = {"adamw": ("betas", "eps"), "sgd": ("momentum",)}


def adamw(groups: Groups, settings: Optimizer) -> "torch.optim.Optimizer":
    """AdamW of Loshchilov and Hutter 2019."""
    import torch

    betas = (settings.betas[0], settings.betas[1])
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=betas, eps=settings.eps, fused=_fused(groups))


def sgd(groups: Groups, settings: Optimizer) -> "torch.optim.Optimizer":
    """Stochastic gradient descent as torch has it: g + weight_decay w, v = momentum v + g, w - lr v."""
    import torch

    return torch.optim.SGD(groups, lr=settings.learning_rate, momentum=settings.momentum, fused=_fused(groups))


OPTIMIZERS: dict[str, Callable[..., "torch.optim.Optimizer"]] = {"adamw": adamw, "sgd": sgd}


def _fused(groups: Groups) -> bool | None:
    """True if one kernel can update all parameters at once; else None, which leaves the choice to torch."""
    parameters = [parameter for group in groups for parameter in group["params"]]
    return all(p.is_floating_point() and p.device.type in FUSED_DEVICES for p in parameters) or None


def require(config: TrainConfig) -> Callable[[Groups], "torch.optim.Optimizer"]:
    """The function that makes the optimizer out of parameter groups.

    Raises: UserError for an unknown name, a plug-in that fails, wrong options, and keys of another optimizer.
    """
    chosen = config.optimizer
    make = plugins.find(plugins.OPTIMIZERS, OPTIMIZERS, chosen.name, config=config, key="optimizer.name")
    defaults = Optimizer()  # a saved configuration names every key, so what counts is what differs
    foreign = [
        config.problem(
            f"optimizer.{key}", f"{getattr(chosen, key)} is a key of {owner}, not of {chosen.name}. Remove it."
        )
        for owner, keys in OWN_KEYS.items()
        for key in keys
        if chosen.name in OPTIMIZERS and owner != chosen.name and getattr(chosen, key) != getattr(defaults, key)
    ]
    if foreign:
        raise UserError(*foreign)
    key = "optimizer.options"
    with plugins.blaming(plugins.OPTIMIZERS, chosen.name, "cannot be read", config=config, key=key):
        options = plugins.settings(make, chosen.options, config=config, key=key)
    return lambda groups: make(groups, chosen, **options)


def decay_groups(
    model: "torch.nn.Module",
    *,
    weight_decay: float,
    decay_embeddings: bool,
    rate_scales: Mapping[str, float] | None = None,
) -> Groups:
    """Parameter groups: first matrices, which decay, then the rest, which does not, each apart by its `rate_scale`.

    Biases and norm weights (any parameter with fewer than two dimensions) never decay. Embedding matrices decay only if
    `decay_embeddings`; an output head that shares the input embedding counts as the embedding. `rate_scales` maps a
    pattern of the name (`fnmatch`, upper and lower case differ) to the factor on the learning rate; the first that
    matches counts, and without one the factor is 1. Each parameter that needs a gradient is in exactly one group, once.
    """
    import torch

    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    groups: dict[tuple[bool, float], list[torch.nn.Parameter]] = {}
    for name, parameter in model.named_parameters():  # shared parameters come once
        if parameter.requires_grad:
            decays = parameter.ndim >= 2 and (decay_embeddings or id(parameter) not in embeddings)
            pattern = _first_match(name, rate_scales or {})
            scale = 1.0 if pattern is None else (rate_scales or {})[pattern]
            groups.setdefault((decays, scale), []).append(parameter)
    return [
        {"params": groups[decays, scale], "weight_decay": weight_decay if decays else 0.0, "rate_scale": scale}
        for decays, scale in sorted(groups, key=lambda key: not key[0])
    ]


def _first_match(name: str, patterns: Mapping[str, float]) -> str | None:
    return next((pattern for pattern in patterns if fnmatch.fnmatchcase(name, pattern)), None)


def _require_effect(config: TrainConfig, names: list[str]) -> None:
    """Raise UserError for patterns of rate_scales that decide for no parameter that trains."""
    scales = config.optimizer.rate_scales
    decisive = {_first_match(name, scales) for name in names}
    problems = []
    for pattern in scales:
        if pattern in decisive:
            continue
        if matched := fnmatch.filter(names, pattern):
            what = f"an earlier pattern matches all that it matches, such as {matched[0]}. Put it first, or remove it."
        else:
            nearest = difflib.get_close_matches(pattern, names, n=3, cutoff=0.0)
            what = f"matches no parameter that trains. The nearest names: {', '.join(nearest)}."
        problems.append(config.problem(f"optimizer.rate_scales.{pattern}", what))
    if problems:
        raise UserError(*problems)


def build(config: TrainConfig, model: "torch.nn.Module") -> "torch.optim.Optimizer":
    """The optimizer of the configuration over the parameters of `model` that train, in `decay_groups`.

    Raises: UserError as `require`, for a pattern of rate_scales without effect, and for a plug-in that leaves out
    parameters or the key "rate_scale", by which the loop sets the learning rate of each group.
    """
    make, settings = require(config), config.optimizer
    _require_effect(config, [name for name, parameter in model.named_parameters() if parameter.requires_grad])
    groups = decay_groups(
        model,
        weight_decay=settings.weight_decay,
        decay_embeddings=settings.decay_embeddings,
        rate_scales=settings.rate_scales,
    )
    wanted = {id(parameter) for group in groups for parameter in group["params"]}
    with plugins.blaming(plugins.OPTIMIZERS, settings.name, "failed", config=config, key="optimizer.name"):
        optimizer = make(groups)
        taken = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
        if set(taken) != wanted or len(taken) != len(wanted):
            raise ValueError(f"it updates {len(taken)} parameters, not the {len(wanted)} of its groups")
        if not all("rate_scale" in group for group in optimizer.param_groups):
            raise ValueError("it drops the key 'rate_scale' of its groups")
    return optimizer
