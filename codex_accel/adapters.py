"""Adapters: a few trained weights beside a base that stays as it is, by peft's LoRA and its kin (DoRA, rsLoRA).

Rule: an adapter names its base by digest and never changes it; a setting that would do nothing is an error. `merging`
puts the two together.
"""

import dataclasses
import importlib.util
import json
import re
import typing
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pydantic
import torch
from safetensors.torch import load_file, save_file
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from codex_accel import redaction, seeds
from codex_accel.config import did_you_mean
from codex_accel.errors import UserError
from codex_accel.train_schema import TrainConfig

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # as peft calls them
SET_BY_US = (
    "peft_type", "peft_version", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode",
    "fan_in_fan_out",
)  # fmt: skip
KEEP_BASE = (True, False, "gaussian", "orthogonal", "mica")  # of init_lora_weights; the others begin with another base
CHANGES_BASE = "makes another base of the weights, or needs a pass over data first"
NOT_MERGED = "cannot be merged into the weights"
NOT_OFFERED = {
    **dict.fromkeys(("loftq_config", "eva_config", "corda_config", "lora_ga_config", "kasa_config"), CHANGES_BASE),
    **dict.fromkeys(("layer_replication", "use_bdlora"), CHANGES_BASE),
    **dict.fromkeys(("alora_invocation_tokens", "arrow_config", "monteclora_config", "use_qalora"), NOT_MERGED),
    **dict.fromkeys(("megatron_config", "megatron_core", "runtime_config"), "is of another engine"),
}
Tell = Callable[[str, str], str]  # (key below `peft`, what is wrong) -> a problem line


# --- to train ---------------------------------------------------------------------------------------------------------


def attach(model: PreTrainedModel, config: TrainConfig, *, num_new_tokens: int = 0) -> Any:
    """`model` frozen, with the adapter of the `peft` section around it: a PeftModel. Its weights are by `config.seed`.

    The last `num_new_tokens` rows of the embeddings are new: they train, and are stored with the adapter.

    Raises: UserError for what peft does not know, refuses or warns of, and for names that match no module.
    """

    def tell(key: str, what: str) -> str:
        return config.problem(f"peft.{key}".rstrip("."), what)

    settings = lora_config({"task_type": "CAUSAL_LM", **(config.peft or {})}, tell)
    _require_matches(model, settings, tell)
    _train_new_tokens(model, settings, num_new_tokens, tell)
    if config.model.quantization != "none":
        from peft import prepare_model_for_kbit_training

        prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)  # which `build` sets
    torch.manual_seed(seeds.derive(config.seed, "adapter"))
    return wrap(model, settings, tell, on_warning="error")


