"""Every key of every stage: its type, range, default and meaning, in one line each.

Rule: the line here is the documentation everywhere: `--help`, `configs/base/`, the JSON Schema and the error messages
are made from it. Nothing here imports torch or a model library.
"""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from codex_accel.config import Section, StageConfig

Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
NonEmpty = Annotated[str, Field(min_length=1)]
BestMetric = Literal["loss", "perplexity", "bits_per_byte", "token_accuracy"]


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


class Source(Section):
    """Raw input: which files, how they are read, and which fields are used."""

    path: NonEmpty = Field(description="File, folder or glob; folders and globs are read in sorted order")
    format: Literal["auto", "jsonl", "json", "csv", "tsv", "text", "parquet"] = Field(
        "auto",
        description="auto goes by the suffix: .jsonl, .ndjson, .json (one array), .csv, .tsv, .txt, .md, .py, .parquet,"
        " also with .gz or .zst",
    )
    encoding: str = Field("utf-8", description="Text encoding of the files, by its Python name")
    unit: Literal["line", "paragraph", "file"] = Field("line", description="What one record of a text file is")
    delimiter: Annotated[str, Field(min_length=1, max_length=1)] | None = Field(
        None, description="Between the fields of csv and tsv; null: a comma for csv, a tab for tsv"
    )
    quoted: bool = Field(
        True, description="Fields of csv and tsv may be quoted as RFC 4180 says; false: quotes are text"
    )
    text: str = Field(
        "text", description="Field that holds the text; `value` takes a JSON value that is no object as the field value"
    )
    prompt: str | None = Field(
        None, description="Field with the prompt; then `completion` is needed and `text` is unused"
    )
    completion: str | None = Field(None, description="Field with the completion, the only part that is a target")
    messages: str | None = Field(
        None, description="Field with a list of {role, content}, of which the assistant's are targets; `text` is unused"
    )
    chat_template: str | None = Field(
        None, description="File with the Jinja template that renders messages; null: the tokenizer's own"
    )
    required: list[NonEmpty] = Field([], description="More fields that each record must have")
    split: str | None = Field(None, description="Split of all its records, for split.method = given")

    @model_validator(mode="after")
    def _shape(self) -> "Source":
        if (self.prompt is None) != (self.completion is None):
            raise ValueError("prompt and completion belong together. Name both fields or neither.")
        if self.messages is not None and self.prompt is not None:
            raise ValueError("give messages, or prompt and completion, not both.")
        if self.chat_template is not None and self.messages is None:
            raise ValueError("chat_template renders messages. Name their field, or remove the template.")
        return self


def _output(what: str) -> Any:
    return Field(description=f"Folder to write {what} to; it appears only when whole")


_OVERWRITE = Field(False, description="Replace output_dir if it exists")
_DEVICE: Any = Field("auto", description="auto: a GPU if there is one, else the CPU")


class CorpusConfig(StageConfig):
    """Keys of scripts/quickstart_corpus.py."""

    output_dir: NonEmpty = _output("modules.jsonl and functions.jsonl")
    overwrite: bool = _OVERWRITE
    max_modules: Positive | None = Field(None, description="Stop after this many modules; null takes all")


class SpecialTokens(Section):
    """Names of the special tokens; their ids are 0, 1, 2, ... in this order."""

    pad: NonEmpty = Field("[PAD]", description="Padding; id 0")
    bos: NonEmpty = Field("[BOS]", description="Start of a document; id 1")
    eos: NonEmpty = Field("[EOS]", description="End of a document; id 2")
    unk: NonEmpty = Field(
        "[UNK]", description="Stands for unknown characters; id 3, for types char and sentencepiece only"
    )
    additional: list[NonEmpty] = Field([], description="More special tokens, after these")

    @model_validator(mode="after")
    def _distinct(self) -> "SpecialTokens":
        names = [self.pad, self.bos, self.eos, self.unk, *self.additional]
        if len(set(names)) < len(names):
            raise ValueError(f"two special tokens have one name in {names}. Give each its own.")
        return self


