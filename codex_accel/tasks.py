"""Records of raw files into samples: what a model is asked, and what is right.

Rule: a sample is a function of its record and the task's settings; text of a record never becomes template code or a
special token, and a record that gives no sample is located, with a reason that does not repeat its data.
"""

import collections
import hashlib
import json
import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from codex_accel import files, formats, reasons, seeds, sources, templates
from codex_accel.errors import UserError
from codex_accel.evaluate_schema import EvaluateConfig, Task
from codex_accel.lines import Reading
from codex_accel.sources import RawFile

MAX_RECORD_BYTES = 1 << 30
TOLD = 10  # bad samples that an error names
T = TypeVar("T")
Messages = tuple[tuple[str, str], ...]  # (role, content)


@dataclass(frozen=True)
class Sample:
    """What is asked, and what is right."""

    file: str
    line: int
    id: str  # 32 hexadecimal digits of SHA-256 over what follows
    prompt: str  # with messages: their words, for people to read
    messages: Messages | None  # to be rendered by the chat template, instead of the prompt
    references: tuple[str, ...]
    choices: tuple[str, ...] = ()
    answer: int = 0  # which of the choices is right
    weight: float = 1.0
    prediction: str = ""  # of a file of predictions
    given_id: str | int | None = None  # of a file of predictions


@dataclass(frozen=True)
class Bad:
    """A record that gives no sample, or a sample that cannot be scored."""

    file: str
    line: int
    reason: str
    is_example: bool = False  # asked for as a worked example, not as a sample


@dataclass(frozen=True)
class _Item:
    """A record as question and answer, before its worked examples."""

    file: str
    line: int
    turns: Messages  # the last is the question; all of them for records with messages
    references: tuple[str, ...]
    choices: tuple[str, ...]
    answer: int
    weight: float

    @property
    def answer_text(self) -> str:
        return self.choices[self.answer] if self.choices else self.references[0]


# --- which records ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Input:
    """A task's files, found and readable."""

    raw: list[RawFile]
    shots: list[RawFile]
    item: Callable[[Mapping[str, Any]], tuple[Messages, tuple[str, ...], tuple[str, ...], int, float]]
    fields: tuple[str, ...]


def resolve(config: EvaluateConfig) -> dict[str, Input]:
    """Files and templates of all tasks. Raises UserError with all that cannot be found or read as a template."""

    def resolved(name: str) -> Input:
        task, key = config.tasks[name], f"tasks.{name}"
        parts: dict[str, Callable[[], Any]] = {
            "raw": lambda: sources.resolve([task.file], config_problem=config.problem, key=f"{key}.file"),
            "made": lambda: _maker(config, key, task),
        }
        if task.few_shot.num and (file := task.few_shot.file) is not None:
            parts["shots"] = lambda: sources.resolve([file], config_problem=config.problem, key=f"{key}.few_shot.file")
        part = of_each(parts, lambda which: parts[which]())
        return Input(part["raw"], part.get("shots", part["raw"] if task.few_shot.num else []), *part["made"])

    return of_each(config.tasks, resolved)


def of_each(names: Iterable[str], make: Callable[[str], T]) -> dict[str, T]:
    """What `make` gives for each name. Raises UserError with the problems of all."""
    found: dict[str, T] = {}
    problems: list[str] = []
    for name in names:
        try:
            found[name] = make(name)
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(*dict.fromkeys(problems))
    return found


def read(name: str, task: Task, found: Input) -> tuple[list[Sample], list[Bad]]:
    """Samples in the order of their records, and what gives none: of `max_samples` records, spread over all.

    Worked examples are drawn for each sample from all others of other content, by `few_shot.seed` and the sample.

    Raises: UserError if there are fewer of those than asked for, or no record at all.
    """
    items = _items(found.raw, found)
    if not items:
        raise UserError(f"tasks.{name}: {task.file.path!r} holds no record. Name another file.")
    chosen = spread(items, task.max_samples)
    good, bad = [each for each in chosen if isinstance(each, _Item)], [each for each in chosen if isinstance(each, Bad)]
    if not task.few_shot.num:
        return [_sample(task, item, []) for item in good], bad
    pool = items if found.shots == found.raw else _items(found.shots, found)
    bad += [replace(each, is_example=True) for each in pool if isinstance(each, Bad) and each not in bad]
    return _with_examples(name, task, good, [each for each in pool if isinstance(each, _Item)]), bad


