"""Every key of evaluation and generation: its type, range, default and meaning, in one line each.

Rule: that of `schema`, whose line is the documentation everywhere. Nothing here imports torch or a model library.
"""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from codex_accel.config import Section, StageConfig
from codex_accel.schema import DEVICE, OVERWRITE, Fraction, NonEmpty, Positive, Source, output

CHECKPOINT: Any = Field(description="Checkpoint, model, adapter or run folder, or any local from_pretrained folder")
BAD_SAMPLE: Any = Field(
    "error", description="What a sample that cannot be scored does: error, or skip, counted and listed in the report"
)


TaskName = Annotated[str, Field(pattern="^[A-Za-z0-9_-]{1,64}$")]


class Sampling(Section):
    """How text is generated."""

    max_new_tokens: Positive = Field(128, description="Tokens to add at most")
    stop: list[NonEmpty] = Field([], description="End at the first of these texts; it is not part of the output")
    temperature: Annotated[float, Field(ge=0)] = Field(0.0, description="0: greedy; 1: the model's own distribution")
    top_k: Positive | None = Field(None, description="Draw from the k likeliest tokens only")
    top_p: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None, description="Draw from the likeliest tokens of this total probability"
    )
    seed: int = Field(0, description="Seed of the draws")

    @model_validator(mode="after")
    def _divides(self) -> "Sampling":
        if 0 < self.temperature < 1e-4:
            raise ValueError(f"temperature = {self.temperature} is too small to divide by. Use 0 for greedy.")
        return self


class FewShot(Section):
    """Worked examples before each prompt."""

    num: Annotated[int, Field(ge=0)] = Field(0, description="Examples before each prompt")
    file: Source | None = Field(None, description="Where they are drawn from; null: the task's own file")
    seed: int = Field(0, description="Seed of the draw, which is another for each sample; never the sample itself")
    separator: str = Field("\n\n", description="Between an example and what follows it")


class Task(Section):
    """Samples of a raw file, what the model is asked, and how its answers are scored."""

    kind: Literal["generate", "choice"] = Field(
        "generate", description="generate: the model writes; choice: the likeliest of several continuations"
    )
    file: Source = Field(description="Records; messages, or prompt and completion, or templates below name the fields")
    prompt: str | None = Field(None, description="Jinja template of the prompt over a record's fields")
    target: str | None = Field(
        None, description="Jinja template of the reference; for choice, of the number (from 0) or text of the right one"
    )
    references: str | None = Field(
        None,
        description="Jinja expression of a list of accepted answers, such as answers.text, instead of target; for"
        " choice, of the text of the right one",
    )
    choices: NonEmpty | None = Field(
        None, description="For choice: Jinja expression of a list of texts, such as endings, or [right, wrong]"
    )
    delimiter: str | None = Field(
        None, description="Between a prompt and a choice, or the answer of an example; null: a space after a template"
    )
    weight: str | None = Field(None, description="Jinja expression of the sample's weight in weighted_accuracy")
    chat: bool = Field(False, description="Put the prompt into the tokenizer's chat template, as a user's message")
    system: str | None = Field(None, description="System message before it")
    few_shot: FewShot = FewShot()
    sampling: Sampling = Sampling()
    metrics: dict[str, dict[str, Any]] = Field(
        {}, description="Metrics by name, with their settings, such as exact_match: {}; empty: exact_match, or acc"
    )
    max_samples: Positive | None = Field(None, description="Take this many samples, spread evenly; null: all")
    on_long: Literal["error", "skip", "truncate"] = Field(
        "error", description="What a prompt without room in the context does; truncate cuts its beginning; counted"
    )

    @model_validator(mode="after")
    def _complete(self) -> "Task":
        if (self.kind == "choice") != (self.choices is not None):
            raise ValueError(
                f"kind = {self.kind!r}, and choices {'are' if self.choices else 'are not'} given. Mend one."
            )
        if self.target is not None and self.references is not None:
            raise ValueError("give target or references, not both.")
        if self.prompt is None and self.file.prompt is None and self.file.messages is None:
            raise ValueError("has no prompt. Give a template, or name the fields file.prompt and file.completion.")
        if self.prompt is not None and self.target is None and self.references is None:
            raise ValueError("has no answer to hold the output against. Give target, or references.")
        if self.system is not None and not self.chat:
            raise ValueError("system needs chat = true.")
        if self.kind == "choice" and (self.weight is not None or self.sampling != Sampling()):
            raise ValueError("weight and sampling would have no effect on kind = 'choice'. Remove them.")
        return self

    @model_validator(mode="after")
    def _is_text(self) -> "Task":
        texts = {"system": self.system, "delimiter": self.delimiter, "few_shot.separator": self.few_shot.separator}
        for key, text in texts.items():
            try:
                (text or "").encode()
            except UnicodeEncodeError:
                raise ValueError(f"{key} holds bytes that are not UTF-8. Give plain text.") from None
        return self


