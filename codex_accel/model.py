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

from codex_accel import loss, seeds
from codex_accel.config import did_you_mean
from codex_accel.errors import UserError
from codex_accel.schema import TrainConfig
from codex_accel.tokenizer import Tokenizer

transformers.utils.logging.disable_progress_bar()
# Rows are padded on the right, where a causal model cannot look, and a mask would undo the isolation of documents.
logging.getLogger("transformers.modeling_utils").addFilter(
    lambda record: "passing in an `attention_mask`" not in record.getMessage()
)

ADAPTER, INDEX = "adapter_config.json", "model.safetensors.index.json"
LARGE_VOCABULARY = 16_384  # of 2048 tokens, full logits and their gradients take 408 MB there, chunks 90 MB (measured)
SET_BY_US = ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id", "use_cache")


def build(config: TrainConfig, tokenizer: Tokenizer, *, start: Path | None) -> PreTrainedModel:
    """The model to train, in float32, without a cache: from the folder `start`, or fresh weights from `config.seed`."""
    if start is not None:
        model = load(start, attention=config.model.attention, key="model.path")
        num_embeddings = model.get_input_embeddings().weight.shape[0]  # type: ignore[index]
        if tokenizer.vocab_size > num_embeddings:
            what = (
                f"has {num_embeddings} embeddings, the dataset's tokenizer {tokenizer.vocab_size} ids. They do not fit."
            )
            raise UserError(config.problem("model.path", what))
    else:
        architecture = _transformers_config(config, tokenizer)
        torch.manual_seed(seeds.derive(config.seed, "weights"))
        try:
            model = AutoModelForCausalLM.from_config(
                architecture, attn_implementation=config.model.attention, dtype=torch.float32
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
    return model


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
    reason = " ".join(str(error.__cause__ or error).split())
    hint = " Try model.attention=eager." if "scaled_dot_product_attention" in reason else ""
    return f"is refused by transformers: {reason[:200]}.{hint}"


def load(folder: Path, *, attention: str = "sdpa", key: str = "checkpoint") -> PreTrainedModel:
    """A causal language model from a local `from_pretrained` folder with safetensors weights, in float32."""
    if not (folder / "config.json").is_file():
        raise UserError(f"{key} = '{folder}': has no config.json. Give a folder that from_pretrained loads.")
    if not list(folder.glob("*.safetensors")):
        raise UserError(
            f"{key} = '{folder}': has no *.safetensors weights. Pickled weights are not loaded; convert them."
        )
    if (folder / ADAPTER).exists():  # transformers would load it without a word where peft is installed
        raise UserError(f"{key} = '{folder / ADAPTER}': adapters are not loaded. Merge it into the weights first.")
    _require_own_attention(folder, key=key)
    _require_shards_inside(folder, key=key)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            attn_implementation=attention,
            dtype=torch.float32,
            output_loading_info=True,
        )
    except Exception as error:  # each model class raises its own kinds for a configuration that does not fit together
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
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


@torch.no_grad()
def require_causal(model: PreTrainedModel, config: TrainConfig) -> None:
    """Run the model on a short block, change its last token, and see that no earlier logit moves.

    Raises: UserError if the model cannot run, or if a position sees what comes after it, so that its loss means
    nothing.
    """
    input_ids = _probe_block(model, config)
    changed = input_ids.clone()
    changed[0, -1] = (changed[0, -1] + 1) % model.config.vocab_size
    try:
        moved = _largest_move(model, input_ids, changed, slice(None, -1))
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        what = (
            f"the model cannot run on a block of its own: {' '.join(str(error).split())[:300]}. Mend its configuration."
        )
        raise UserError(config.problem("model", what)) from error
    if moved > 1e-6:
        what = "is not causal: changing the last token moved the logits before it, so it sees what it is to predict."
        raise UserError(config.problem("model", f"{what} Take a decoder such as llama or gpt2."))


@torch.no_grad()
def require_isolation(model: PreTrainedModel, config: TrainConfig) -> None:
    """Feed a block of two documents, change the first, and see that no logit of the second moves.

    Raises: UserError if it does: this architecture cannot keep documents of one block apart.
    """
    input_ids = _probe_block(model, config)
    half, size = input_ids.shape[1] // 2, input_ids.shape[1]
    position_ids = torch.cat([torch.arange(half), torch.arange(size - half)])[None].to(model.device)
    changed = input_ids.clone()
    changed[0, :half] = (changed[0, :half] + 1) % model.config.vocab_size  # all of it: a convolution sees only the last
    try:
        moved = _largest_move(model, input_ids, changed, slice(half, None), position_ids=position_ids)
    except TypeError as error:
        raise UserError(config.problem("data.isolate_documents", f"{_CANNOT} ({error}). {_WAY_OUT}")) from error
    if moved > 1e-6:
        what = f"{_CANNOT}: changing one moved the logits of the next by {moved:.2g} of the largest. {_WAY_OUT}"
        raise UserError(config.problem("data.isolate_documents", what))