def _with_examples(name: str, task: Task, items: list[_Item], pool: list[_Item]) -> list[Sample]:
    num_alike = collections.Counter(each.turns for each in pool)
    samples = []
    for item in items:
        draw = random.Random(seeds.derive(task.few_shot.seed, name, json.dumps(item.turns)))
        num = min(len(pool), task.few_shot.num + num_alike[item.turns])
        shots = [each for each in draw.sample(pool, num) if each.turns != item.turns][: task.few_shot.num]
        if len(shots) < task.few_shot.num:
            what = f"{task.few_shot.num} are asked for, and there are {len(shots)} of other content. Ask for fewer."
            raise UserError(f"tasks.{name}.few_shot.num: {what}")
        samples.append(_sample(task, item, shots))
    return samples


def require_good(bad: Sequence[Bad], *, on_bad_sample: str) -> None:
    """Raise UserError with the first of `bad` and their number, unless they are to be skipped."""
    if not bad or on_bad_sample == "skip":
        return
    lines = [f"{each.file}:{each.line}: {each.reason}." for each in bad[:TOLD]]
    more = f"{len(bad)} samples cannot be scored. Mend them, or say on_bad_sample=skip, which counts and lists them."
    raise UserError(*lines, more)


def _items(raw_files: Sequence[RawFile], found: Input) -> list[_Item | Bad]:
    items: list[_Item | Bad] = []
    for raw in raw_files:
        for line, value in values(raw, found.fields):
            try:
                if isinstance(value, ValueError):
                    raise value
                items.append(_Item(str(raw.path), line, *found.item(value)))
            except ValueError as error:
                items.append(Bad(str(raw.path), line, str(error)))
    return items


def values(raw: RawFile, fields: tuple[str, ...]) -> Iterator[tuple[int, Any]]:
    """(line, record or ValueError); what is no object is the field `text`, or `value`, of the source."""
    reading = Reading(max_record_bytes=MAX_RECORD_BYTES, fields=fields)
    for line, value in formats.FORMATS[raw.format](sources.whole(raw), reading):
        if not isinstance(value, dict | ValueError):
            if raw.format != "text" and raw.source.text != "value":
                value = ValueError(f"a JSON {type(value).__name__}, not an object")
            else:
                value = {raw.source.text: value}
        yield line, value


def spread(items: Sequence[T], number: int | None) -> list[T]:
    """All, or `number` of them spread evenly from the first to the last."""
    if number is None or number >= len(items):
        return list(items)
    if number < 2:
        return list(items[:number])
    return [items[round(index * (len(items) - 1) / (number - 1))] for index in range(number)]


def _sample(task: Task, item: _Item, shots: list[_Item]) -> Sample:
    """The question with its worked examples before it: as text, or as turns of a conversation."""
    messages: Messages | None = None
    if task.chat or task.file.messages is not None:
        own = item.turns[:1] if item.turns[0][0] == "system" else ()
        system = own or ((("system", task.system),) if task.system is not None else ())
        turns = [turn for shot in shots for turn in (*shot.turns, ("assistant", shot.answer_text))]
        before = [turn for turn in turns if turn[0] != "system"]  # which stands at the beginning alone
        messages = (*system, *before, *item.turns[len(own) :])
        prompt = "\n".join(f"{role}: {content}" for role, content in messages)
    else:
        between, joint = task.few_shot.separator, delimiter(task)
        prompt = "".join(f"{shot.turns[-1][1]}{joint}{shot.answer_text}{between}" for shot in shots)
        prompt += item.turns[-1][1]
    content = [prompt, messages, item.references, item.choices, item.answer if item.choices else None, item.weight]
    return Sample(
        item.file,
        item.line,
        sample_id(content),
        prompt,
        messages,
        item.references,
        item.choices,
        item.answer,
        item.weight,
    )


