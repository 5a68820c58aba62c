"""A bare PyTorch loop: the model of transformers, fused AdamW, clipped gradients, the loss of float32 logits.

Variants: `compiled` compiles model and loss; `grouped` sorts the documents and makes batches of about one length. Rows
are padded on the right, where a causal model cannot look, so no attention mask is given.
"""

import contextlib

import contest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM


def main() -> None:
    options = contest.parse(__doc__)
    documents, clock = contest.Documents(options.documents), contest.Clock()
    torch.manual_seed(0)
    model = LlamaForCausalLM._from_config(LlamaConfig(**options.model), attn_implementation="sdpa")
    model.config.use_cache = False
    model.train()
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=options.learning_rate,
        betas=contest.BETAS,
        weight_decay=contest.WEIGHT_DECAY,
        fused=True,
    )
    half = options.precision == "bf16"

    def loss_of(input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16) if half else contextlib.nullcontext():
            logits = model(input_ids=input_ids, use_cache=False).logits
        shifted = F.pad(labels[:, 1:], (0, 1), value=contest.IGNORE)
        return F.cross_entropy(logits.flatten(0, 1).float(), shifted.flatten(), ignore_index=contest.IGNORE)

    if options.variant == "compiled":
        loss_of = torch.compile(loss_of)
    batches = contest.indices(documents, batch_size=options.batch_size, grouped=options.variant == "grouped")
    for _ in range(options.steps):
        chosen = next(batches)
        batch = contest.padded([documents[index] for index in chosen])
        clock.feed(batch["input_ids"].numel(), int(documents.lengths[chosen].sum()))
        loss = loss_of(**batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), contest.MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
        value = loss.item()
        clock.tick()
    clock.report(model, packages=["transformers"], loss=value)


if __name__ == "__main__":
    main()
