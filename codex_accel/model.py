"""The model: built from a configuration or loaded from a local folder, and checked against the tokenizer.

Rule: nothing in a model's configuration is ignored (transformers keeps unknown keys without a word), no code of a model
folder runs, and documents that share a block are isolated in fact, not by assumption.
"""

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from codex_accel import adapters, bases, cli, merging, redaction, seeds
from codex_accel.config import did_you_mean
from codex_accel.errors import UserError
from codex_accel.tokenizer import Tokenizer, defining_files
from codex_accel.train_schema import TrainConfig

transformers.utils.logging.disable_progress_bar()
# Rows are padded on the right, where a causal model cannot look, and a mask would undo the isolation of documents. And
# that new embeddings are drawn around the mean of the old ones is what we want.
NOISE = ("passing in an `attention_mask`", "The new embeddings will be", "The new lm_head weights will be")
logging.getLogger("transformers.modeling_utils").addFilter(
    lambda record: not any(words in record.getMessage() for words in NOISE)
)

INDEX = "model.safetensors.index.json"
SET_BY_US = ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id", "use_cache")


def build(
    config: TrainConfig, tokenizer: Tokenizer, *, start: Path | None, device: torch.device | str = "cpu"
) -> PreTrainedModel:
    """The model to train, on `device`, without a cache: from the folder `start`, or random weights by `config.seed`.

    Its weights have the type `model.dtype`. Tokens that the tokenizer has beyond the embeddings of `start` get rows of
    their own; `run.require_fitting_tokenizer` has seen that the others are those of `start`.
    """
    num_new_tokens, quantization = 0, adapters.quantization(config)
    dtype = getattr(torch, config.model.dtype)
    if start is not None:
        attention, verify = config.model.attention, config.verify
        model = load(
            start, attention=attention, key="model.path", verify=verify, quantization=quantization, dtype=dtype
        )
        num_new_tokens = _add_embeddings(model, config, tokenizer, start)
    elif config.peft is not None:
        what = "an adapter needs a base that exists; model.config gives random weights. Give model.path or model.alias."
        raise UserError(config.problem("peft", what))
    else:
        architecture = _transformers_config(config, tokenizer)
        torch.manual_seed(seeds.derive(config.seed, "weights"))
        try:
            model = AutoModelForCausalLM.from_config(
                architecture, attn_implementation=config.model.attention, dtype=dtype
            )
        except (KeyError, ValueError) as error:  # some classes check their values only here
            raise UserError(config.problem("model.config", _refused(error))) from error
    model.config.use_cache = False  # with a cache object, packed documents would see each other
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.eos_id, pad_token_id=tokenizer.pad_id
    )
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest is not None and config.data.block_size > longest:
        what = f"{config.data.block_size} is more than the model's max_position_embeddings = {longest}."
        raise UserError(config.problem("data.block_size", what))
    if config.peft is not None:
        model = adapters.attach(model, config, num_new_tokens=num_new_tokens)
    if config.training.gradient_checkpointing:
        try:
            model.activation_checkpointing_enable({"use_reentrant": False})
        except ValueError as error:
            what = f"true, but {model.config.model_type} models cannot do it. Say false."
            raise UserError(config.problem("training.gradient_checkpointing", what)) from error
    return model if quantization is not None else model.to(device)  # type: ignore[arg-type]


def _add_embeddings(model: PreTrainedModel, config: TrainConfig, tokenizer: Tokenizer, start: Path) -> int:
    """Rows of embeddings, and of an untied head, for ids that the model has none for; returns how many, and prints it.

    They are drawn close around the mean of the old rows (Hewitt 2021, "Initializing New Word Embeddings for Pretrained
    Language Models"), by `config.seed`; the old rows stay as they are.
    """
    num_embeddings: int = model.get_input_embeddings().weight.shape[0]  # type: ignore[index,assignment]
    num_new = tokenizer.vocab_size - num_embeddings
    if num_new <= 0:
        return 0
    if not defining_files(bases.tokenizer_beside(start, key="model.path")):
        what = f"has {num_embeddings} embeddings, the dataset's tokenizer {tokenizer.vocab_size} ids, and there is no "
        what += "tokenizer beside the model that could tell which of them are new. Copy its tokenizer.json there."
        raise UserError(config.problem("model.path", what))
    torch.manual_seed(seeds.derive(config.seed, "new tokens"))
    model.resize_token_embeddings(tokenizer.vocab_size)
    if cli.is_main_process():
        print(f"note    {num_new} new tokens: embeddings resized from {num_embeddings:,} to {tokenizer.vocab_size:,}")
    return num_new


def _transformers_config(config: TrainConfig, tokenizer: Tokenizer) -> Any:
    """The transformers configuration of the `model.config` section, every key of it known to its class."""
    values = dict(config.model.config or {})
    model_type = values.pop("model_type")
    if model_type not in CONFIG_MAPPING:
        what = f"unknown model type {model_type!r}. {did_you_mean(model_type, CONFIG_MAPPING)[:200]}"
        raise UserError(config.problem("model.config.model_type", what))
    class_ = CONFIG_MAPPING[model_type]
    known = {field.name for field in dataclasses.fields(class_)} | set(class_.attribute_map)
    problems = []
    for name in values:
        if name in SET_BY_US:
            problems.append(
                config.problem(f"model.config.{name}", "is set from the tokenizer and the loop. Remove it.")
            )
        elif name not in known:
            what = f"unknown key of a {model_type} configuration. {did_you_mean(name, sorted(known))}"
            problems.append(config.problem(f"model.config.{name}", what))
    if problems:
        raise UserError(*problems)
    try:
        return AutoConfig.for_model(
            model_type,
            vocab_size=tokenizer.vocab_size,
            bos_token_id=tokenizer.bos_id,
            eos_token_id=tokenizer.eos_id,
            pad_token_id=tokenizer.pad_id,
            **values,
        )
    except Exception as error:  # each model class raises its own kinds for values that do not fit together
        raise UserError(config.problem("model.config", _refused(error))) from error


