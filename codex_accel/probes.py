"""What a model is tried for before the first step: order in time, documents kept apart, a loss without logits.

Rule: what the loop relies on is seen to hold for this model, on this device, not assumed of its architecture.
"""

from typing import Any

import torch
from transformers import PreTrainedModel

from codex_accel import loss, redaction
from codex_accel.errors import UserError
from codex_accel.packing import Batch
from codex_accel.train_schema import TrainConfig

LARGE_VOCABULARY = 8_192  # from there on chunks of 512 rows take less time and memory than full logits (measured)
LARGE_COMPILED = 16_384  # below it a graph of the whole loss is faster (measured)
_CANNOT = "this architecture cannot keep the documents of one block apart"
_WAY_OUT = (
    "Say data.packing=group_by_length, which gives each a row of its own, or data.packing=concat with "
    "data.isolate_documents=false to let them see each other, or take another architecture."
)


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
        what = f"the model cannot run on a block of its own: {redaction.words(error)}. Mend its configuration."
        raise UserError(config.problem("model", what)) from error
    if moved > 1e-6:
        what = "is not causal: changing the last token moved the logits before it, so it sees what it is to predict."
        raise UserError(config.problem("model", f"{what} Take a decoder such as llama or gpt2."))


@torch.no_grad()
def require_isolation(model: PreTrainedModel, config: TrainConfig, batch: Batch) -> None:
    """Feed a packed block as it is trained on, change its first document, and see that nothing of the others moves.

    `batch` is one block in which a document begins after another (`Blocks.with_boundary`).

    Raises: UserError if something does: this architecture cannot keep documents of one block apart.
    """
    assert batch.position_ids is not None
    input_ids, position_ids = (torch.from_numpy(a).to(model.device) for a in (batch.input_ids, batch.position_ids))
    end = int((position_ids[0] == 0).nonzero()[1])  # of the first document
    changed = input_ids.clone()
    changed[0, :end] = (changed[0, :end] + 1) % model.config.vocab_size  # all of it: a convolution sees only the last
    try:
        moved = _largest_move(model, input_ids, changed, slice(end, None), position_ids=position_ids)
    except TypeError as error:
        raise UserError(config.problem("data.isolate_documents", f"{_CANNOT} ({error}). {_WAY_OUT}")) from error
    if moved > 1e-6:
        what = f"{_CANNOT}: changing one moved what comes out for others by {moved:.2g} of the largest. {_WAY_OUT}"
        raise UserError(config.problem("data.isolate_documents", what))


def loss_chunks(model: PreTrainedModel, config: TrainConfig, *, mixed_precision: str) -> dict[str, Any]:
    """How the loss is made: `chunk_rows` of logits at a time, 0 for all at once, and a `note` on why, which may be "".

    Raises: UserError if chunks are asked for by name and this model, or fp16, cannot have them.
    """
    asked, size = config.training.loss_chunk_rows, model.config.vocab_size
    large = LARGE_COMPILED if config.training.compile else LARGE_VOCABULARY
    if asked == 0 or (asked is None and size < large):
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

    The model must end in its head (`loss.ends_in_head`), and the sum by chunks must be that of full logits to 1e-5.
    """
    head = model.get_output_embeddings()
    if type(head) is not torch.nn.Linear:  # an adapter around it, say, would be left out in silence
        return f"the head of this {model.config.model_type} model is a {type(head).__name__}, not a Linear"
    input_ids, was_training = _probe_block(model, config), model.training
    inputs = {"input_ids": input_ids, "use_cache": False}
    model.eval()
    try:
        if not loss.ends_in_head(model, model.device):
            return f"this {model.config.model_type} model changes the logits that its head gives"
        full = loss.from_logits(model, labels=input_ids, **inputs)
        summed = loss.in_head(head, chunk_rows=rows)(model, labels=input_ids, **inputs)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        return f"this {model.config.model_type} model does not run so: {redaction.words(error, 200)}"
    finally:
        model.train(was_training)
    off = float((summed - full).abs() / full)
    return None if off <= 1e-5 else f"its loss by chunks is off by {off:.2g} of that of full logits"


def _probe_block(model: PreTrainedModel, config: TrainConfig) -> torch.Tensor:
    """Token ids 0, 1, 2, ... (1, T) on the model's device, T at most 16."""
    size = min(config.data.block_size, 16)
    return torch.arange(size, device=model.device).remainder(model.config.vocab_size)[None]


def _largest_move(
    model: PreTrainedModel, before: torch.Tensor, after: torch.Tensor, where: slice, **inputs: torch.Tensor
) -> float:
    """How far what goes into the head at `where` differs between two inputs, as a share of the largest; 0.0 if masked.

    Not the logits that come out: those of a whole block may be more than memory holds, and they tell no more.
    """
    was_training, head = model.training, model.get_output_embeddings()
    model.eval()
    if head is not None:
        vars(head)["forward"] = lambda hidden: hidden
    try:
        first, second = (
            model(input_ids=ids, use_cache=False, **inputs).logits[0, where].float() for ids in (before, after)
        )
    finally:
        if head is not None:
            del head.forward
        model.train(was_training)
    return float((first - second).abs().max() / first.abs().max())