def delimiter(task: Task) -> str:
    """What stands between a prompt and its answer: a space after a template's, nothing after a field's."""
    return task.delimiter if task.delimiter is not None else (" " if task.prompt is not None else "")


def sample_id(content: Any) -> str:
    """32 hexadecimal digits of SHA-256 over `content` as JSON."""
    return hashlib.sha256(json.dumps(content, ensure_ascii=False).encode()).hexdigest()[:32]


# --- what the report says -----------------------------------------------------------------------------------------


def line(name: str | None, sample: Sample) -> dict[str, Any]:
    """The beginning of a sample's line in samples.ndjson."""
    return {
        "task": name,
        "sample_id": sample.id,
        **({"id": sample.given_id} if sample.given_id is not None else {}),
        "line": sample.line,
        **({"weight": sample.weight} if sample.weight != 1 else {}),
        "prompt": sample.prompt,
        "prompt_sha256": files.sha256_bytes(sample.prompt.encode()),
        "references": list(sample.references),
        "references_sha256": files.sha256_bytes(json.dumps(sample.references, ensure_ascii=False).encode()),
    }


def output(text: str) -> dict[str, Any]:
    """What a model wrote, in a sample's line."""
    return {"output": text, "output_sha256": files.sha256_bytes(text.encode())}


def skipped(name: str | None, bad: Sequence[Bad]) -> list[dict[str, Any]]:
    """Lines of samples.ndjson for what was not scored."""
    return [{"task": name, "line": each.line, "skipped": each.reason} for each in bad if not each.is_example]


def counts(lines: Sequence[dict[str, Any]], bad: Sequence[Bad]) -> dict[str, int]:
    """How many samples there are, and what became of them; worked examples that were skipped are told if there are."""
    num_examples = sum(each.is_example for each in bad)
    num_skipped = len(bad) - num_examples
    found = {"num_samples": len(lines) + num_skipped, "num_scored": len(lines), "num_skipped": num_skipped}
    return found | ({"num_skipped_examples": num_examples} if num_examples else {})


def settings(task: Task, *, metrics: Mapping[str, Any]) -> dict[str, Any]:
    """All that decides the numbers of a task but its files, whose digests stand elsewhere; paths are left out."""
    found = task.model_dump(mode="json")
    for source in filter(None, (found["file"], found["few_shot"]["file"])):
        del source["path"], source["chat_template"]
    return {**found, "metrics": dict(metrics)}


def without_metrics(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a report, of which the metrics of its tasks are left out."""
    found = {name: {**task, "metrics": None} for name, task in settings.get("tasks", {}).items()}
    return {**settings, "tasks": found}


def file_digests(inputs: Mapping[str, Input], sha256: Mapping[Path, str]) -> dict[str, str]:
    """Digests of the files of each task, and of those of its examples where they are others."""
    found: dict[str, str] = {}
    for name, each in inputs.items():
        found[f"file of {name}"] = digest_of([sha256[raw.path] for raw in each.raw])
        if each.shots and each.shots != each.raw:
            found[f"examples of {name}"] = digest_of([sha256[raw.path] for raw in each.shots])
    return found


def digest_of(digests: Sequence[str]) -> str:
    """SHA-256 of a file, or, of several, over their digests one after the other."""
    return digests[0] if len(digests) == 1 else files.sha256_bytes("".join(digests).encode())


def template_digests(config: EvaluateConfig, own: str | None) -> dict[str, str]:
    """SHA-256 of the chat templates that tasks use; `own` is the tokenizer's."""
    found: dict[str, str] = {}
    for name, task in config.tasks.items():
        path = task.file.chat_template
        if path is not None:
            found[f"chat_template of {name}"] = files.sha256_file(Path(path))
        elif own is not None and (task.chat or task.file.messages is not None):
            found["chat_template"] = files.sha256_bytes(own.encode())
    return found


# --- question and answer -------------------------------------------------------------------------------------------


def _maker(config: EvaluateConfig, key: str, task: Task) -> tuple[Any, tuple[str, ...]]:
    """What makes question and answer of a record, and the fields that it takes. Raises UserError for bad templates."""
    made, source = templates.of_task(task, config=config, key=key), task.file
    given = [source.messages] if source.messages is not None else [source.prompt, source.completion]
    own = tuple(name for name in given if name is not None) if "prompt" not in made else ()

    def item(record: Mapping[str, Any]) -> tuple[Messages, tuple[str, ...], tuple[str, ...], int, float]:
        if absent := next((name for name in source.required if record.get(name) is None), None):
            raise ValueError(f"field {absent!r} is missing or null: there are {reasons.names(list(record))}")
        turns, accepted = _own(record, source, own) if own else ((("user", made["prompt"](record)),), ())
        if "target" in made and task.kind == "generate":
            accepted = (made["target"](record),)
        if "references" in made:
            accepted = texts("references", made["references"](record))
        among: tuple[str, ...] = ()
        right = 0
        if task.kind == "choice":
            among = _choices(made["choices"](record))
            named = made["target"](record) if "target" in made else accepted[0]
            right = _right(named, among, may_be_number="references" not in made)
            accepted = (among[right],)
        elif not accepted:
            raise ValueError("no reference")
        weight = made["weight"](record) if "weight" in made else 1.0
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < math.inf:
            raise ValueError(f"the weight is of type {type(weight).__name__}, or below 0, or not finite")
        for text in (*(content for _, content in turns), *accepted, *among):
            require_unicode(text)
        return turns, accepted, among, right, float(weight)

    fields = {name for each in made.values() for name in each.fields}
    return item, tuple(sorted({*fields, *own, *source.required}))


def _own(record: Mapping[str, Any], source: Any, names: tuple[str, ...]) -> tuple[Messages, tuple[str, ...]]:
    """Question and reference of a record with prompt and completion, or with messages: the last is the reference."""
    for name in names:
        if name not in record:
            raise ValueError(f"no field {name!r}: there are {reasons.names(list(record))}")
    if source.messages is None:
        prompt, completion = (record[name] for name in names)
        for name, value in zip(names, (prompt, completion), strict=True):
            if not isinstance(value, str):
                raise ValueError(f"field {name!r} is of type {type(value).__name__}, not text")
        return (("user", prompt),), (completion,)
    turns = record[names[0]]
    right = isinstance(turns, list) and all(
        isinstance(turn, dict) and all(isinstance(turn.get(key), str) for key in ("role", "content")) for turn in turns
    )
    if not right or len(turns) < 2 or turns[-1]["role"] != "assistant":
        raise ValueError(f"field {names[0]!r} is no list of messages that ends with an assistant's")
    return tuple((turn["role"], turn["content"]) for turn in turns[:-1]), (turns[-1]["content"],)


def texts(what: str, value: Any) -> tuple[str, ...]:
    """A list of texts, or one text; raises ValueError for anything else, and for none."""
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{what} is of type {type(value).__name__}, not a list of texts")
    if not texts:
        raise ValueError("no reference" if what == "references" else f"{what} is empty")
    return tuple(texts)


def _choices(value: Any) -> tuple[str, ...]:
    """Two texts or more; raises ValueError for anything else: a question with one choice is always answered right."""
    if isinstance(value, str):
        raise ValueError("choices is one text, not a list of texts")
    if len(found := texts("choices", value)) < 2:
        raise ValueError("choices has one text, and there is nothing to choose")
    return found


def _right(value: str, choices: tuple[str, ...], *, may_be_number: bool) -> int:
    """The place of the right choice, which `value` gives as its text or as its number from 0."""
    places = {place for place, text in enumerate(choices) if text == value}
    if len(places) > 1:
        raise ValueError("the right choice stands there twice")
    number = value.strip()
    if may_be_number and number.isascii() and number.isdigit() and int(number) < len(choices):
        places.add(int(number))
    if len(places) > 1:
        what = "the target is the text of one choice and the number of another"
        raise ValueError(f"{what}: give references instead of target, which are texts alone")
    if not places:
        what = f"one of the {len(choices)} choices nor a number from 0 to {len(choices) - 1}"
        raise ValueError(f"the target is neither {what}")
    return places.pop()


def require_unicode(text: str) -> None:
    """Raises ValueError if `text` cannot be written as UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"a field holds a lone surrogate: at character {error.start + 1} of what it makes") from None
