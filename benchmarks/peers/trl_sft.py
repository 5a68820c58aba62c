"""TRL's SFTTrainer on prompt and completion in tokens, so that nothing is tokenized twice.

Variants: `default` (its defaults; gradient checkpointing is one of them), `packing` (the same with blocks of 512), and
the settings that may be its best: `grouped` (no checkpointing, batches by length), `padding_free` (no checkpointing,
a batch in one row) and `wrapped` (no checkpointing, blocks of 512 cut anywhere, whose documents see each other).
"""

import contest
import datasets
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback, set_seed
from trl import SFTConfig, SFTTrainer

BLOCK_SIZE, ROWS_OF_BLOCKS = 512, 2  # about the tokens of eight documents
VARIANTS = {
    "default": {},
    "packing": {"packing": True, "max_length": BLOCK_SIZE},
    "grouped": {"gradient_checkpointing": False, "train_sampling_strategy": "group_by_length"},
    "padding_free": {"gradient_checkpointing": False, "padding_free": True, "max_length": None},
    "wrapped": {
        "gradient_checkpointing": False,
        "packing": True,
        "packing_strategy": "wrapped",
        "max_length": BLOCK_SIZE,
    },
}


def main() -> None:
    options = contest.parse(__doc__)
    documents, clock = contest.Documents(options.documents), contest.Clock()
    settings = VARIANTS[options.variant]
    packed = bool(settings.get("packing"))

    class Ticks(TrainerCallback):
        def on_step_end(self, *arguments, **_) -> None:
            clock.tick()

    datasets.disable_progress_bars()
    datasets.disable_caching()
    rows = datasets.Dataset.from_list([documents[index] for index in range(len(documents))])
    if settings.get("train_sampling_strategy"):
        rows = rows.add_column("length", documents.lengths.tolist())
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(options.documents.parent / "tokenizer" / "tokenizer.json"),
        bos_token="[BOS]",
        eos_token="[EOS]",
        pad_token="[PAD]",
    )
    set_seed(0)
    arguments = SFTConfig(
        output_dir=str(options.output_dir),
        per_device_train_batch_size=ROWS_OF_BLOCKS if packed else options.batch_size,
        max_steps=options.steps,
        learning_rate=options.learning_rate,
        adam_beta2=contest.BETAS[1],
        weight_decay=contest.WEIGHT_DECAY,
        bf16=options.precision == "bf16",
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        **settings,
    )
    model = LlamaForCausalLM(LlamaConfig(**options.model))
    trainer = SFTTrainer(
        model=model, args=arguments, train_dataset=rows, processing_class=tokenizer, callbacks=[Ticks()]
    )
    collate = trainer.data_collator

    def counted(rows: list[dict]) -> dict:
        clock.feed(0, sum(len(row["input_ids"]) for row in rows))
        batch = collate(rows)
        clock.fed[-1] = (batch["input_ids"].numel(), clock.fed[-1][1])
        return batch

    trainer.data_collator = counted
    trainer.train()
    clock.report(model, packages=["transformers", "accelerate", "trl"])


if __name__ == "__main__":
    main()