def _refused(error: Exception) -> str:
    reason = redaction.words(error.__cause__ or error, 10_000)
    hint = " Try model.attention=eager." if "scaled_dot_product_attention" in reason else ""
    return f"is refused by transformers: {reason[:200]}.{hint}"


def load(
    folder: Path,
    *,
    attention: str = "sdpa",
    key: str = "checkpoint",
    verify: bool = True,
    base: Path | None = None,
    quantization: Any = None,
    dtype: torch.dtype = torch.float32,
) -> PreTrainedModel:
    """A causal language model from a local `from_pretrained` folder with safetensors weights, all of type `dtype`.

    An adapter is merged into its base, which lies where its manifest says, or at `base`; that base is checked against
    the recorded digests if `verify`. `quantization` is a configuration for transformers, of a plain model alone.
    """
    *adapted, plain = bases.chain(folder, verify=verify, key=key, base=base)
    if adapted and quantization is not None:
        what = "is an adapter, and quantized weights take none in. Merge it first: scripts/export_model.py"
        raise UserError(f"{key} = '{folder}': {what} --checkpoint {folder}.")
    first_dtype = torch.float32 if adapted else dtype  # so that nothing is rounded before it is all added up
    model = _load_plain(plain, attention=attention, key=key, quantization=quantization, dtype=first_dtype)
    for adapter in reversed(adapted):
        model = merging.merge(model, adapter, key=key)
    if dtype != first_dtype:
        for parameter in model.parameters():  # not model.to, which would round the angles of rotary positions too
            parameter.data = parameter.data.to(dtype)
        model.config.dtype = dtype
    return model


def _load_plain(folder: Path, *, attention: str, key: str, quantization: Any, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a folder with config.json, checked before and after transformers has read it."""
    if not (folder / "config.json").is_file():
        raise UserError(f"{key} = '{folder}': has no config.json. Give a folder that from_pretrained loads.")
    if not list(folder.glob("*.safetensors")):
        raise UserError(
            f"{key} = '{folder}': has no *.safetensors weights. Pickled weights are not loaded; convert them."
        )
    _require_own_attention(folder, key=key)
    _require_shards_inside(folder, key=key)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            attn_implementation=attention,
            dtype=dtype,
            output_loading_info=True,
            **(
                {}
                if quantization is None
                else {"quantization_config": quantization, "device_map": {"": torch.cuda.current_device()}}
            ),
        )
    except Exception as error:  # each model class raises its own kinds for a configuration that does not fit together
        reason = f"{type(error).__name__}: {redaction.words(error)}"
        raise UserError(f"{key} = '{folder}': cannot be loaded ({reason}). Mend its configuration.") from error
    model, loading = loaded
    bad = {kind: sorted(map(str, loading[f"{kind}_keys"])) for kind in ("missing", "unexpected", "mismatched")}
    if any(bad.values()):
        told = "; ".join(f"{kind}: {', '.join(names[:3])}" for kind, names in bad.items() if names)
        raise UserError(f"{key} = '{folder}': its weights do not fit its config.json ({told}).")
    return model


def _require_own_attention(folder: Path, *, key: str) -> None:
    """Raise UserError if config.json names a kernel of a repository, as `_attn_implementation: owner/name` does.

    transformers looks for it, and runs its code, before it heeds the implementation that the caller asks for.
    """
    path = folder / "config.json"
    try:
        level = [json.loads(path.read_bytes())]
    except (ValueError, RecursionError) as error:
        what = f"is not JSON ({' '.join(str(error).split())}). Copy the folder again."
        raise UserError(f"{key} = '{path}': {what}") from error
    while level:
        for name, value in ((name, value) for item in level if isinstance(item, dict) for name, value in item.items()):
            if name.endswith("_implementation") and "/" in json.dumps(value):
                what = f"{name} = {value!r} is code of a repository, which is not run. Remove the key."
                raise UserError(f"{key} = '{path}': {what}")
        level = [
            inner
            for item in level
            for inner in (item.values() if isinstance(item, dict) else item if isinstance(item, list) else ())
        ]


def _require_shards_inside(folder: Path, *, key: str) -> None:
    """Raise UserError unless an index of weights names safetensors files of this very folder: transformers follows it.

    The index is that of `save_pretrained`: {"weight_map": {parameter: file name}}.
    """
    path = folder / INDEX
    if not path.exists():
        return
    try:
        names = set(json.loads(path.read_bytes())["weight_map"].values())
        bad = sorted(name for name in names if Path(name).name != name or not name.endswith(".safetensors"))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        what = f"is no index of weights ({type(error).__name__}). Copy the folder again."
        raise UserError(f"{key} = '{path}': {what}") from error
    if bad:
        what = f"names {bad[0]!r}, which is no *.safetensors file of this folder. Copy the folder again."
        raise UserError(f"{key} = '{path}': {what}")


def count_parameters(model: torch.nn.Module) -> dict[str, int]:
    """Parameters in all and those that train, shared ones counted once."""
    return {
        "num_parameters": sum(p.numel() for p in model.parameters()),
        "num_trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }
