"""Every key of every stage but training and evaluation: its type, range, default and meaning, in one line each.

Rule: the line here is the documentation everywhere: `--help`, `configs/base/`, the JSON Schema and the error messages
are made from it. Nothing here imports torch or a model library.
"""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from codex_accel.config import Safety, Section, StageConfig

Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
NonEmpty = Annotated[str, Field(min_length=1)]
BestMetric = Literal["loss", "perplexity", "bits_per_byte", "token_accuracy"]


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


def output(what: str) -> Any:
    """The key output_dir of a stage that writes `what`."""
    return Field(description=f"Folder to write {what} to; it appears only when whole")


OVERWRITE = Field(False, description="Replace output_dir if it exists")
DEVICE: Any = Field("auto", description="auto: a GPU if there is one, else the CPU")


class CorpusConfig(StageConfig):
    """Keys of scripts/quickstart_corpus.py."""

    output_dir: NonEmpty = output("modules.jsonl and functions.jsonl")
    overwrite: bool = OVERWRITE
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
        for names in ([self.pad, self.bos, self.eos, self.unk], self.additional):
            if len(set(names)) < len(names):
                raise ValueError(f"two special tokens have one name in {names}. Give each its own.")
        return self


class TokenizerConfig(StageConfig):
    """Keys of scripts/train_tokenizer.py."""

    output_dir: NonEmpty = output("the tokenizer")
    overwrite: bool = OVERWRITE
    sources: list[Source] = Field([], description="What to train on")
    base: str | None = Field(
        None,
        description="Tokenizer folder to take over instead: special_tokens.additional come after its ids, and nothing"
        " is trained",
    )
    chat_template: str | None = Field(
        None, description="File with a Jinja template to put beside it; null: the one of base, if any"
    )
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
    def _trained_or_taken_over(self) -> "TokenizerConfig":
        if bool(self.sources) == (self.base is not None):
            raise ValueError("give either sources to train on, or base, a tokenizer to add tokens to.")
        if self.base is None:
            special = self.special_tokens
            if double := [
                name for name in (special.pad, special.bos, special.eos, special.unk) if name in special.additional
            ]:
                raise ValueError(f"special_tokens: two have one name, {double[0]!r}. Give each its own.")
            return self
        ours = ("type", "algorithm", "vocab_size", "min_frequency", "byte_fallback", "normalizer", "pre_tokenizer")
        given = [key for key in ours if getattr(self, key) != type(self).model_fields[key].default]
        given += [f"special_tokens.{key}" for key in ("pad", "bos", "eos", "unk")
                  if getattr(self.special_tokens, key) != SpecialTokens.model_fields[key].default]  # fmt: skip
        if given:
            raise ValueError(f"{', '.join(given)} cannot be changed in a base. Remove what is given besides base.")
        if not self.special_tokens.additional and self.chat_template is None:
            raise ValueError("base alone changes nothing. Give special_tokens.additional or chat_template too.")
        return self

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


class DataSafety(Safety):
    """Masking of secrets in the data too, not only in what is logged."""

    on_secret: Literal["redact", "quarantine"] = Field(
        "redact", description="Records with secrets: redact masks these; quarantine sets the whole record aside"
    )


Sources = list[Source]  # `list` is a key below


class PrepareConfig(StageConfig):
    """Keys of scripts/prepare_data.py."""

    safety: DataSafety = DataSafety()
    output_dir: NonEmpty = output("the dataset")
    overwrite: bool = OVERWRITE
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


class ExportConfig(StageConfig):
    """Keys of scripts/export_model.py."""

    checkpoint: NonEmpty = Field(description="Checkpoint, model, adapter or run folder, or any local adapter folder")
    output_dir: NonEmpty = output("the model")
    overwrite: bool = OVERWRITE
    base: str | None = Field(None, description="Where the adapter's base lies now; null: where its manifest says")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="Type of the weights; the adapter is added in float32 and the sum is rounded"
    )


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
