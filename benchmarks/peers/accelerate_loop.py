"""A plain Accelerate loop, as its examples have it: prepared model, optimizer, loader and schedule, `accumulate`.

AdamW as the examples make it, with its default kernel; variant `fused`: the fused one. The loss is the model's own.
"""

import contest
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM, get_scheduler


def main() -> None:
    options = contest.parse(__doc__)
    documents, clock = contest.Documents(options.documents), contest.Clock()
    torch.manual_seed(0)
    accelerator = Accelerator(
        cpu=True, mixed_precision={"bf16": "bf16", "fp32": "no"}[options.precision], gradient_accumulation_steps=1
    )
    model = LlamaForCausalLM(LlamaConfig(**options.model))
    kernel = {"fused": True} if options.variant == "fused" else {}
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=options.learning_rate,
        betas=contest.BETAS,
        weight_decay=contest.WEIGHT_DECAY,
        **kernel,
    )
    loader = DataLoader(
        documents, batch_size=options.batch_size, shuffle=True, drop_last=True, collate_fn=contest.padded
    )
    schedule = get_scheduler("constant", optimizer)
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
    model.train()
    for step, batch in enumerate(loader):
        if step == options.steps:
            break
        places = batch["input_ids"].numel()
        clock.feed(places, places)
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), contest.MAX_GRAD_NORM)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        value = loss.item()
        clock.tick()
    clock.report(model, packages=["transformers", "accelerate"], loss=value)


if __name__ == "__main__":
    main()
