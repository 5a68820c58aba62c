"""Adapters merged into their bases: where a base lies, and one plain model out of both.

Rule: a base is the one whose digest the adapter names; what is merged gives the logits that the adapted model gave,
which is tried each time.
"""

import itertools
import json
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import PreTrainedModel

from codex_accel import adapters, manifest
from codex_accel.errors import UserError


def chain(folder: Path, *, verify: bool, key: str, base: Path | None = None) -> list[Path]:
    """`folder`, its base, and so on while that is an adapter too; the last is a plain model.

    `base` is where the base of `folder` lies now, if not where its manifest says. Each is checked against the digests
    that its child recorded, if `verify`.
    """
    found = [folder]
    while (found[-1] / adapters.CONFIG).exists():
        found.append(_base_of(found[-1], verify=verify, key=key, base=base if len(found) == 1 else None))
        if found[-1] in found[:-1]:
            raise UserError(f"{key} = '{found[-1] / adapters.CONFIG}': names itself as its base. Give the right base.")
    return found


def unnamed_bases(folder: Path) -> list[Path]:
    """Bases of `folder` that no manifest names, because an adapter from elsewhere has none."""
    folders = chain(folder, verify=False, key="checkpoint")
    return [base for child, base in itertools.pairwise(folders) if not (child / manifest.MANIFEST).exists()]


def _base_of(folder: Path, *, verify: bool, key: str, base: Path | None) -> Path:
    if (folder / "config.json").exists():
        what = "lies beside config.json, so this is a model or an adapter, and nobody knows which. Remove one of them."
        raise UserError(f"{key} = '{folder / adapters.CONFIG}': {what}")
    if not (folder / manifest.MANIFEST).exists():
        name = _read_config(folder, key=key).get("base_model_name_or_path")
        place = base or (Path(name) if isinstance(name, str) and name else None)
        if place is None or not place.is_dir():
            what = f"names {name!r} as its base, which is no local folder. Merge them: scripts/export_model.py"
            raise UserError(f"{key} = '{folder / adapters.CONFIG}': {what} --checkpoint {folder} --base FOLDER.")
        return manifest.find_model(place, verify=verify, key="base")
    document = manifest.read(folder)
    adapter = document["facts"].get("adapter")
    digests = adapter.get("base") if isinstance(adapter, dict) else None
    fitting = [p for p in document["parents"] if digests and all(p.get(key) == digests[key] for key in digests)]
    if not (record := next(iter(fitting), None)):
        raise UserError(f"{key} = '{folder / manifest.MANIFEST}': names no base. Give an adapter of this toolkit.")
    place = base or Path(os.path.normpath(folder / record["path"]))
    if not place.is_dir():
        what = f"its base is no longer at '{place}'. Put it back, or merge them: scripts/export_model.py"
        raise UserError(f"{key} = '{folder}': {what} --checkpoint {folder} --base FOLDER.")
    if verify and (problems := manifest.check_tree(place, recursive=False, expected=record).problems):
        raise UserError(*(f"{key} = '{folder}': its base is not the one recorded. {problem}" for problem in problems))
    return place


def _read_config(folder: Path, *, key: str) -> dict[str, Any]:
    """The values of adapter_config.json."""
    try:
        values = json.loads((folder / adapters.CONFIG).read_bytes())
        if not isinstance(values, dict):
            raise ValueError("no object")
    except (OSError, ValueError, RecursionError) as error:
        what = f"is no configuration of an adapter ({' '.join(str(error).split())[:200]}). Copy the folder again."
        raise UserError(f"{key} = '{folder / adapters.CONFIG}': {what}") from error
    return values


def merge(base: PreTrainedModel, folder: Path, *, key: str) -> PreTrainedModel:
    """`base` with the adapter in `folder` added to its weights, all of which train again.

    Raises: UserError if the adapter does not fit, or if the logits of the merged model are others than of the adapted.
    """

    def tell(name: str, what: str) -> str:
        return f"{key} = '{folder / adapters.CONFIG}': {f'{name}: ' if name else ''}{what}"

    values = _read_config(folder, key=key)
    if values.get("peft_type") != "LORA":
        raise UserError(tell("peft_type", f"{values.get('peft_type')!r} is not loaded here. Merge it with peft first."))
    values = {name: value for name, value in values.items() if name not in adapters.SET_BY_US}
    settings = adapters.lora_config(values, tell)
    try:
        rows = _num_embeddings(base, load_file(folder / adapters.WEIGHTS), settings)
        if rows > base.get_input_embeddings().weight.shape[0]:  # type: ignore[index]
            base.resize_token_embeddings(rows, mean_resizing=False)
        adapted = adapters.wrap(base, settings, tell, on_warning="ignore")
        adapters.read(adapted, folder)
    except (OSError, SafetensorError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
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


def _num_embeddings(base: PreTrainedModel, weights: dict[str, torch.Tensor], settings: Any) -> int:
    """Rows of embeddings that the stored weights ask for: of embeddings stored whole, and ids that train alone."""
    modules = (base.get_input_embeddings(), base.get_output_embeddings())
    names = [f"base_model.model.{name}" for name, module in base.named_modules() if module in modules]
    rows = [weights[f"{name}.weight"].shape[0] for name in names if f"{name}.weight" in weights]
    rows += [weights[f"{name}.lora_embedding_A"].shape[1] for name in names if f"{name}.lora_embedding_A" in weights]
    rows += [weights[f"{name}.lora_B.weight"].shape[0] for name in names if f"{name}.lora_B.weight" in weights]
    indices = settings.trainable_token_indices or []
    lists = indices.values() if isinstance(indices, dict) else [indices]
    return max([*rows, *(index + 1 for each in lists for index in each)], default=0)


@torch.no_grad()
def _probe(model: Any) -> torch.Tensor:
    """Logits (1, T, V) of token ids from both ends of the vocabulary, where new ones are."""
    size = model.config.vocab_size
    ids = torch.tensor([[*range(min(8, size)), *range(max(0, size - 8), size)]], device=model.device)
    return model(input_ids=ids, use_cache=False).logits.float()


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