class TokenizerConfig(StageConfig):
    """Keys of scripts/train_tokenizer.py."""

    output_dir: NonEmpty = _output("the tokenizer")
    overwrite: bool = _OVERWRITE
    sources: list[Source] = Field(description="What to train on", min_length=1)
    dry_run: bool = Field(False, description="Print what would be trained on and stop; nothing is written")
    type: Literal["bpe", "unigram", "sentencepiece", "char"] = Field(
        "bpe",
        description="bpe, unigram: over bytes, any text comes back; sentencepiece: over characters, with a "
        "tokenizer.model; char: one id a character",
    )
    algorithm: Literal["unigram", "bpe"] = Field("unigram", description="Algorithm of type sentencepiece")
    vocab_size: Annotated[int, Field(ge=2)] = Field(
        4096, description="Ids in all, special tokens included; a limit that small input may not reach"
    )
    min_frequency: Positive = Field(2, description="Occurrences that a merge of type bpe needs")
    byte_fallback: bool = Field(
        True, description="For sentencepiece: rare characters become their bytes; false: the unknown token"
    )
    normalizer: Literal["none", "nfc", "nfkc", "lowercase"] = Field(
        "none", description="Change of the text before encoding; not for sentencepiece"
    )
    pre_tokenizer: Literal["gpt2", "gpt4", "whitespace", "none"] = Field(
        "gpt2",
        description="How bpe and unigram cut text into words: GPT-2's or GPT-4's pattern, white space, not at all",
    )
    max_train_bytes: Positive = Field(
        16 * 2**20,
        description="Text that sentencepiece trains on at most, lines drawn by the seed; bytes, 30 of memory each",
    )
    seed: int = Field(0, description="Seed of the draw of max_train_bytes")
    special_tokens: SpecialTokens = SpecialTokens()

    @model_validator(mode="after")
    def _normalizer_of_tokenizers(self) -> "TokenizerConfig":
        if self.type == "sentencepiece" and self.normalizer != "none":
            raise ValueError(
                f"normalizer = {self.normalizer!r} does not go with type: sentencepiece, because `tokenizers` cannot "
                "repeat its normalization. Use normalizer: none, or another type."
            )
        return self


class InspectConfig(StageConfig):
    """Keys of scripts/inspect_tokenizer.py."""

    action: Literal["validate", "encode", "decode", "list"] = Field(description="What to do")
    tokenizer: str | None = Field(None, description="Tokenizer folder, or a sentencepiece .model file; not for list")
    reference: str | None = Field(None, description="Tokenizer to compare with, for validate")
    model: str | None = Field(None, description="Model folder whose vocabulary must hold every id, for validate")
    file: Source | None = Field(None, description="Texts to measure on, for validate")
    by: str | None = Field(None, description="Field of the file to group the measures by, such as lang")
    text: str | None = Field(None, description="Text to encode; null: each line of standard input")
    ids: list[Annotated[int, Field(ge=0)]] | None = Field(
        None, description="Ids to decode; null: each line of standard input, as ids with spaces or a JSON list"
    )
    folders: list[NonEmpty] = Field(
        ["runs"], description="Where list looks, besides the cache of Hugging Face; every folder below"
    )

    @model_validator(mode="after")
    def _complete(self) -> "InspectConfig":
        if self.action != "list" and self.tokenizer is None:
            raise ValueError(f"{self.action} needs tokenizer. Give --tokenizer FOLDER.")
        if self.action == "validate" and self.file is None:
            raise ValueError("validate needs texts. Give file='{path: FILE}'.")
        return self


def _ratios(value: dict[str, float]) -> dict[str, float]:
    if not value or any(share <= 0 for share in value.values()) or abs(sum(value.values()) - 1.0) > 1e-9:
        raise ValueError("must be shares above 0 that add up to 1, such as {train: 0.9, validation: 0.1}.")
    return value


class Split(Section):
    """How records are divided."""

    method: Literal["hash", "exact", "position", "given"] = Field(
        "hash",
        description="hash: by content, stable when files are added; exact: sizes to the record; "
        "position: first to last, inside the text if there is one record; given: by sources[].split",
    )
    ratios: Annotated[dict[str, float], AfterValidator(_ratios)] = Field(
        {"train": 0.9, "validation": 0.05, "test": 0.05}, description="Share of each split, in order; unused for given"
    )
    seed: int = Field(0, description="Seed of hash and exact")
    key: str | None = Field(None, description="Field whose value decides for hash, so that equal values stay together")

    @model_validator(mode="after")
    def _key_needs_hash(self) -> "Split":
        if self.key is not None and self.method != "hash":
            raise ValueError(f"key = {self.key!r} works with method: hash only. Remove it or change the method.")
        return self