def quantization(config: TrainConfig) -> BitsAndBytesConfig | None:
    """How transformers is to load the base; None for its plain weights. Raises: UserError where that cannot be."""
    if (asked := config.model.quantization) == "none":
        return None
    if config.training.device == "cpu":
        what = f"{asked} needs a GPU, but training.device is cpu. Set it to none, or the device to auto."
        raise UserError(config.problem("model.quantization", what))
    missing = [] if torch.cuda.is_available() else ["a CUDA GPU"]
    missing += [] if importlib.util.find_spec("bitsandbytes") else ["bitsandbytes (pip install bitsandbytes)"]
    if missing:
        what = f"{asked} needs {' and '.join(missing)}, which this machine has not. Set it to none."
        raise UserError(config.problem("model.quantization", what))
    if asked == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(  # QLoRA, Dettmers et al. 2023
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def lora_config(values: dict[str, Any], tell: Tell) -> Any:
    """peft's LoraConfig of these values, each of a type that it says; raises UserError with all problems."""
    from peft import LoraConfig

    defaults = {
        field.name: field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        for field in dataclasses.fields(LoraConfig)
    }
    hints, problems = typing.get_type_hints(LoraConfig), []
    known = [name for name in defaults if name not in (*SET_BY_US, *NOT_OFFERED)]
    for name, value in values.items():
        if name not in defaults:
            problems.append(tell(name, f"unknown key of peft's LoraConfig. {did_you_mean(name, known)}"))
        elif name in SET_BY_US:
            problems.append(tell(name, "is set by the toolkit. Remove it."))
        elif name in NOT_OFFERED and value != defaults[name]:
            problems.append(tell(name, f"{value!r} {NOT_OFFERED[name]}, which is not offered here. Remove it."))
        elif name == "init_lora_weights" and value not in KEEP_BASE:
            choices = ", ".join(map(str, KEEP_BASE)).lower()
            problems.append(tell(name, f"{value!r} {CHANGES_BASE}. Choose from: {choices}."))
        elif name not in NOT_OFFERED:
            try:
                pydantic.TypeAdapter(hints[name]).validate_python(value, strict=True)
            except pydantic.ValidationError as error:
                why = error.errors(include_url=False)[0]["msg"].removeprefix("Input ")
                problems.append(tell(name, f"{value!r} {why}."))
    if problems:
        raise UserError(*problems)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", module="peft")
            return LoraConfig(**values)
    except Exception as error:  # ValueError, TypeError, ImportError, or a warning
        raise UserError(tell("", _refused(error))) from error


def _refused(error: Exception) -> str:
    text = redaction.words(error)
    if "`ensure_weight_tying` is not set" in text:
        what = "embeddings and head share one weight here, which an adapter at one of them would part."
        return f"{what} Set ensure_weight_tying: true, or leave them out."
    if "trainable_token_indices cannot be applied" in text:
        what = "embeddings or head cannot have a LoRA and train some rows, as those of new tokens do."
        return f"{what} Take them out of target_modules, or put them into modules_to_save to train whole."
    return f"is refused by peft: {text.rstrip('.')}. Mend the peft section."


def _require_matches(model: PreTrainedModel, settings: Any, tell: Tell) -> None:
    """Raise UserError for each module that the settings name and the model has not; peft overlooks one of several."""
    names = [name for name, _ in model.named_modules()]
    targets = [name for name, module in model.named_modules() if isinstance(module, _targets())]
    choices = sorted({name.rpartition(".")[2] for name in targets})
    problems = []

    def missing(name: str) -> str:
        return f"{name!r} is no module of this {model.config.model_type} model. {did_you_mean(name, choices)}"

    for key in ("target_modules", "exclude_modules", "modules_to_save"):
        value = getattr(settings, key)
        if isinstance(value, str) and value != "all-linear":
            try:
                if any(re.fullmatch(value, name) for name in names):
                    continue
                what = f"{value!r} matches no module as a regular expression of the whole name, such as {targets[0]!r}."
                problems.append(tell(key, f"{what} To give last names: {key}: [{', '.join(choices[:2])}]."))
            except re.error as error:
                problems.append(tell(key, f"{value!r} is no regular expression ({error}). Mend it."))
        elif value and value != "all-linear":
            absent = [want for want in value if not any(f".{name}".endswith(f".{want}") for name in names)]
            problems += [tell(key, missing(want)) for want in sorted(absent)]
    layers = settings.layers_to_transform
    for layer in [layers] if isinstance(layers, int) else layers or []:
        if not any(f".{layer}." in name for name in names):
            problems.append(tell("layers_to_transform", f"the model has no layer {layer}; they count from 0."))
    size: Any = model.get_input_embeddings().weight.shape[0]  # type: ignore[index]
    for index in (index for indices in token_indices(settings) for index in indices if not 0 <= index < size):
        problems.append(tell("trainable_token_indices", f"the model has no token {index}; it has {size}, from 0."))
    if settings.target_modules is None and not settings.target_parameters and not _known_targets(model):
        what = f"is needed: peft names none for {model.config.model_type}. Choose from: {', '.join(choices)}."
        problems.append(tell("target_modules", what))
    if problems:
        raise UserError(*problems)


def token_indices(settings: Any) -> list[list[int]]:
    """The lists of `trainable_token_indices`, one for each module that it names."""
    indices = settings.trainable_token_indices or []
    return list(indices.values()) if isinstance(indices, dict) else [indices]


def _targets() -> tuple[type[torch.nn.Module], ...]:
    return torch.nn.Linear, torch.nn.Embedding, Conv1D


def _known_targets(model: PreTrainedModel) -> bool:
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    return model.config.model_type in TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING


def _train_new_tokens(model: PreTrainedModel, settings: Any, num_new_tokens: int, tell: Tell) -> None:
    """Put the ids of new tokens among the `trainable_token_indices` of embeddings and head, unless they train whole."""
    embedding: Any
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    size, tied = embedding.weight.shape[0], head is None or head.weight is embedding.weight
    new = list(range(size - num_new_tokens, size))
    names = {id(module): name for name, module in model.named_modules()}
    asked = settings.trainable_token_indices or {}
    asked = asked if isinstance(asked, dict) else {names[id(embedding)]: asked}
    for module in [embedding] if tied else [embedding, head]:
        name = names[id(module)]
        trains_whole = any(name.endswith(saved) for saved in settings.modules_to_save or [])
        if new and trains_whole and tied and not settings.ensure_weight_tying:
            what = f"'{name}' shares its weights with the head, where new tokens would stay as they were drawn. Remove"
            raise UserError(tell("modules_to_save", f"{what} it: new tokens train anyway. Or set ensure_weight_tying."))
        if new and not trains_whole and module is head and head.bias is not None:
            what = f"new tokens need new rows of '{name}', which has a bias, so peft cannot train them alone. Add it to"
            raise UserError(tell("modules_to_save", f"{what} modules_to_save."))
        if new and not trains_whole:
            old = [asked.pop(key) for key in list(asked) if name.endswith(key)]
            asked[name] = sorted({*new, *(index for indices in old for index in indices)})
    settings.trainable_token_indices = asked or None


def wrap(model: PreTrainedModel, settings: Any, tell: Tell, *, on_warning: typing.Literal["error", "ignore"]) -> Any:
    """peft's model around `model`. What it warns of (a pattern that matches nothing, say) is an error, if so told."""
    from peft import get_peft_model

    settings.fan_in_fan_out = any(isinstance(module, Conv1D) for module in model.modules())
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings(on_warning, module="peft")
            warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")  # it sets what is right, then tells
            warnings.filterwarnings("ignore", category=FutureWarning)  # of transformers, to peft
            adapted = get_peft_model(model, settings)
    except Exception as error:  # of a setting that does not fit the model, each its own kind
        raise UserError(tell("", _refused(error))) from error
    settings.base_model_name_or_path = None  # a path: the same adapter would have other bytes elsewhere
    return adapted


# --- to store ---------------------------------------------------------------------------------------------------------


def is_adapted(model: Any) -> bool:
    """Whether `model` is a base with an adapter around it."""
    return hasattr(model, "get_base_model")


def weights_of(model: Any, weights: dict[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
    """The weights of the adapter under the names that peft stores, out of `weights` or those of the model."""
    from peft import get_peft_model_state_dict

    whole = model.state_dict() if weights is None else weights
    found = get_peft_model_state_dict(model, state_dict=whole, save_embedding_layers=False)
    return {name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in found.items()}


def write(model: Any, folder: Path, weights: dict[str, torch.Tensor] | None = None) -> None:
    """Write the two files of an adapter, so that `peft.PeftModel.from_pretrained(base, folder)` loads them.

    Equal adapters give equal bytes: no path of the base, and sets in order.
    """
    document = model.peft_config["default"].to_dict() | {"inference_mode": True, "base_model_name_or_path": None}
    document = {name: sorted(value) if isinstance(value, set) else value for name, value in document.items()}
    (folder / CONFIG).write_text(json.dumps(document, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    save_file(weights_of(model, weights), folder / WEIGHTS, metadata={"format": "pt"})


def read(model: Any, folder: Path) -> None:
    """Bring the adapter around `model` to the weights in `folder`. Raises: ValueError naming what does not fit."""
    from peft import set_peft_model_state_dict

    stored, wanted = load_file(folder / WEIGHTS), weights_of(model)
    bad = {
        "missing": sorted(wanted.keys() - stored.keys()),
        "unexpected": sorted(stored.keys() - wanted.keys()),
        "of another shape": [n for n in wanted.keys() & stored.keys() if wanted[n].shape != stored[n].shape],
    }
    if any(bad.values()):
        raise ValueError("; ".join(f"{kind}: {', '.join(names[:3])}" for kind, names in bad.items() if names))
    set_peft_model_state_dict(model, stored)


def facts(model: Any, parents: list[dict[str, Any]], *, tokenizer_digest: str) -> dict[str, Any]:
    """What the manifest of an adapter says of what it belongs to; `parents` are dataset, tokenizer, base."""
    base = {key: parents[2][key] for key in ("kind", "manifest_digest", "content_digest")}
    return {"base": base, "vocab_size": model.config.vocab_size, "tokenizer": tokenizer_digest}
