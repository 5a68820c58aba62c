"""Every key of scripts/train.py: its type, range, default and meaning, in one line each.

Rule: as in `schema`, which holds the keys of the other stages: the line here is the documentation everywhere.
"""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from codex_accel.config import Section, StageConfig
from codex_accel.schema import DEVICE, BestMetric, Fraction, NonEmpty, Positive


def _length(value: Any) -> Any:
    """A stretch of the run: 100 (steps), 0.1 (fraction of the run), "2 epochs" or "2.5 epochs"."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    if isinstance(value, float) and 0.0 <= value <= 1.0:
        return value
    if isinstance(value, str) and value.endswith(" epochs"):
        number = value.removesuffix(" epochs")
        if number.replace(".", "", 1).isdecimal():
            return value
    raise ValueError("must be whole steps (100), a fraction of the run from 0.0 to 1.0 (0.1), or '2 epochs'.")


Length = Annotated[int | float | str, BeforeValidator(_length)]


def _betas(value: list[float]) -> list[float]:
    if len(value) != 2 or not all(0.0 <= beta < 1.0 for beta in value):
        raise ValueError("must be two numbers from 0 to below 1, such as [0.9, 0.95].")
    return value


class Model(Section):
    """Which model is trained: exactly one of `config`, `path` and `alias`."""

    path: str | None = Field(None, description="Local from_pretrained folder, run or checkpoint to start from")
    alias: str | None = Field(None, description="Name in `aliases`, which gives path, dtype, attention, quantization")
    aliases: NonEmpty = Field("configs/models.yaml", description="File of the aliases")
    config: dict[str, Any] | None = Field(
        None,
        description="transformers configuration with its model_type, for a start from random weights; the "
        "vocabulary size and special ids come from the tokenizer",
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="Type of the weights; bfloat16 halves their memory and rounds their updates"
    )
    attention: Literal["sdpa", "eager", "flash_attention_2"] = Field(
        "sdpa", description="Attention implementation of transformers; flash_attention_2 needs a GPU"
    )
    quantization: Literal["none", "8bit", "4bit"] = Field(
        "none", description="Weights of the base under an adapter, by bitsandbytes on a GPU"
    )

    @model_validator(mode="after")
    def _one_start(self) -> "Model":
        if sum(start is not None for start in (self.path, self.config, self.alias)) != 1:
            raise ValueError(
                "give exactly one of model.config (random weights), model.path (a local folder) and model.alias."
            )
        if self.config is not None and not isinstance(self.config.get("model_type"), str):
            raise ValueError("model.config needs model_type, such as model_type: llama.")
        return self


class Data(Section):
    """What is trained on."""

    dataset: NonEmpty = Field(description="Dataset folder made by prepare_data")
    train_split: NonEmpty = Field("train", description="Split to train on")
    validation_split: str | None = Field("validation", description="Split to evaluate on; null for none")
    block_size: Annotated[int, Field(ge=2)] = Field(description="Tokens in one training sequence")
    packing: Literal["concat", "best_fit", "group_by_length"] = Field(
        "concat",
        description="concat: one row, cut every block; best_fit: whole documents into blocks; group_by_length: a row a"
        " document, padded to the longest of its micro-batch",
    )
    overlong: Literal["split", "drop", "truncate", "error"] = Field(
        "split", description="What becomes of documents longer than a block, which concat always splits; counted"
    )
    isolate_documents: bool = Field(True, description="Documents that share a block do not see each other")

    @model_validator(mode="after")
    def _packing_fits(self) -> "Data":
        if self.packing == "concat" and self.overlong != "split":
            raise ValueError(
                f"data.overlong = {self.overlong} does not go with data.packing = concat, which cuts documents wherever"
                " a block ends. Take best_fit or group_by_length, or set overlong = split."
            )
        if self.packing != "concat" and not self.isolate_documents:
            raise ValueError(
                f"data.isolate_documents = false does not go with data.packing = {self.packing}, whose documents never"
                " see each other. Take concat, or set isolate_documents = true."
            )
        return self


class Training(Section):
    """Batches, length and precision."""

    micro_batch_size: Positive = Field(8, description="Sequences in one forward pass of one process")
    global_batch_size: Positive = Field(8, description="Sequences in one step over all processes")
    max_steps: Positive | None = Field(None, description="Stop after this many steps")
    max_epochs: Annotated[float, Field(gt=0)] | None = Field(
        None, description="Stop after this many passes over the data"
    )
    max_tokens: Positive | None = Field(None, description="Stop after this many tokens")
    max_time_s: Annotated[float, Field(gt=0)] | None = Field(
        None, description="Stop after this time; seconds, restarts included"
    )
    stop_at_step: Positive | None = Field(
        None, description="Save and stop at this step as a signal would; the schedule stays that of the whole run"
    )
    max_grad_norm: Annotated[float, Field(gt=0)] | None = Field(
        1.0, description="Clip the gradient norm to this; null: never"
    )
    loss_chunk_rows: Annotated[int, Field(ge=0)] | None = Field(
        None, description="Rows of logits made at a time; 0: all; null: 512 from 8192 ids on (16384 if compiled)"
    )
    device: Literal["auto", "cpu", "cuda"] = DEVICE
    gradient_checkpointing: bool = Field(
        False, description="Make activations again in the backward pass: less memory, about a third more time"
    )
    compile: bool = Field(False, description="Compile model and loss with torch.compile")
    tf32: bool = Field(False, description="Let float32 products on a GPU use TF32, which has 10 bits of mantissa")
    mixed_precision: Literal["no", "bf16", "fp16"] | None = Field(None, description="null: as accelerate config says")
    deterministic: bool = Field(
        False, description="Use deterministic GPU algorithms; on a CPU the results are so already"
    )
    on_nonfinite: Literal["stop", "skip"] = Field("stop", description="What a NaN or infinite loss or gradient does")

    @model_validator(mode="after")
    def _exact_or_fast(self) -> "Training":
        if self.deterministic and self.tf32:
            raise ValueError("training.tf32 does not go with training.deterministic. Set one of them to false.")
        return self

    @model_validator(mode="after")
    def _length_given(self) -> "Training":
        if self.max_steps is None and self.max_epochs is None and self.max_tokens is None:
            raise ValueError("give at least one of training.max_steps, training.max_epochs and training.max_tokens.")
        return self


class Optimizer(Section):
    """The optimizer and what its parameter groups differ in."""

    name: NonEmpty = Field("adamw", description="adamw (Loshchilov and Hutter 2019), sgd, or one of a plug-in")
    learning_rate: Annotated[float, Field(gt=0)] = Field(3e-4, description="Peak learning rate")
    betas: Annotated[list[float], AfterValidator(_betas)] = Field([0.9, 0.95], description="Decay of adamw's moments")
    eps: Annotated[float, Field(gt=0)] = Field(1e-8, description="Added to adamw's denominator")
    momentum: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="Momentum of sgd")
    weight_decay: Annotated[float, Field(ge=0)] = Field(
        0.1, description="Of matrices; biases, norms and embeddings have none"
    )
    decay_embeddings: bool = Field(False, description="Let weight_decay work on embedding matrices too")
    rate_scales: dict[str, Annotated[float, Field(ge=0)]] = Field(
        {}, description="Factor on the learning rate of parameters by a pattern of their name, such as '*embed*': 0.5"
    )
    options: dict[str, Any] = Field({}, description="Settings of a plug-in's optimizer")


class Schedule(Section):
    """Learning rate as a function of the step."""

    name: Literal["constant", "linear", "step", "cosine", "inverse_sqrt", "wsd"] = Field(
        "cosine", description="Shape after warm-up"
    )
    warmup: Length = Field(0, description="Linear warm-up: steps (100), fraction of the run (0.1) or '2 epochs'")
    final_lr_scale: Fraction = Field(
        0.1, description="Last learning rate as a share of the peak, for linear, cosine and wsd"
    )
    step_size: Length = Field(0.3, description="Distance of the drops of `step`: steps, fraction or epochs")
    gamma: Fraction = Field(0.1, description="Factor at each drop of `step`")
    decay: Length = Field(0.2, description="Decay at the end of wsd (warmup-stable-decay): steps, fraction or epochs")


class Evaluation(Section):
    """Evaluation on the validation split during training; it always runs at the end."""

    every_steps: Positive | None = Field(None, description="Steps between evaluations; null: only at the end")
    batch_size: Positive = Field(16, description="Windows in one forward pass")
    max_windows: Positive | None = Field(None, description="Score this many windows, spread evenly; null: all")
    more_splits: list[NonEmpty] = Field([], description="Splits to evaluate on besides; they decide nothing")


class Checkpoint(Section):
    """When the state of the run is saved; it always is at the end."""

    every_steps: Positive | None = Field(None, description="Steps between checkpoints; null: only at the end")
    keep_last: Positive = Field(2, description="Newest checkpoints to keep")
    keep_best: Annotated[int, Field(ge=0)] = Field(0, description="Best checkpoints to keep besides, by best_metric")
    best_metric: BestMetric = Field("loss", description="Value of the evaluations that tells which is best")
    on_failed_save: Literal["stop", "go_on"] = Field(
        "stop", description="What a save that fails does (disk full, I/O error); go_on trains on and tries the next"
    )


class Log(Section):
    """Lines in metrics.ndjson."""

    every_steps: Positive = Field(10, description="Steps between lines")
    max_bytes: Annotated[int, Field(ge=1024)] | None = Field(
        None, description="Size at which a log file gets a number and a new one begins; bytes; null: one file each"
    )
    system_metrics: bool = Field(False, description="Use and memory of CPU, GPU and disk, in system.ndjson")
    system_every_s: Annotated[float, Field(gt=0)] = Field(10.0, description="Time between those lines; seconds")


class Tracking(Section):
    """Trackers that get the lines of metrics.ndjson too."""

    log_with: list[Literal["tensorboard", "wandb", "mlflow"]] = Field(
        [], description="Trackers to use; metrics.ndjson is always written"
    )
    project: NonEmpty = Field("codex-accel", description="Project of wandb, experiment of mlflow")
    wandb_mode: Literal["offline", "online"] = Field("offline", description="online needs allow_network = true")
    mlflow_uri: str | None = Field(
        None, description="Tracking store; null: in the run folder; a remote one needs allow_network = true"
    )


class TrainConfig(StageConfig):
    """Keys of scripts/train.py."""

    output_dir: NonEmpty = Field(description="Run folder; a run that stands there goes on (see resume)")
    seed: int = Field(0, description="Seed of weights, order and dropout")
    dry_run: bool = Field(False, description="Print what would run and stop; nothing is written")
    resume: NonEmpty = Field(
        "auto", description="auto: go on if there is a checkpoint; never: refuse if so; or a checkpoint's path"
    )
    allow_drift: list[NonEmpty] = Field(
        [], description="Keys that may differ from the checkpoint's when a run goes on, such as training.max_steps"
    )
    model: Model
    data: Data
    training: Training
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    evaluation: Evaluation = Evaluation()
    checkpoint: Checkpoint = Checkpoint()
    log: Log = Log()
    tracking: Tracking = Tracking()
    peft: dict[str, Any] | None = Field(
        None, description="Train an adapter: keys of peft's LoraConfig, such as r, lora_alpha, target_modules, use_dora"
    )
    callbacks: dict[str, dict[str, Any]] = Field(
        {}, description="Functions called during the run, by name, with their settings, such as early_stopping: {}"
    )

    @model_validator(mode="after")
    def _best_is_evaluated(self) -> "TrainConfig":
        saved, evaluated, best = self.checkpoint.every_steps, self.evaluation.every_steps, self.checkpoint.keep_best
        if best and self.data.validation_split is None:
            raise ValueError(
                f"checkpoint.keep_best = {best} needs data.validation_split. Name one, or set keep_best = 0."
            )
        if best and (not saved or not evaluated or evaluated % saved):
            shown = ["null" if steps is None else steps for steps in (evaluated, saved)]
            raise ValueError(
                f"checkpoint.keep_best = {best} needs a checkpoint of each step that is evaluated, but "
                f"evaluation.every_steps = {shown[0]} is not a multiple of checkpoint.every_steps = {shown[1]}. "
                "Make it one, or set keep_best = 0."
            )
        if best and self.checkpoint.best_metric == "bits_per_byte" and self.evaluation.max_windows is not None:
            raise ValueError(
                "checkpoint.best_metric = bits_per_byte needs evaluation.max_windows = null: a part of the split has "
                "none. Or take loss."
            )
        return self

    @model_validator(mode="after")
    def _splits_differ(self) -> "TrainConfig":
        more, first = self.evaluation.more_splits, self.data.validation_split
        if more and (first is None or first in more or len(set(more)) < len(more)):
            raise ValueError(
                f"evaluation.more_splits = {more} must name other splits than data.validation_split = {first}, each "
                "once. Remove what is double, or name a validation split."
            )
        if "train" in more:
            raise ValueError(
                "evaluation.more_splits names train, which stands for the training steps in metrics.ndjson. Remove it."
            )
        return self

    @model_validator(mode="after")
    def _quantized_base_is_frozen(self) -> "TrainConfig":
        if self.model.quantization != "none" and self.peft is None:
            raise ValueError(
                f"model.quantization = {self.model.quantization} needs an adapter, since quantized weights cannot be "
                "trained. Add peft: {r: 8, target_modules: [...]}, or set quantization = none."
            )
        return self

    @model_validator(mode="after")
    def _tokens_of_a_step_known(self) -> "TrainConfig":
        if self.training.max_tokens is not None and self.data.packing == "group_by_length":
            raise ValueError(
                f"training.max_tokens = {self.training.max_tokens} does not go with data.packing = group_by_length,"
                " whose steps differ in tokens. Use training.max_epochs or training.max_steps."
            )
        return self

    @model_validator(mode="after")
    def _whole_accumulation(self) -> "TrainConfig":
        micro, total = self.training.micro_batch_size, self.training.global_batch_size
        if total % micro:
            raise ValueError(
                f"training.global_batch_size = {total} is not a multiple of training.micro_batch_size = {micro}. "
                f"Try global_batch_size = {(total // micro + 1) * micro}."
            )
        return self