Sources = list[Source]  # `list` is a key below


class PrepareConfig(StageConfig):
    """Keys of scripts/prepare_data.py."""

    output_dir: NonEmpty = _output("the dataset")
    overwrite: bool = _OVERWRITE
    dry_run: bool = Field(False, description="Print what would be read and stop; nothing is written")
    list: bool = Field(False, description="Print the prepared datasets beside output_dir with their sizes, and stop")
    list_split: str | None = Field(None, description="Print the record ids of this split of output_dir, and stop")
    gc: bool = Field(
        False, description="Remove datasets beside output_dir whose raw files or tokenizer are gone, and stop"
    )
    tokenizer: NonEmpty = Field(description="Tokenizer folder")
    sources: Sources = Field(description="What to prepare", min_length=1)
    split: Split = Split()
    add_bos: bool = Field(True, description="Put the BOS token before each document")
    add_eos: bool = Field(True, description="Put the EOS token after each document")
    on_bad_record: Literal["quarantine", "error"] = Field("quarantine", description="Set bad records aside, or stop")
    max_bad_fraction: Fraction = Field(0.01, description="Stop if more than this share of the records is bad")
    max_record_bytes: Positive = Field(64 * 2**20, description="Longer records are bad; bytes")
    allow_no_target: bool = Field(False, description="Keep documents without a target token instead of stopping")
    duplicates: Literal["keep", "remove"] = Field(
        "keep", description="Records of equal content are counted and listed; remove: one of them is kept"
    )
    near_duplicates: Annotated[float, Field(gt=0.0, le=1.0)] | None = Field(
        None,
        description="Treat records as duplicates too if an earlier one has this Jaccard similarity of 5-word shingles, "
        "by MinHash; null: not looked for",
    )
    unit_bytes: Annotated[int, Field(gt=0, le=1 << 60)] = Field(
        64 * 2**20, description="Input that goes into one set of shards; bytes of a file"
    )
    num_threads: Positive | None = Field(
        None, description="Threads that tokenize, in each process; null: the cores shared among the processes"
    )


class Model(Section):
    """Which model is trained: exactly one of `config` and `path`."""

    path: str | None = Field(None, description="Local from_pretrained folder to start from")
    config: dict[str, Any] | None = Field(
        None,
        description="transformers configuration with its model_type, for a start from random weights; the "
        "vocabulary size and special ids come from the tokenizer",
    )
    attention: Literal["sdpa", "eager"] = Field("sdpa", description="Attention implementation of transformers")

    @model_validator(mode="after")
    def _one_start(self) -> "Model":
        if (self.path is None) == (self.config is None):
            raise ValueError("give exactly one of model.config (random weights) and model.path (a local folder).")
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
        None, description="Rows of logits made at a time; 0: all; null: 512 if the vocabulary has 16384 or more"
    )
    mixed_precision: Literal["no", "bf16", "fp16"] | None = Field(None, description="null: as accelerate config says")
    deterministic: bool = Field(
        False, description="Use deterministic GPU algorithms; on a CPU the results are so already"
    )
    on_nonfinite: Literal["stop", "skip"] = Field("stop", description="What a NaN or infinite loss or gradient does")

    @model_validator(mode="after")
    def _length_given(self) -> "Training":
        if self.max_steps is None and self.max_epochs is None and self.max_tokens is None:
            raise ValueError("give at least one of training.max_steps, training.max_epochs and training.max_tokens.")
        return self


class Optimizer(Section):
    """AdamW (Loshchilov and Hutter 2019)."""

    name: Literal["adamw"] = Field("adamw", description="Optimizer")
    learning_rate: Annotated[float, Field(gt=0)] = Field(3e-4, description="Peak learning rate")
    betas: Annotated[list[float], AfterValidator(_betas)] = Field([0.9, 0.95], description="Decay of the two moments")
    eps: Annotated[float, Field(gt=0)] = Field(1e-8, description="Added to the denominator")
    weight_decay: Annotated[float, Field(ge=0)] = Field(
        0.1, description="Of matrices; biases, norms and embeddings have none"
    )
    decay_embeddings: bool = Field(False, description="Let weight_decay work on embedding matrices too")


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


