"""transformers' Trainer with its defaults, on a plain dataset of blocks."""

import contest
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments, set_seed


def main() -> None:
    options = contest.parse(__doc__)
    documents, clock = contest.Documents(options.documents), contest.Clock()

    class Ticks(TrainerCallback):
        def on_step_end(self, *arguments, **_) -> None:
            clock.tick()

    def collate(rows: list[dict[str, list[int]]]) -> dict:
        batch = contest.padded(rows)
        clock.feed(batch["input_ids"].numel(), sum(len(row["input_ids"]) for row in rows))
        return batch

    set_seed(0)
    arguments = TrainingArguments(
        output_dir=str(options.output_dir),
        per_device_train_batch_size=options.batch_size,
        max_steps=options.steps,
        learning_rate=options.learning_rate,
        adam_beta2=contest.BETAS[1],
        weight_decay=contest.WEIGHT_DECAY,
        bf16=options.precision == "bf16",
        use_cpu=True,
        save_strategy="no",
        report_to="none",
    )
    model = LlamaForCausalLM(LlamaConfig(**options.model))
    trainer = Trainer(model=model, args=arguments, train_dataset=documents, data_collator=collate, callbacks=[Ticks()])
    trainer.train()
    clock.report(model, packages=["transformers", "accelerate"])


if __name__ == "__main__":
    main()