class EvaluateConfig(StageConfig):
    """Keys of scripts/evaluate.py."""

    checkpoint: NonEmpty | None = Field(
        None, description="Checkpoint, model, adapter or run folder, or any local from_pretrained folder"
    )
    output_dir: NonEmpty = output("the report")
    overwrite: bool = OVERWRITE
    predictions: str | None = Field(
        None, description="Score the `prediction`s of this JSONL file by `references` or `reference`, without a model"
    )
    metrics: dict[str, dict[str, Any]] = Field(
        {}, description="Metrics of predictions by name, with their settings; empty: all that need no more settings"
    )
    tasks: dict[TaskName, Task] = Field({}, description="Tasks by name; they are done instead of scoring a dataset")
    dataset: str | None = Field(None, description="Prepared dataset; null: the one that the checkpoint was trained on")
    split: NonEmpty = Field("test", description="Split of the dataset")
    file: Source | None = Field(None, description="Score this raw file instead of a dataset")
    add_bos: bool = Field(
        True, description="Put BOS before each document of a raw file and each prompt, if the tokenizer has it"
    )
    add_eos: bool = Field(False, description="Put EOS after each document of a raw file, as a target")
    context_length: Annotated[int, Field(ge=2)] | None = Field(
        None, description="Tokens in one window; null: the model's own"
    )
    stride: Positive | None = Field(None, description="Targets scored in each window after the first; null: all of it")
    batch_size: Positive | None = Field(
        None, description="Windows or prompts in one forward pass; null: by batch_tokens; does not change the numbers"
    )
    batch_tokens: Positive = Field(8192, description="Tokens in one forward pass, padding included, of new text too")
    packed: bool = Field(False, description="Score several windows in one row, apart; does not change the numbers")
    max_windows: Positive | None = Field(None, description="Score this many windows, spread evenly; null: all")
    compression: bool = Field(False, description="Report zlib -9 and lzma bits per byte of the same documents too")
    self_check: Annotated[int, Field(ge=0)] = Field(
        0, description="Score this many samples again, one by one, and report the largest difference"
    )
    on_bad_sample: Literal["error", "skip"] = BAD_SAMPLE
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = Field(0.95, description="Level of the bootstrap intervals")
    num_resamples: Positive = Field(1000, description="Resamples of the bootstrap")
    seed: int = Field(0, description="Seed of the bootstrap")
    device: Literal["auto", "cpu", "cuda"] = DEVICE

    @property
    def bootstrap(self) -> dict[str, Any]:
        """The settings of the intervals."""
        return {"confidence": self.confidence, "num_resamples": self.num_resamples, "seed": self.seed}

    @model_validator(mode="after")
    def _compression_needs_all(self) -> "EvaluateConfig":
        if self.compression and self.max_windows is not None:
            raise ValueError("compression compares whole documents, so it needs max_windows = null.")
        return self

    @model_validator(mode="after")
    def _one_thing_to_score(self) -> "EvaluateConfig":
        given = [key for key in ("checkpoint", "predictions") if getattr(self, key) is not None]
        if len(given) != 1:
            raise ValueError("give either checkpoint, a model to score, or predictions, a file with its answers.")
        named = [key for key in ("predictions", "tasks", "dataset", "file") if getattr(self, key)]
        if len(named) > 1:
            raise ValueError(f"{' and '.join(named)} are given; an evaluation has one of them. Remove the others.")
        of_documents = ("compression", "stride", "max_windows", "split", "add_eos")
        of_models = ("add_bos", "self_check", "packed", "context_length", "batch_size", "batch_tokens")
        idle: tuple[str, ...] = ("split",) if self.file else ("add_bos", "add_eos")
        if self.tasks or self.predictions:
            idle = of_documents if self.tasks else (*of_documents, *of_models)
        if ignored := [key for key in idle if getattr(self, key) != type(self).model_fields[key].default]:
            what = next((key for key in ("tasks", "predictions", "file") if getattr(self, key)), "a dataset")
            raise ValueError(f"{' and '.join(ignored)} would have no effect on {what}. Remove what is too much.")
        if self.metrics and self.predictions is None:
            raise ValueError("metrics are those of predictions. Give tasks.<name>.metrics instead.")
        return self