class EvaluateConfig(StageConfig):
    """Keys of scripts/evaluate.py."""

    checkpoint: NonEmpty = Field(description="Checkpoint, model or run folder, or any local from_pretrained folder")
    output_dir: NonEmpty = _output("the report")
    overwrite: bool = _OVERWRITE
    dataset: str | None = Field(None, description="Prepared dataset; null: the one that the checkpoint was trained on")
    split: NonEmpty = Field("test", description="Split of the dataset")
    file: Source | None = Field(None, description="Score this raw file instead of a dataset")
    add_bos: bool = Field(True, description="Put BOS before each document of a raw file, if the tokenizer has it")
    add_eos: bool = Field(False, description="Put EOS after each document of a raw file, as a target")
    context_length: Annotated[int, Field(ge=2)] | None = Field(
        None, description="Tokens in one window; null: the model's own"
    )
    stride: Positive | None = Field(None, description="Targets scored in each window after the first; null: all of it")
    batch_size: Positive = Field(16, description="Windows in one forward pass; does not change the numbers")
    max_windows: Positive | None = Field(None, description="Score this many windows, spread evenly; null: all")
    compression: bool = Field(False, description="Report zlib -9 and lzma bits per byte of the same documents too")
    device: Literal["auto", "cpu", "cuda"] = _DEVICE

    @model_validator(mode="after")
    def _compression_needs_all(self) -> "EvaluateConfig":
        if self.compression and self.max_windows is not None:
            raise ValueError("compression compares whole documents, so it needs max_windows = null.")
        return self


class GenerateConfig(StageConfig):
    """Keys of scripts/generate.py."""

    checkpoint: NonEmpty = Field(description="Checkpoint, model or run folder, or any local from_pretrained folder")
    prompt: str = Field("", description="Text to go on from; empty: from the BOS token")
    max_new_tokens: Positive = Field(128, description="Tokens to add at most")
    temperature: Annotated[float, Field(ge=0)] = Field(0.0, description="0: greedy; 1: the model's own distribution")
    top_k: Positive | None = Field(None, description="Draw from the k likeliest tokens only")
    top_p: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None, description="Draw from the likeliest tokens of this total probability"
    )
    seed: int = Field(0, description="Seed of the draws")
    device: Literal["auto", "cpu", "cuda"] = _DEVICE

    @model_validator(mode="after")
    def _sampling(self) -> "GenerateConfig":
        try:
            self.prompt.encode()
        except UnicodeEncodeError:
            raise ValueError("prompt holds bytes that are not UTF-8. Give plain text.") from None
        if 0 < self.temperature < 1e-4:
            raise ValueError(f"temperature = {self.temperature} is too small to divide by. Use 0 for greedy.")
        return self


class VerifyConfig(StageConfig):
    """Keys of scripts/verify.py."""

    path: NonEmpty = Field(description="Artefact folder to check")
    recursive: bool = Field(False, description="Check its parents too, back to the raw files")
    digest: str | None = Field(
        None, description="SHA-256 that its manifest.json must have, as printed when it was made"
    )


class CheckpointsConfig(StageConfig):
    """Keys of scripts/checkpoints.py."""

    run: NonEmpty = Field(description="Run folder")
    action: Literal["list", "verify", "prune"] = Field(
        "list", description="list: what is there; verify: hash every checkpoint; prune: delete by the rules below"
    )
    keep_last: Positive | None = Field(
        None, description="Newest checkpoints to keep; null: as the run's own config says"
    )
    keep_best: Annotated[int, Field(ge=0)] | None = Field(
        None, description="Best checkpoints to keep besides; null: as the run's own config says"
    )
    best_metric: BestMetric | None = Field(None, description="Value that tells which is best; null: as the run says")
    as_json: bool = Field(False, description="Print one JSON document instead of lines; --json for short")


class ReplayConfig(StageConfig):
    """Keys of scripts/replay.py."""

    checkpoint: NonEmpty = Field(description="Checkpoint to make again from the one before it")
    start: NonEmpty = Field(
        "auto", description="auto: from the newest older checkpoint of the run; scratch: from step 0; or its path"
    )
    output_dir: str | None = Field(None, description="Keep the replayed run here; null: in a folder that is removed")


class TableConfig(StageConfig):
    """Keys of scripts/quickstart_table.py."""

    root: NonEmpty = Field("runs/quickstart", description="Folder of the quickstart run")
