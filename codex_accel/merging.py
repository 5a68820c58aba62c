"""Adapters merged into their bases: one plain model out of both.

Rule: what is merged gives the logits that the adapted model gave, which is tried each time.
"""

import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import PreTrainedModel

from codex_accel import adapters, bases, redaction
from codex_accel.errors import UserError


def merge(base: PreTrainedModel, folder: Path, *, key: str) -> PreTrainedModel:
    """`base` with the adapter in `folder` added to its weights, all of which train again.

    Raises: UserError if the adapter does not fit, or if the logits of the merged model are others than of the adapted.
    """

    def tell(name: str, what: str) -> str:
        return f"{key} = '{folder / adapters.CONFIG}': {f'{name}: ' if name else ''}{what}"

    values = bases.read_config(folder, key=key)
    if values.get("peft_type") != "LORA":
        raise UserError(tell("peft_type", f"{values.get('peft_type')!r} is not loaded here. Merge it with peft first."))
    values = {name: value for name, value in values.items() if name not in adapters.SET_BY_US}
    settings = adapters.lora_config(values, tell)
    if not (folder / adapters.WEIGHTS).is_file():
        what = f"has no {adapters.WEIGHTS}. Pickled weights are not loaded; convert them."
        raise UserError(f"{key} = '{folder}': {what}")
    try:
        weights = load_file(folder / adapters.WEIGHTS)
        _require_ranks(weights, settings)
        rows = _num_embeddings(base, weights, settings)
        if rows > base.get_input_embeddings().weight.shape[0]:  # type: ignore[index]
            base.resize_token_embeddings(rows, mean_resizing=False)
        adapted = adapters.wrap(base, settings, tell, on_warning="ignore")
        adapters.read(adapted, folder)
    except (OSError, SafetensorError, ValueError, RuntimeError) as error:
        reason = redaction.words(error)
        raise UserError(f"{key} = '{folder / adapters.WEIGHTS}': does not fit its base ({reason}).") from error
    before, was_tied = _probe(adapted.eval()), adapted.config.tie_word_embeddings
    _untie(adapted)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="peft")  # of weights that are tied no longer
        merged = adapted.merge_and_unload()
    if was_tied:
        _tie_again(merged)
    off = float((_probe(merged) - before).abs().max() / before.abs().max())
    if not off <= 1e-5:
        what = f"merged into its base, the logits are off by {off:.2g} of the largest. Load it with peft instead."
        raise UserError(f"{key} = '{folder}': {what}")
    return merged.requires_grad_(True)


def _require_ranks(weights: dict[str, torch.Tensor], settings: Any) -> None:
    """Raise ValueError for a rank that no stored weight has, before peft makes room for it."""
    largest = max((max(tensor.shape, default=0) for tensor in weights.values()), default=0)
    if (rank := max([settings.r, *settings.rank_pattern.values()])) > largest:
        raise ValueError(f"its rank is {rank}, but no weight has more than {largest} rows")


def _num_embeddings(base: PreTrainedModel, weights: dict[str, torch.Tensor], settings: Any) -> int:
    """Rows of embeddings that the stored weights ask for: of embeddings stored whole, and ids that train alone.

    Raises: ValueError for an id that does not follow on those of the base and its own.
    """
    size: int = base.get_input_embeddings().weight.shape[0]  # type: ignore[index,assignment]
    modules = (base.get_input_embeddings(), base.get_output_embeddings())
    names = [f"base_model.model.{name}" for name, module in base.named_modules() if module in modules]
    rows = [weights[f"{name}.weight"].shape[0] for name in names if f"{name}.weight" in weights]
    rows += [weights[f"{name}.lora_embedding_A"].shape[1] for name in names if f"{name}.lora_embedding_A" in weights]
    rows += [weights[f"{name}.lora_B.weight"].shape[0] for name in names if f"{name}.lora_B.weight" in weights]
    for indices in adapters.token_indices(settings):
        if bad := [index for index in indices if not 0 <= index < size + len(indices)]:
            raise ValueError(f"the token {bad[0]} is beyond the {size} of the base")
        rows += [index + 1 for index in indices]
    return max(rows, default=0)


@torch.no_grad()
def _probe(model: Any) -> torch.Tensor:
    """Logits (1, T, V) of token ids from both ends of the vocabulary, where new ones are."""
    size = model.config.vocab_size
    ids = torch.tensor([[*range(min(8, size)), *range(max(0, size - 8), size)]], device=model.device)
    longest = getattr(model.config, "max_position_embeddings", None)
    return model(input_ids=ids[:, :longest], use_cache=False).logits.float()


def _untie(adapted: Any) -> None:
    """Give head and embeddings a weight each if they share one and the adapter is at one: it is added there alone."""
    embedding, head = adapted.get_input_embeddings(), adapted.get_output_embeddings()
    plain = [getattr(m, "base_layer", getattr(m, "original_module", m)) for m in (embedding, head)]
    if head is not None and plain != [embedding, head] and plain[0].weight is plain[1].weight:
        plain[1].weight = torch.nn.Parameter(plain[1].weight.detach().clone())


def _tie_again(merged: PreTrainedModel) -> None:
    """Let head and embeddings share one weight where they are equal; say in the configuration whether they do."""
    embedding: Any
    embedding, head = merged.get_input_embeddings(), merged.get_output_embeddings()
    if head is not None:
        merged.config.tie_word_embeddings = torch.equal(head.weight, embedding.weight)
        if merged.config.tie_word_embeddings:
            head.weight = embedding.weight
