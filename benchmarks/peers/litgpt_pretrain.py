"""litgpt's `pretrain`, which compiles the model, by its own function; the blocks come through a data module."""

import contest
import torch
from litgpt.args import EvalArgs, TrainArgs
from litgpt.config import Config
from litgpt.data import DataModule
from litgpt.pretrain import setup
from torch.utils.data import DataLoader, Dataset


class Rows(Dataset):
    """Blocks and the token after each, which litgpt shifts itself."""

    def __init__(self, documents: contest.Documents):
        self.documents = documents
        self.size = int(documents.lengths[0])

    def __len__(self) -> int:
        return len(self.documents) - 1

    def __getitem__(self, index: int) -> torch.Tensor:
        start = index * self.size
        return torch.from_numpy(self.documents.ids[start : start + self.size + 1].astype("int64"))


class Blocks(DataModule):
    """The blocks, and a clock: the loop asks for a batch when the step before it has ended."""

    def __init__(self, documents: contest.Documents, clock: contest.Clock, *, steps: int):
        super().__init__()
        self.rows, self.clock, self.steps, self.num_asked, self.batch_size = Rows(documents), clock, steps, 0, 1

    def connect(self, tokenizer=None, batch_size: int = 1, max_seq_length: int | None = None) -> None:
        self.batch_size = batch_size

    def collate(self, rows: list[torch.Tensor]) -> torch.Tensor:
        if self.num_asked:
            self.clock.tick()
        if self.num_asked == self.steps:
            self.clock.report(torch.nn.Module(), packages=["litgpt", "lightning"])
        self.num_asked += 1
        places = len(rows) * self.rows.size
        self.clock.feed(places, places)
        return torch.stack(rows)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.rows, batch_size=self.batch_size, shuffle=True, drop_last=True, collate_fn=self.collate)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.rows, batch_size=self.batch_size)


def main() -> None:
    options = contest.parse(__doc__)
    documents, clock = contest.Documents(options.documents), contest.Clock()
    shape, block_size = options.model, int(documents.lengths[0])
    config = Config(
        name="benchmark",
        block_size=block_size,
        vocab_size=shape["vocab_size"],
        padded_vocab_size=shape["vocab_size"],
        n_layer=shape["num_hidden_layers"],
        n_head=shape["num_attention_heads"],
        n_embd=shape["hidden_size"],
        intermediate_size=shape["intermediate_size"],
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=False,
        norm_class_name="RMSNorm",
        norm_eps=1e-6,
        mlp_class_name="LLaMAMLP",
    )
    setup(
        model_name="benchmark",
        model_config=config,
        out_dir=options.output_dir,
        precision={"bf16": "bf16-mixed", "fp32": "32-true"}[options.precision],
        data=Blocks(documents, clock, steps=options.steps),
        train=TrainArgs(
            save_interval=None,
            log_interval=1,
            global_batch_size=options.batch_size,
            micro_batch_size=options.batch_size,
            max_tokens=(options.steps + 1) * options.batch_size * block_size,
            max_norm=contest.MAX_GRAD_NORM,
            min_lr=options.learning_rate,
            lr_warmup_steps=1,
            tie_embeddings=shape["tie_word_embeddings"],
        ),
        eval=EvalArgs(interval=10**9, max_iters=1, final_validation=False),
        optimizer={
            "class_path": "torch.optim.AdamW",
            "init_args": {
                "lr": options.learning_rate,
                "betas": list(contest.BETAS),
                "weight_decay": contest.WEIGHT_DECAY,
            },
        },
        devices=1,
        logger_name="csv",
        seed=0,
    )


if __name__ == "__main__":
    main()