class GenerateConfig(Sampling, StageConfig):
    """Keys of scripts/generate.py."""

    checkpoint: NonEmpty = CHECKPOINT
    prompt: str = Field("", description="Text to go on from; empty: from the BOS token")
    prompts: NonEmpty | None = Field(
        None, description="JSONL of prompts instead, each with `prompt` or `messages`, and any `id`; -: standard input"
    )
    plain: bool = Field(False, description="Lines of prompts are plain text, each a prompt; so are those of a terminal")
    output: NonEmpty | None = Field(None, description="JSONL file for the answers to prompts; null: standard output")
    overwrite: bool = Field(False, description="Replace the output file if it exists")
    chat: bool = Field(False, description="Put the prompt into the chat template, as a user's message")
    system: str | None = Field(None, description="System message before it, and before messages that begin without one")
    chat_template: str | None = Field(
        None, description="File with the Jinja template that renders messages; null: the tokenizer's own"
    )
    add_bos: bool = Field(True, description="Put BOS before the prompt, if the tokenizer has it")
    batch_tokens: Positive = Field(8192, description="Tokens of one batch, prompts and new ones together")
    device: Literal["auto", "cpu", "cuda"] = DEVICE

    @model_validator(mode="after")
    def _is_text(self) -> "GenerateConfig":
        for key in ("prompt", "system"):
            try:
                (getattr(self, key) or "").encode()
            except UnicodeEncodeError:
                raise ValueError(f"{key} holds bytes that are not UTF-8. Give plain text.") from None
        return self

    @model_validator(mode="after")
    def _keys_have_an_effect(self) -> "GenerateConfig":
        if self.prompts is not None and self.prompt:
            raise ValueError("prompt and prompts are given. Give one of them.")
        for key in ("output", "plain"):
            if self.prompts is None and getattr(self, key):
                raise ValueError(f"{key} needs prompts, a file of them or - for standard input.")
        if self.overwrite and self.output is None:
            raise ValueError("overwrite needs output, the file to replace.")
        for key in ("system", "chat_template"):
            if getattr(self, key) is not None and not self.chat and (self.prompts is None or self.plain):
                raise ValueError(f"{key} needs chat = true.")
        return self


class CompareConfig(StageConfig):
    """Keys of scripts/compare_reports.py."""

    a: NonEmpty = Field(description="Evaluation or run folder")
    b: NonEmpty = Field(description="The one to hold against it")
    show: Annotated[int, Field(ge=0)] = Field(20, description="Changed samples to print, most changed first")
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = Field(0.95, description="Level of the paired intervals")
    num_resamples: Positive = Field(10_000, description="Resamples of the paired bootstrap")
    seed: int = Field(0, description="Seed of the bootstrap")
    alpha: Fraction = Field(0.05, description="A difference with a smaller p-value is marked")
    as_json: bool = Field(False, description="Print one JSON document instead of lines; --json for short")
