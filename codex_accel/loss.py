"""Cross-entropy as sums, so that the one division happens where all the counts are known.

Rule: logits are turned into probabilities in float32 at least, and positions without a label neither cost nor teach.

Shapes: B sequences, T positions, N positions with a label, C rows of a chunk, H hidden size, V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from codex_accel import compiler
from codex_accel.packing import IGNORE
from codex_accel.train_schema import TrainConfig

CHUNK_ROWS = 512
SOFTMAX_SIZE = 1 << 20  # logits that a CPU holds in float32 at a time; larger is no faster, but takes more memory


def sum_of_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Sum of the negative log-likelihoods in nats over the positions with a label; float32 whatever the logits are.

    `logits` (B, T, V), `labels` (B, T) already shifted, -100 where there is no target. Zero if there is no target.
    """
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORE, reduction="sum")


def token_scores(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Negative log-likelihoods in nats (B, T), zero without a target; whether the arg-max is right (B, T).

    In float32, or in float64 if `logits` (B, T, V) are. Of equal logits the first is the arg-max.
    """
    nll = torch.zeros(labels.shape, dtype=torch.promote_types(logits.dtype, torch.float32), device=logits.device)
    correct = torch.zeros(labels.shape, dtype=torch.bool, device=logits.device)
    places, rows = (labels.flatten() != IGNORE).nonzero().squeeze(1), logits.flatten(0, 1)
    for chosen in places.split(CHUNK_ROWS):
        _score_rows(rows[chosen], labels.flatten()[chosen], nll.view(-1), correct.view(-1), chosen)
    return nll, correct


def from_logits(model: Callable[..., Any], *, labels: torch.Tensor, **inputs: Any) -> torch.Tensor:
    """`sum_of_losses` of the logits that `model(**inputs)` gives."""
    return sum_of_losses(model(**inputs).logits, labels)


def of(model: torch.nn.Module, config: TrainConfig, *, chunk_rows: int) -> Callable[..., torch.Tensor]:
    """How the loop makes the summed loss of a micro-batch: by chunks of so many rows, or with all logits (0).

    With `training.compile`, the forward pass of the bare `model` is compiled, together with a loss of full logits:
    outside of the graph that would take a float32 copy of them.
    """
    plain = model.forward
    sum_of = in_head(model.get_output_embeddings(), chunk_rows=chunk_rows) if chunk_rows else None  # type: ignore[operator]
    if not config.training.compile:
        return sum_of or from_logits

    def with_loss(*, labels: torch.Tensor, **inputs: Any) -> torch.Tensor:
        return from_logits(plain, labels=labels, **inputs)

    graph = compiler.compiled(plain if sum_of else with_loss, config)

    def sum_compiled(model_in_engine: torch.nn.Module, **inputs: Any) -> torch.Tensor:
        with compiler.in_place_of_forward(model, graph, config):
            return sum_of(model_in_engine, **inputs) if sum_of else model_in_engine(**inputs)

    return sum_compiled


# --- without full logits --------------------------------------------------------------------------------------------


def in_head(head: torch.nn.Linear, *, chunk_rows: int = CHUNK_ROWS) -> Callable[..., torch.Tensor]:
    """A function like `from_logits` for models that end in `head` and nothing after it: no logits (B, T, V) are made.

    During its call of the model the head gives the sum of the losses instead of logits. So the model's own forward and
    whatever an engine wraps around model and head (gathered weights, autocast, gradients between processes) stay in
    use. At all other times it is the ordinary head, for evaluation, generation and saving.
    """
    wanted: dict[str, torch.Tensor] = {}

    @torch.compiler.disable  # it drops rows without a label, so its shapes differ; products are most of its time
    def forward(hidden: torch.Tensor) -> torch.Tensor:
        return sum_by_chunks(hidden, head.weight, wanted["labels"], bias=head.bias, chunk_rows=chunk_rows)

    def sum_in_head(model: torch.nn.Module, *, labels: torch.Tensor, **inputs: Any) -> torch.Tensor:
        wanted["labels"], vars(head)["forward"] = labels, forward
        try:
            return model(**inputs).logits
        finally:
            del head.forward, wanted["labels"]

    return sum_in_head


def sum_by_chunks(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    chunk_rows: int = CHUNK_ROWS,
) -> torch.Tensor:
    """`sum_of_losses(hidden @ weight.T + bias, labels)` with the logits of only `chunk_rows` positions at a time.

    `hidden` (B, T, H), `weight` (V, H), `bias` (V,), `labels` (B, T) already shifted, -100 where there is no target.
    The products are made in the dtype of autocast, or of `hidden`; the rest in float32, or in float64 if that is it.
    Gradients are made along with the sum, for those inputs that want one, so nothing is computed twice and no logits
    wait for the backward pass; that can be gone through more than once, but not differentiated.
    """
    inputs = (hidden, weight, bias)
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in inputs):
        return _SumByChunks.apply(*inputs, labels, chunk_rows)
    return _sum_and_gradients(*inputs, labels, chunk_rows, wanted=(False, False, False))[0]


class _SumByChunks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> torch.Tensor:
        total, gradients = _sum_and_gradients(*arguments, wanted=ctx.needs_input_grad[:3])
        ctx.save_for_backward(*gradients)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: torch.Tensor) -> Any:
        return *(None if gradient is None else gradient * scale for gradient in ctx.saved_tensors), None, None


@torch.no_grad()
def _sum_and_gradients(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    chunk_rows: int,
    *,
    wanted: tuple[bool, bool, bool],
) -> tuple[torch.Tensor, tuple[torch.Tensor | None, ...]]:
    """The sum, and its gradients for `hidden`, `weight` and `bias` where `wanted`, else None."""
    device, kind = hidden.device, hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    exact = torch.promote_types(dtype, torch.float32)
    with torch.autocast(kind, enabled=False):
        places = (labels.flatten() != IGNORE).nonzero().squeeze(1)  # (N,)
        rows, targets = hidden.flatten(0, -2)[places].to(dtype), labels.flatten()[places]  # (N, H), (N,)
        by_vocabulary, added = weight.to(dtype), None if bias is None else bias.to(dtype)
        losses = torch.empty(len(places), dtype=exact, device=device)
        for_rows = torch.empty_like(rows) if wanted[0] else None
        for_weight = torch.zeros_like(weight, dtype=exact) if wanted[1] else None
        for_bias = torch.zeros_like(weight[:, 0], dtype=exact) if wanted[2] else None
        buffer = torch.empty(min(chunk_rows, len(places)), len(weight), dtype=dtype, device=device)  # (C, V)
        for start in range(0, len(places), chunk_rows):
            here = slice(start, start + chunk_rows)
            logits = _logits_into(buffer, rows[here], by_vocabulary, added)
            losses[here] = _losses_into_slopes(logits, targets[here], exact, wanted=any(wanted))
            slopes = logits
            if for_rows is not None:
                torch.mm(slopes, by_vocabulary, out=for_rows[here])
            if for_weight is not None:
                _add_product(for_weight, slopes.t(), rows[here])
            if for_bias is not None:
                for_bias += slopes.sum(0, dtype=exact)
        for_hidden = None
        if for_rows is not None:
            for_hidden = torch.zeros_like(hidden).flatten(0, -2)
            for_hidden[places] = for_rows.to(hidden.dtype)
            for_hidden = for_hidden.view(hidden.shape)
    return losses.sum(), (for_hidden, for_weight, for_bias)


def _losses_into_slopes(
    logits: torch.Tensor, targets: torch.Tensor, exact: torch.dtype, *, wanted: bool
) -> torch.Tensor:
    """Losses (C,) of `logits` (C, V), which become, if `wanted`, the derivatives: probabilities, less 1 at the target.

    A CPU takes a few rows at a time, so that float32 beside bfloat16 logits costs no memory; a GPU all, to start few
    kernels.
    """
    group = max(1, SOFTMAX_SIZE // logits.shape[1]) if logits.device.type == "cpu" else len(logits)
    losses = torch.empty(len(logits), dtype=exact, device=logits.device)
    for start in range(0, len(logits), group):
        here = slice(start, start + group)
        target = targets[here, None]
        log_probabilities = F.log_softmax(logits[here].to(exact), dim=-1)
        losses[here] = -log_probabilities.gather(1, target).squeeze(1)
        if wanted:
            ones = torch.ones_like(target, dtype=exact)
            logits[here] = log_probabilities.exp_().scatter_add_(1, target, -ones)
    return losses


def _logits_into(
    buffer: torch.Tensor, rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """`rows @ weight.T + bias` (C, V) in the first rows of `buffer`."""
    logits = buffer[: len(rows)]
    if bias is None:
        return torch.mm(rows, weight.t(), out=logits)
    return torch.addmm(bias, rows, weight.t(), out=logits)


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """`total += left @ right`, in place of a sum in half precision."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


# --- scores of a model's tokens -------------------------------------------------------------------------------------


def scores_from_logits(
    model: Callable[..., Any], *, labels: torch.Tensor, **inputs: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """`token_scores` of the logits that `model(**inputs)` gives, whatever it does after its head."""
    return token_scores(model(**inputs).logits, labels)


def scores_in_head(model: torch.nn.Module, *, labels: torch.Tensor, **inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """`token_scores` of a model that `ends_in_head`, whose logits (B, T, V) are never made.

    As with `in_head`, the head gives something else during the call, so that what an engine wraps around model and head
    stays in use. The scores do not come out through the model, which may round what it gives to half precision.
    """
    head, found = model.get_output_embeddings(), []  # type: ignore[operator]

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        found.append(scores_by_chunks(hidden, head.weight, labels, bias=head.bias))
        return hidden[..., :1]

    vars(head)["forward"] = forward
    try:
        model(**inputs)
    finally:
        del head.forward
    [scores] = found
    return scores


@torch.no_grad()
def ends_in_head(model: torch.nn.Module, device: torch.device) -> bool:
    """Whether `model` gives what its head gives, and that is a plain product; found by trying, in evaluation mode.

    The head gives numbers of our own, from -200 to 200, which must come out as they are. So a soft cap is found out
    however small the model's logits are, and so is a head that the model passes by.
    """
    head = model.get_output_embeddings()  # type: ignore[operator]
    if type(head) is not torch.nn.Linear or "forward" in vars(head):  # an adapter, or a hook, in its place
        return False
    given = torch.linspace(-200, 200, 2 * head.out_features, device=device).view(1, 2, -1)  # (1, T, V)
    handle = head.register_forward_hook(lambda *_: given)
    try:
        input_ids = torch.zeros(1, 2, dtype=torch.long, device=device)
        return torch.equal(model(input_ids=input_ids, use_cache=False).logits.float(), given)
    finally:
        handle.remove()


@torch.no_grad()
def scores_by_chunks(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, *, bias: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`token_scores(hidden @ weight.T + bias, labels)` with the logits of only some positions at a time.

    `hidden` (B, T, H), `weight` (V, H), `bias` (V,), `labels` (B, T). Only positions with a target are multiplied, in
    the dtype of autocast, or of `hidden`; the rest is in float32, or in float64 if that is it. Measured on a
    CPU for V of 512 to 128,256: 1 to 1.15 times as long as the product alone, with full logits 1.3 to 2.1 times.
    """
    device, kind = hidden.device, hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    nll = torch.zeros(labels.shape, dtype=torch.promote_types(dtype, torch.float32), device=device)
    correct = torch.zeros(labels.shape, dtype=torch.bool, device=device)
    places = (labels.flatten() != IGNORE).nonzero().squeeze(1)  # (N,)
    chunk_rows = max(CHUNK_ROWS, SOFTMAX_SIZE // len(weight))
    with torch.autocast(kind, enabled=False):
        rows, targets = hidden.flatten(0, -2).to(dtype), labels.flatten()
        by_vocabulary, added = weight.to(dtype), None if bias is None else bias.to(dtype)
        buffer = torch.empty(min(chunk_rows, len(places)), len(weight), dtype=dtype, device=device)  # (C, V)
        for chosen in places.split(chunk_rows):
            logits = _logits_into(buffer, rows[chosen], by_vocabulary, added)
            _score_rows(logits, targets[chosen], nll.view(-1), correct.view(-1), chosen)
    return nll, correct


def _score_rows(
    logits: torch.Tensor, targets: torch.Tensor, nll: torch.Tensor, correct: torch.Tensor, places: torch.Tensor
) -> None:
    """Put the scores of `logits` (C, V) at `places` (C,) of `nll` and `correct`; a few rows at a time on a CPU."""
    group = max(1, SOFTMAX_SIZE // logits.shape[1]) if logits.device.type == "cpu" else len(logits)
    for some, target, place in zip(logits.split(group), targets.split(group), places.split(group), strict=True):
        log_probabilities = F.log_softmax(some, dim=-1, dtype=nll.dtype)
        nll[place] = -log_probabilities.gather(1, target[:, None]).squeeze(1)
        correct[place] = some.argmax(-1) == target
