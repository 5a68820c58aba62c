"""Text from a model: one prompt in, its continuation out."""

from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from codex_accel.errors import UserError
from codex_accel.evaluate_schema import GenerateConfig
from codex_accel.tokenizer import Tokenizer


@torch.no_grad()
def generate(model: PreTrainedModel, tokenizer: Tokenizer, config: GenerateConfig) -> dict[str, Any]:
    """The continuation of `config.prompt`: `text`, `ids` (new ones), `prompt_ids`, `finish_reason` (eos or length).

    Greedy if temperature is 0, else drawn from the softmax of logits / temperature, cut by top_k and top_p, with
    `config.seed`. The prompt starts with BOS where the tokenizer has one.

    Raises: UserError if there is no token to start from, or the prompt leaves no room in the model's context.
    """
    prompt_ids = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    prompt_ids += tokenizer.encode([config.prompt])[0]
    if not prompt_ids:
        raise UserError(config.problem("prompt", "is empty and the tokenizer has no BOS token. Give a prompt."))
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest is not None and len(prompt_ids) + config.max_new_tokens > longest:
        what = (
            f"{config.max_new_tokens} after {len(prompt_ids)} prompt tokens goes beyond the model's {longest} "
            f"positions. Take {max(0, longest - len(prompt_ids))} at most."
        )
        raise UserError(config.problem("max_new_tokens", what))
    sampling: dict[str, Any] = {"do_sample": False}
    if config.temperature > 0:
        sampling = {"do_sample": True, "temperature": config.temperature, "top_k": config.top_k or 0}
        sampling["top_p"] = config.top_p if config.top_p is not None else 1.0
    torch.manual_seed(config.seed)
    model.generation_config = GenerationConfig()  # generate() takes from there whatever is not set below
    input_ids = torch.tensor([prompt_ids], device=model.device)
    output = model.generate(  # type: ignore[operator]
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        generation_config=GenerationConfig(
            max_new_tokens=config.max_new_tokens,
            eos_token_id=tokenizer.eos_id,
            pad_token_id=tokenizer.pad_id if tokenizer.pad_id is not None else tokenizer.eos_id,
            bos_token_id=tokenizer.bos_id,
            use_cache=True,
            **sampling,
        ),
    )
    ids = output[0, len(prompt_ids) :].tolist()
    ended = bool(ids) and ids[-1] == tokenizer.eos_id
    return {
        # as part of the whole: alone, a SentencePiece-like decoder would drop the space that it begins with
        "text": tokenizer.decode(prompt_ids + ids).removeprefix(tokenizer.decode(prompt_ids)),
        "ids": ids,
        "prompt_ids": prompt_ids,
        "finish_reason": "eos" if ended else "length",
    }