def loss_chunks(model: PreTrainedModel, config: TrainConfig, *, mixed_precision: str) -> dict[str, Any]:
    """How the loss is made: `chunk_rows` of logits at a time, 0 for all at once, and a `note` on why, which may be "".

    Raises: UserError if chunks are asked for by name and this model, or fp16, cannot have them.
    """
    asked, size = config.training.loss_chunk_rows, model.config.vocab_size
    if asked == 0 or (asked is None and size < LARGE_VOCABULARY):
        return {"chunk_rows": 0, "note": ""}
    rows = asked or loss.CHUNK_ROWS
    fp16 = "in fp16 gradients are not to be made before the loss is scaled" if mixed_precision == "fp16" else None
    if reason := fp16 or _why_no_chunks(model, config, rows):
        if asked:
            what = f"{asked}, but {reason}. Set it to 0 for full logits."
            raise UserError(config.problem("training.loss_chunk_rows", what))
        return {"chunk_rows": 0, "note": f"full logits of {size:,} tokens, because {reason}"}
    return {"chunk_rows": rows, "note": f"by chunks of {rows} rows of logits, {size:,} tokens in the vocabulary"}


@torch.no_grad()
def _why_no_chunks(model: PreTrainedModel, config: TrainConfig, rows: int) -> str | None:
    """Why the head cannot give the loss in place of logits, found by trying; None if it can.

    A head that gives numbers of our own must have them come out of the model as they are (so a soft cap is found out
    however small the logits are), and the sum by chunks must be that of full logits to 1e-5.
    """
    head = model.get_output_embeddings()
    if type(head) is not torch.nn.Linear:  # an adapter around it, say, would be left out in silence
        return f"the head of this {model.config.model_type} model is a {type(head).__name__}, not a Linear"
    input_ids, was_training = _probe_block(model, config), model.training
    inputs = {"input_ids": input_ids, "use_cache": False}
    given = torch.linspace(-200, 200, input_ids.shape[1] * head.out_features, device=model.device)
    given = given.view(*input_ids.shape, -1)  # (1, T, V)
    model.eval()
    try:
        full = loss.from_logits(model, labels=input_ids, **inputs)
        handle = head.register_forward_hook(lambda *_: given)
        try:
            unchanged = torch.equal(model(**inputs).logits.float(), given)
        finally:
            handle.remove()
        summed = loss.in_head(head, chunk_rows=rows)(model, labels=input_ids, **inputs) if unchanged else full
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        return f"this {model.config.model_type} model does not run so: {' '.join(str(error).split())[:200]}"
    finally:
        model.train(was_training)
    if not unchanged:
        return f"this {model.config.model_type} model changes the logits that its head gives"
    off = float((summed - full).abs() / full)
    return None if off <= 1e-5 else f"its loss by chunks is off by {off:.2g} of that of full logits"


_CANNOT = "this architecture cannot keep the documents of one block apart"
_WAY_OUT = (
    "Say data.packing=group_by_length, which gives each a row of its own, or data.packing=concat with "
    "data.isolate_documents=false to let them see each other, or take another architecture."
)


def _probe_block(model: PreTrainedModel, config: TrainConfig) -> torch.Tensor:
    """Token ids 0, 1, 2, ... (1, T) on the model's device, T at most 16."""
    size = min(config.data.block_size, 16)
    return torch.arange(size, device=model.device).remainder(model.config.vocab_size)[None]


def _largest_move(
    model: PreTrainedModel, before: torch.Tensor, after: torch.Tensor, where: slice, **inputs: torch.Tensor
) -> float:
    """How far the logits at `where` differ between two inputs, as a share of the largest; 0.0 where a mask holds."""
    was_training = model.training
    model.eval()
    try:
        first, second = (
            model(input_ids=ids, use_cache=False, **inputs).logits[0, where].float() for ids in (before, after)
        )
    finally:
        model.train(was_training)
    return float((first - second).abs().max() / first.abs().max())
